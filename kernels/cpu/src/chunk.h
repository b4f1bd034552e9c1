// What both ways of multiplying do with a chunk of outputs: weights as float32 rows, and sums turned into rows of tokens.
#pragma once
#include <cstdlib>

#include "matmul.h"

namespace dt {

// Floats that parts of a workspace take, so that what lies behind them begins with a line of the cache.
static inline size_t rounded(size_t count) { return (count + 15) / 16 * 16; }

// Memory of one thread that grows to what is asked for. Aligned to 64 bytes.
struct Scratch {
  float* data = nullptr;
  size_t size = 0;
  float* reserve(size_t count) {
    if (count > size) {
      free(data);
      data = static_cast<float*>(aligned_alloc(64, (count * 4 + 63) / 64 * 64));
      size = count;
    }
    return data;
  }
  ~Scratch() { free(data); }
};

// Weights of a chunk as float32 rows: in place where they are, else decoded once for all tokens.
const float* rows_of(const Matrix& m, int first, int count, size_t& stride, Scratch& scratch);

// Sums of a chunk and a panel, [count, width], turned into rows of tokens for `put(token, output, value)`.
template <class Put>
static void turn(const float* sums, int count, int width, int tokens, const float* bias, const Put& put) {
  int o = 0;
  for (; o + W <= count; o += W) {
    for (int first = 0; first < tokens; first += W) {
      vf rows[W];
      for (int i = 0; i < W; i++) rows[i] = load(sums + (o + i) * width + first);
      transpose(rows);
      vf add = bias ? load(bias + o) : vf{};
      int valid = tokens - first < W ? tokens - first : W;
      for (int i = 0; i < valid; i++) put(first + i, o, rows[i] + add);
    }
  }
  for (; o < count; o++)
    for (int t = 0; t < tokens; t++) put(t, o, sums[o * width + t] + (bias ? bias[o] : 0.0f));
}

static inline vf act(Activation kind, vf x) {
  if (kind == Activation::kSilu) return x / (1.0f + vexp(-x));
  return 0.5f * x * (1.0f + vtanh(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}
static inline float act(Activation kind, float x) { return act(kind, splat(x))[0]; }

static inline vf bias_of(const Matrix& m, int o) { return m.bias ? splat(m.bias[o]) : vf{}; }

}  // namespace dt
