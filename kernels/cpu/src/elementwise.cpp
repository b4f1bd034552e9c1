#include "elementwise.h"

#include <cmath>
#include <type_traits>

#include "half.h"
#include "pool.h"

extern "C" {

// Mirrored by RotationFields in rotary.py; all fields 8 bytes wide. Strides in elements: of tokens and heads; of blocks, tokens in a
// block and heads. Formats: 0 float32, 1 bfloat16, 2 float16.
struct dt_rotation {
  const void *q, *k, *v;
  const float *cos, *sin;  // [tokens, rotary]
  void *keys, *values;
  const int64_t* slots;
  void* out;  // [tokens, heads, size]
  int64_t tokens, heads, groups, size, rotary, blocks, block_size, format, cache_format;
  int64_t q_strides[2], k_strides[2], v_strides[2], key_strides[3], value_strides[3];
};

}  // extern "C"

namespace dt {
namespace {

template <class X>
static float norm_factor(const X* x, float eps, int size) {
  vf squares = {};
  int i = 0;
  for (; i + W <= size; i += W) {
    vf v = load(x + i);
    squares += v * v;
  }
  float total = sum(squares);
  for (; i < size; i++) total += get(x + i) * get(x + i);
  return 1.0f / sqrtf(total / size + eps);
}

template <class X, class Y>
DT_CALLED static void norm_row(const X* x, const Norm& norm, int size, Y* out) {
  const float factor = norm_factor(x, norm.eps, size), offset = norm.offset;
  auto apply = [&](const auto* w) {
    int k = 0;
    for (; k + W <= size; k += W) store(out + k, load(x + k) * factor * (load(w + k) + offset));
    for (; k < size; k++) put(out + k, get(x + k) * factor * (get(w + k) + offset));
  };
  if (norm.format == Format::kFloat32)
    apply(static_cast<const float*>(norm.weight));
  else
    apply(static_cast<const bf16*>(norm.weight));
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
static void norms(const T* x, const T* residual, const Norm& norm, int rows, int size, T* out, T* summed) {
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
    norm_row(in, norm, size, out + size_t(row) * size);
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

// One head: pairs (i, i + rotary / 2) of the first `rotary` features are rotated, the others pass. In and out may be the same.
template <class X, class Y>
DT_CALLED static void rotate_head(const X* from, const float* cos, const float* sin, int rotary, Y* to) {
  const int half = rotary / 2;
  int i = 0;
  for (; i + W <= half; i += W) {
    vf a = load(from + i), b = load(from + half + i);
    store(to + i, a * load(cos + i) - b * load(sin + i));
    store(to + half + i, b * load(cos + half + i) + a * load(sin + half + i));
  }
  for (; i < half; i++) {
    float a = get(from + i), b = get(from + half + i);
    put(to + i, a * cos[i] - b * sin[i]);
    put(to + half + i, b * cos[half + i] + a * sin[half + i]);
  }
}

template <class X, class Y>
DT_CALLED static void convert_row(const X* from, int size, Y* to) {
  if constexpr (std::is_same_v<X, Y>) {
    memcpy(to, from, size * sizeof(X));
  } else {
    int i = 0;
    for (; i + W <= size; i += W) store(to + i, load(from + i));
    for (; i < size; i++) put(to + i, get(from + i));
  }
}

template <class X, class Y>
static inline void rotate_and_pass(const X* from, const float* cos, const float* sin, int rotary, int size, Y* to) {
  rotate_head(from, cos, sin, rotary, to);
  convert_row(from + rotary, size - rotary, to + rotary);
}

template <class T>
static void rotate_heads(const T* in, const float* cos, const float* sin, int tokens, int heads, int size, int rotary, T* out) {
  over_rows(tokens * heads, size, [&](int row) {
    int token = row / heads;
    const T* from = in + size_t(row) * size;
    T* to = out + size_t(row) * size;
    rotate_and_pass(from, cos + size_t(token) * rotary, sin + size_t(token) * rotary, rotary, size, to);
  });
}

// A token's angles are read once for queries and keys, and its keys and values are converted on their way into the cache.
template <class X, class Y>
static void rotate_and_write(const dt_rotation& r) {
  const int row = (r.heads + 2 * r.groups) * r.size;
  over_rows(int(r.tokens), row, [&](int token) {
    const float *cos = r.cos + token * r.rotary, *sin = r.sin + token * r.rotary;
    const X* q = static_cast<const X*>(r.q) + token * r.q_strides[0];
    X* out = static_cast<X*>(r.out) + token * r.heads * r.size;
    for (int h = 0; h < r.heads; h++) rotate_and_pass(q + h * r.q_strides[1], cos, sin, r.rotary, r.size, out + h * r.size);
    const int64_t block = r.slots[token] / r.block_size, place = r.slots[token] % r.block_size;
    const X* k = static_cast<const X*>(r.k) + token * r.k_strides[0];
    const X* v = static_cast<const X*>(r.v) + token * r.v_strides[0];
    Y* key = static_cast<Y*>(r.keys) + block * r.key_strides[0] + place * r.key_strides[1];
    Y* value = static_cast<Y*>(r.values) + block * r.value_strides[0] + place * r.value_strides[1];
    for (int g = 0; g < r.groups; g++) {
      rotate_and_pass(k + g * r.k_strides[1], cos, sin, r.rotary, r.size, key + g * r.key_strides[2]);
      convert_row(v + g * r.v_strides[1], r.size, value + g * r.value_strides[2]);
    }
  });
}

template <class X>
static void rotate_and_write(const dt_rotation& r) {
  switch (r.cache_format) {
    case 0: return rotate_and_write<X, float>(r);
    case 1: return rotate_and_write<X, bf16>(r);
    default: return rotate_and_write<X, f16>(r);
  }
}

}  // namespace

void rms_norm_row(const float* x, const Norm& norm, int size, float* out) { norm_row(x, norm, size, out); }

float rms_norm_factor(const float* x, float eps, int size) { return norm_factor(x, eps, size); }

void gate_in_place(float* gate, const float* up, int rows, int size, Activation kind) {
  gate_rows(static_cast<const float*>(gate), up, rows, size, kind, gate);
}

void rotate(float* head, const float* cos, const float* sin, int rotary) {
  rotate_head(static_cast<const float*>(head), cos, sin, rotary, head);
}

}  // namespace dt

// --- what Python calls: rows side by side in memory, `format` 0 float32 and 1 bfloat16 -------------------------------------

using namespace dt;

// residual and summed: null for a plain norm.
DT_API void dt_rms_norm(const void* x, const void* residual, const void* weight, float eps, float offset, int rows, int size, int format,
                 void* out, void* summed) {
  const Norm norm{weight, Format(format), eps, offset};
  if (format == int(Format::kFloat32))
    norms(static_cast<const float*>(x), static_cast<const float*>(residual), norm, rows, size, static_cast<float*>(out),
          static_cast<float*>(summed));
  else
    norms(static_cast<const bf16*>(x), static_cast<const bf16*>(residual), norm, rows, size, static_cast<bf16*>(out),
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

// Returns 0, or 1 when a slot lies outside of the cache, and then nothing is written.
DT_API int dt_rope_write(const dt_rotation* r) {
  for (int64_t t = 0; t < r->tokens; t++)
    if (r->slots[t] < 0 || r->slots[t] >= r->blocks * r->block_size) return 1;
  switch (r->format) {
    case 0: rotate_and_write<float>(*r); break;
    case 1: rotate_and_write<bf16>(*r); break;
    default: rotate_and_write<f16>(*r);
  }
  return 0;
}

DT_API void dt_set_threads(int count) { set_threads(count); }
