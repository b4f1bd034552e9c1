// y[T, O] = x[T, I] @ weight[O, I]^T, with the weights in rows as torch keeps them: they are read in place, never repacked.
//
// Two ways, by the number of rows T:
//   few   (T <= kFewRows)  each weight row is a dot product with every row of x; the weights stream by once.
//   many  x is packed so that W tokens lie side by side ([I, tokens], small and shared by all threads); then a register tile of
//         outputs x tokens needs one broadcast a weight and no sum across a vector at its end. Tokens that would fill only a part
//         of a vector, the rest, stay rows: dot products again, in a register tile of outputs x rows.
#pragma once
#include <cstddef>

#include "ahead.h"
#include "screen.h"
#include "simd.h"

namespace dt {

// From kInt8 on, weights are packed (packed.h). kBlocks + a type of ggml: the blocks of GGUF files.
enum class Format : int { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2, kFloat8 = 3, kInt4 = 4, kInt3 = 5, kBlocks = 16 };

// weight: [rows, cols] in `format`, rows `stride` elements apart (packed: bytes). bias: [rows] in float32, or null.
struct Matrix {
  const void* weight;
  const float* bias;
  int rows, cols, stride;
  Format format;
  // Of packed weights: one scale a row, or scales and minima of each `group` of inputs, in float32 (0), bfloat16 (1) or float16 (2).
  const void *scales = nullptr, *mins = nullptr;
  const void* high = nullptr;  // kInt3: the third bits
  int group = 0, scale_format = 0;
  bool has_zeros = false;  // mins are zero points, a byte each: a minimum is its zero point times minus the scale

  bool is_packed() const { return format >= Format::kInt8; }
  size_t row_bytes() const { return is_packed() ? stride : size_t(stride) * (format == Format::kFloat32 ? 4 : 2); }
};

constexpr int kFewRows = 4;
// How many bytes before they need them few rows ask for weights, and how near they are brought: 2 is the second cache, 0 the first
// alone. Measured on Sapphire Rapids and, with DT_FETCH_FIRST, on Zen 5.
#if defined(DT_FETCH_FIRST)
constexpr int kFewAhead = 4 << 10, kFewNearness = 0;
#else
constexpr int kFewAhead = 9 << 10, kFewNearness = 2;
#endif
// In how many places at once a thread reads weights that stream by, each from one row to the next. Processors without AVX-512 ask memory for
// little ahead of one reader: four read 1.3 to 1.6 times as much as one on Zen 3, and asking for more slows them down (measured). Elsewhere
// there is one, who asks as above.
constexpr int kStreams = W == 8 ? 4 : 1;
constexpr int kPanel = 2 * W;  // tokens in a panel
constexpr int kMostRest = W == 16 ? 10 : W / 2;  // a larger rest is computed faster as a vector that is filled up (measured)
constexpr int kChunk = 48;     // outputs that one thread takes at a time

// Of many tokens, those that are packed side by side; the others are the rest. Without a panel there is none: the weights come from
// memory then, and a vector's multiply-adds cost nothing.
static inline int tokens_in_panels(int num_tokens) {
  int rest = num_tokens % W;
  return num_tokens > W && rest <= kMostRest ? num_tokens - rest : num_tokens;
}

// How many rows of full panels products of so many tokens take as long as: vectors that are filled up count whole, a row of the rest
// somewhat more than one (measured).
static inline double rows_of_panels(int num_tokens) {
  const int in_panels = tokens_in_panels(num_tokens);
  return (in_panels + W - 1) / W * W + 1.3 * (num_tokens - in_panels);
}

// Packed or plain activations, ready for products. Views into a workspace.
struct Activations {
  int num_tokens, size;
  const float* rows;    // few: [T, I]
  const float* split;   // few: the same with even and odd features apart, as bf16 weights are read
  const float* panels;  // many: panel p at p * kPanel * I, as [I, width of the panel]
  bool is_paired = false;  // many: panels hold pairs of bf16, [I / 2, width], rounded from float32; so do the rest's rows, [I / 2]

  int depth() const { return is_paired ? size / 2 : size; }  // rows of a panel, and floats in a row of the rest
  int in_panels() const { return tokens_in_panels(num_tokens); }
  int num_rest() const { return num_tokens - in_panels(); }
  // The rest, [num_rest, depth]: behind the panels.
  size_t rest_offset() const { return size_t((in_panels() + W - 1) / W * W) * depth(); }
  const float* rest() const { return panels + rest_offset(); }
};

// An RMS norm of rows: x / sqrt(mean(x^2) + eps) * (weight + offset). weight: in `format`; null for no norm.
struct Norm {
  const void* weight = nullptr;
  Format format = Format::kFloat32;
  float eps = 0, offset = 0;
};

// What becomes of the sums. All pointers are rows of `stride` elements. kScreen: nothing but what `screen` keeps.
struct Sink {
  enum Mode { kStore, kStoreBf16, kAdd, kScreen } mode;
  void* out;
  size_t stride;
  float scale = 1.0f;  // kAdd: out += scale * sum
  const Screen* screen = nullptr;

  // Asks for the places that sums will be put to: other threads may have them.
  inline void fetch(int token, int tokens, int o, int count) const {
    if (mode == kScreen) return;
    const size_t bytes = mode == kStoreBf16 ? 2 : 4;
    for (int t = 0; t < tokens; t++) {
      const char* at = static_cast<const char*>(out) + (size_t(token + t) * stride + o) * bytes;
      for (const char* end = at + count * bytes; at < end; at += 64) __builtin_prefetch(at, 1, 3);
    }
  }
  inline void put(int token, int o, vf value) const {
    size_t at = size_t(token) * stride + o;
    if (mode == kStore) {
      store(static_cast<float*>(out) + at, value);
    } else if (mode == kStoreBf16) {
      store(static_cast<bf16*>(out) + at, value);
    } else if (mode == kScreen) {
      screen->take(token, o, value);
    } else {
      float* p = static_cast<float*>(out) + at;
      store(p, load(p) + scale * value);
    }
  }
  inline void put(int token, int o, float value) const {
    size_t at = size_t(token) * stride + o;
    if (mode == kStore)
      static_cast<float*>(out)[at] = value;
    else if (mode == kStoreBf16)
      static_cast<bf16*>(out)[at] = to_bf16(value);
    else if (mode == kScreen)
      screen->take(token, o, value);
    else
      static_cast<float*>(out)[at] += scale * value;
  }
};

enum class Activation : int { kSilu = 0, kGeluTanh = 1 };

// Floats of workspace that pack needs for T rows of size I.
size_t packed_floats(int num_tokens, int size);

// Whether products by these weights can be of pairs: many rows by bf16 where the processor has an instruction for it, and no matrix
// unit. For activations that are bf16, or would be where torch's layers are called one after the other: they are rounded to it.
bool takes_pairs(const Matrix& m, int num_tokens);

// Packs rows [T, I] (float32, `stride` apart) on all threads; `space` holds packed_floats() and must be aligned to 64 bytes.
// in_pairs: all that they are multiplied by takes_pairs. norm: of the rows first, if packs_norms.
Activations pack(const float* rows, size_t stride, int num_tokens, int size, float* space, bool in_pairs = false, const Norm& norm = {});

// Whether so many rows can be normed while they are packed.
bool packs_norms(int num_tokens);

// Whether each thread may as well multiply rows of its own by all these weights as all rows by weights of its own: they are read where
// they lie, and nothing else is done to them, and the matrix unit is not what computes.
bool reads_in_place(const Matrix& m, int num_tokens);

// Outputs that one thread takes at a time when weights stream by. What it asks for beyond its end is lost, and for its beginning
// it waits: so not too few, and not so many that a thread is left without.
int few_rows_at_a_time(const Matrix* matrices, int count);

// Several products of the same activations, in one parallel region. ahead: what threads ask for meanwhile, if takes_ahead.
void matmul(const Activations& x, const Matrix* matrices, const Sink* sinks, int count, Ahead* ahead = nullptr);

// Whether products of so many rows have time to ask for something else, and how many bytes each thread would then ask for.
bool takes_ahead(int num_tokens);
size_t ahead_bytes(const Matrix& m, int num_tokens);

// act(x @ gate^T + bias) * (x @ up^T + bias), ready for the next product: the sums of a tile lie as packed activations do.
// `space` holds packed_floats(T, O), aligned to 64 bytes. in_pairs: the next product's weights take pairs.
Activations gated_matmul(const Activations& x, const Matrix& gate, const Matrix& up, Activation activation, float* space,
                         bool in_pairs = false, Ahead* ahead = nullptr);

// Packed activations as rows [T, I] of float32; not of pairs.
void unpack(const Activations& x, float* rows);

}  // namespace dt
