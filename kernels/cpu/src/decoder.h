// A decoder and one step of it, as Python describes them. All fields are 8 bytes wide, so that both sides agree without packing rules.
#pragma once
#include <cstdint>

extern "C" {

// Mirrored by MatrixFields in operations.py; what follows it, by LayerFields, DecoderFields and StepFields in decoder.py.
struct dt_matrix {
  const void* weight;
  const float* bias;
  int64_t rows, cols, format;
  // What follows is of packed weights: see Matrix and Rounding. stride: bytes of a row. x_scale: of activations in float8, 0 for
  // one of each row.
  const void *scales, *mins, *high;
  const float* x_scale;
  int64_t stride, group, scale_format, rounding, has_zeros;
};

// Norm weights that a layer does not have are null.
struct dt_layer {
  const void *before_attention, *after_attention, *before_mlp, *after_mlp, *q_norm, *k_norm;
  dt_matrix q, k, v, o, gate, up, down;
  int64_t rope;    // which pair of cos and sin; -1 for none
  int64_t group;   // which block table and slots
  int64_t window;  // 0 for all
};

struct dt_decoder {
  int64_t num_layers, hidden, num_heads, kv_heads, head_size, rotary, intermediate;
  int64_t format, cache_format, block_size, activation, norms_heads;
  double eps, norm_offset, residual_scale, attention_scale, soft_cap;
  const dt_layer* layers;
};

// tables, slots: one for each group; cos, sin: one for each rope, [T, rotary]; keys, values and their scales: one for each layer.
// ends_only: of what comes out, only the row of each sequence's last token is read. No sequence reads keys that
// another one writes in the same step.
struct dt_step {
  int64_t num_sequences, num_tokens, ends_only;
  const int32_t *query_starts, *kv_lengths;
  const int32_t* const* tables;
  const int64_t* table_strides;
  const int64_t* const* slots;
  const float* const* cos;
  const float* const* sin;
  void* const* keys;
  void* const* values;
  float* const* key_scales;  // null where keys and values are kept as they are
  float* const* value_scales;
};

}  // extern "C"
