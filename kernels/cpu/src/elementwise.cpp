#include "elementwise.h"

#include <cmath>

#include "pool.h"

namespace dt {
namespace {

template <class X, class Y>
static void norm_row(const X* x, const Weights& weight, float eps, float offset, int size, Y* out) {
  vf squares = {};
  int i = 0;
  for (; i + W <= size; i += W) {
    vf v = load(x + i);
    squares += v * v;
  }
  float total = sum(squares);
  for (; i < size; i++) total += get(x + i) * get(x + i);
  float factor = 1.0f / sqrtf(total / size + eps);
  auto apply = [&](const auto* w) {
    int k = 0;
    for (; k + W <= size; k += W) store(out + k, load(x + k) * factor * (load(w + k) + offset));
    for (; k < size; k++) put(out + k, get(x + k) * factor * (get(w + k) + offset));
  };
  if (weight.format == Format::kFloat32)
    apply(static_cast<const float*>(weight.data));
  else
    apply(static_cast<const bf16*>(weight.data));
}

// Rows go to threads in runs of about this many elements; fewer are not worth waking anyone for.
constexpr int kElements = 16384;

template <class F>
static void over_rows(int rows, int size, F&& body) {
  int run = kElements / (size > 0 ? size : 1);
  if (run < 1) run = 1;
  parallel((rows + run - 1) / run, [&](int chunk, int) {
    int end = (chunk + 1) * run < rows ? (chunk + 1) * run : rows;
    for (int row = chunk * run; row < end; row++) body(row);
  });
}

template <class T>
static void norms(const T* x, const T* residual, const Weights& weight, float eps, float offset, int rows, int size, T* out,
                  T* summed) {
  over_rows(rows, size, [&](int row) {
    const T* in = x + size_t(row) * size;
    if (residual) {
      const T* other = residual + size_t(row) * size;
      T* total = summed + size_t(row) * size;
      int i = 0;
      for (; i + W <= size; i += W) store(total + i, load(in + i) + load(other + i));
      for (; i < size; i++) put(total + i, get(in + i) + get(other + i));
      in = total;
    }
    norm_row(in, weight, eps, offset, size, out + size_t(row) * size);
  });
}

static inline vf gelu(vf x) { return 0.5f * x * (1.0f + vtanh(0.7978845608028654f * (x + 0.044715f * x * x * x))); }
static inline vf silu(vf x) { return x / (1.0f + vexp(-x)); }

template <class T>
static void gate_rows(const T* gate, const T* up, int rows, int size, Activation kind, T* out) {
  over_rows(rows, size, [&](int row) {
    const T *g = gate + size_t(row) * size, *u = up + size_t(row) * size;
    T* o = out + size_t(row) * size;
    int i = 0;
    for (; i + W <= size; i += W) {
      vf x = load(g + i);
      store(o + i, (kind == Activation::kSilu ? silu(x) : gelu(x)) * load(u + i));
    }
    for (; i < size; i++) {
      vf x = splat(get(g + i));
      put(o + i, (kind == Activation::kSilu ? silu(x) : gelu(x))[0] * get(u + i));
    }
  });
}

template <class T>
static void rotate_heads(const T* in, const float* cos, const float* sin, int tokens, int heads, int size, int rotary, T* out) {
  over_rows(tokens * heads, size, [&](int row) {
    int token = row / heads, half = rotary / 2;
    const T* from = in + size_t(row) * size;
    T* to = out + size_t(row) * size;
    const float *c = cos + size_t(token) * rotary, *s = sin + size_t(token) * rotary;
    for (int i = 0; i < half; i++) {
      float a = get(from + i), b = get(from + half + i);
      put(to + i, a * c[i] - b * s[i]);
      put(to + half + i, b * c[half + i] + a * s[half + i]);
    }
    for (int i = rotary; i < size; i++) to[i] = from[i];
  });
}

}  // namespace

void rms_norm_row(const float* x, const Weights& weight, float eps, float offset, int size, float* out) {
  norm_row(x, weight, eps, offset, size, out);
}

void gate_in_place(float* gate, const float* up, int rows, int size, Activation kind) {
  gate_rows(static_cast<const float*>(gate), up, rows, size, kind, gate);
}

void rotate(float* head, const float* cos, const float* sin, int rotary) {
  int half = rotary / 2, i = 0;
  for (; i + W <= half; i += W) {
    vf a = load(head + i), b = load(head + half + i);
    store(head + i, a * load(cos + i) - b * load(sin + i));
    store(head + half + i, b * load(cos + half + i) + a * load(sin + half + i));
  }
  for (; i < half; i++) {
    float a = head[i], b = head[half + i];
    head[i] = a * cos[i] - b * sin[i];
    head[half + i] = b * cos[half + i] + a * sin[half + i];
  }
}

}  // namespace dt

// --- what Python calls: rows side by side in memory, `format` 0 float32 and 1 bfloat16 -------------------------------------

using namespace dt;

// residual and summed: null for a plain norm.
DT_API void dt_rms_norm(const void* x, const void* residual, const void* weight, float eps, float offset, int rows, int size, int format,
                 void* out, void* summed) {
  Weights w{weight, Format(format)};
  if (format == int(Format::kFloat32))
    norms(static_cast<const float*>(x), static_cast<const float*>(residual), w, eps, offset, rows, size, static_cast<float*>(out),
          static_cast<float*>(summed));
  else
    norms(static_cast<const bf16*>(x), static_cast<const bf16*>(residual), w, eps, offset, rows, size, static_cast<bf16*>(out),
          static_cast<bf16*>(summed));
}

DT_API void dt_gated(const void* gate, const void* up, int rows, int size, int activation, int format, void* out) {
  if (format == int(Format::kFloat32))
    gate_rows(static_cast<const float*>(gate), static_cast<const float*>(up), rows, size, Activation(activation),
              static_cast<float*>(out));
  else
    gate_rows(static_cast<const bf16*>(gate), static_cast<const bf16*>(up), rows, size, Activation(activation),
              static_cast<bf16*>(out));
}

DT_API void dt_rotate(const void* in, const float* cos, const float* sin, int tokens, int heads, int size, int rotary, int format,
               void* out) {
  if (format == int(Format::kFloat32))
    rotate_heads(static_cast<const float*>(in), cos, sin, tokens, heads, size, rotary, static_cast<float*>(out));
  else
    rotate_heads(static_cast<const bf16*>(in), cos, sin, tokens, heads, size, rotary, static_cast<bf16*>(out));
}

DT_API void dt_set_threads(int count) { set_threads(count); }
