// Attention over the paged cache, where it lies: [B, N, G, D] for keys and for values.
//
// Decodes (one query of a sequence) read each key once for all query heads of its group. Longer runs of queries pack W or 2 W
// tokens side by side, so that softmax needs no sum across a vector. Both are online: a bounded number of scores at a time. Decodes
// whose tables begin with the same blocks lie side by side too, over what they share.
#pragma once
#include "matmul.h"

namespace dt {

// kInt8 and kFp8 (e4m3) have a float32 scale for each token and key/value head, computed when the token is written.
enum class CacheFormat : int { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2, kFp8 = 3 };

static inline size_t number_bytes(CacheFormat format) {
  return format == CacheFormat::kFloat32 ? 4 : format == CacheFormat::kBfloat16 ? 2 : 1;
}

// One layer's cache and mask. scale: on the scores. window: tokens a query sees, itself included; 0 is all. soft_cap: 0 is none.
// key_scales, value_scales: [B, N, G], null where keys and values are kept as they are.
struct LayerCache {
  void* keys;
  void* values;
  float* key_scales;
  float* value_scales;
  int block_size, kv_heads, head_size;
  CacheFormat format;
  float scale, soft_cap;
  int window;
};

// How the tokens of a step lie over sequences. tables: row s of `table_stride` entries lists the blocks of sequence s.
struct Batch {
  int num_sequences, num_tokens;
  const int32_t* query_starts;  // [S + 1]
  const int32_t* kv_lengths;    // [S], context and new tokens together
  const int32_t* tables;
  int table_stride;
  const int64_t* slots;  // [T]: where a token's key and value are written, block * N + offset
};

// Writes keys and values of all tokens, rows of `stride` floats with G * D of them in use.
void write_cache(const LayerCache& cache, const Batch& batch, const float* keys, const float* values, size_t stride);

struct Plan;  // attention_plan.h

// out[T, H * D] = attention of q[T, H * D] over the cache, as the plan for these has it. `space` holds attention_floats().
void attend(const LayerCache& cache, const Batch& batch, const Plan& plan, int num_heads, const float* q, size_t q_stride, float* out,
            size_t out_stride, float* space);

size_t attention_floats(int num_sequences, int num_heads, int kv_heads, int head_size);

}  // namespace dt
