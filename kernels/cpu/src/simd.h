// Vectors of W floats from one source: AVX-512 (W = 16), AVX2 (W = 8), NEON and plain SSE (W = 4).
//
// GCC's and clang's vector extensions give the arithmetic, and contraction to fused multiply-add is left to the compiler
// (-ffp-contract=fast). Only what they can't say is written with intrinsics, elsewhere.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// A function that is called where it is named. What runs once a row has no place inside of each kernel: compiling took three times as long.
#if defined(__clang__)
#define DT_CALLED __attribute__((noinline))
#else
#define DT_CALLED __attribute__((noinline, noclone))
#endif
// Before a loop of few iterations that is no part of the work itself.
#define DT_ROLLED _Pragma("GCC unroll 1")

// A function that Python calls.
#define DT_API extern "C" __attribute__((visibility("default")))

namespace dt {

#if defined(__AVX512F__)
constexpr int W = 16;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int W = 8;
constexpr int kRegisters = 16;
#else
constexpr int W = 4;
#if defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef float vf_any __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(W * 2), aligned(2), may_alias));

typedef uint16_t bf16;

static inline vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
static inline void store(float* p, vf v) { *reinterpret_cast<vf_any*>(p) = v; }
static inline vf splat(float x) {
#if defined(__AVX512F__)
  return (vf)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (vf)_mm256_set1_ps(x);
#else
  return vf{x, x, x, x};
#endif
}

static inline float to_float(bf16 x) {
  uint32_t bits = uint32_t(x) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

// Round to nearest, ties to even; a NaN stays one.
static inline bf16 to_bf16(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16((bits >> 16) | 0x40u);
  return bf16((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline vf load(const bf16* p) {
  vu wide = __builtin_convertvector(*reinterpret_cast<const vh_any*>(p), vu) << 16;
  return (vf)wide;
}

// The bits of W floats as bf16, each in the lower half of 32.
static inline vu bf16_bits(vf v) {
  vu bits = (vu)v;
  vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  vu quiet = (bits >> 16) | 0x40u;
  vu is_nan = (vu)((bits & 0x7fffffffu) > 0x7f800000u);
  return (is_nan & quiet) | (~is_nan & rounded);
}

static inline void store(bf16* p, vf v) { *reinterpret_cast<vh_any*>(p) = __builtin_convertvector(bf16_bits(v), vh); }

// Two numbers of bf16 in each lane, as two weights that follow each other lie in memory, and the sum of both products of a lane.
static inline vf pairs_of(vf even, vf odd) { return (vf)(bf16_bits(even) | bf16_bits(odd) << 16); }
#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
static inline vf add_pairs(vf sum, vf a, vf b) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
#else
constexpr bool kHasPairs = false;
static inline vf add_pairs(vf sum, vf, vf) { return sum; }
#endif

// 2 W bf16 weights as two vectors: those at even places and those at odd ones. Two operations, and no shuffle.
static inline void load_split(const bf16* p, vf& even, vf& odd) {
  typedef uint32_t vu_any __attribute__((vector_size(W * 4), aligned(2), may_alias));
  vu both = *reinterpret_cast<const vu_any*>(p);
  even = (vf)(both << 16);
  odd = (vf)(both & 0xffff0000u);
}

static inline float get(const float* p) { return *p; }
static inline float get(const bf16* p) { return to_float(*p); }
static inline void put(float* p, float x) { *p = x; }
static inline void put(bf16* p, float x) { *p = to_bf16(x); }

static inline vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }
// b where one of both is no number.
#if defined(__AVX512F__)
static inline vf vmax(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
static inline vf vmin(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
static inline vf vmax(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
static inline vf vmin(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#else
static inline vf vmax(vf a, vf b) { return select(a > b, a, b); }
static inline vf vmin(vf a, vf b) { return select(a < b, a, b); }
#endif

#if defined(__aarch64__)
// Four bytes as integers: GCC 12 widens vectors this short one number at a time.
static inline uint16x4_t widened(const void* four) {
  uint32_t bits;
  memcpy(&bits, four, 4);
  return vget_low_u16(vmovl_u8(vcreate_u8(bits)));
}
static inline int32x4_t widened_signed(const void* four) {
  uint32_t bits;
  memcpy(&bits, four, 4);
  return vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(bits))));
}
#endif

// The sums of four vectors.
static inline void sum4(vf a, vf b, vf c, vf d, float* out) {
#if defined(__AVX512F__)
  // Within each 128 bits first, all four at once: a horizontal addition is three operations on most processors.
  auto pairs = [](vf v, vf w) { return (__m512d)_mm512_add_ps(_mm512_unpacklo_ps((__m512)v, (__m512)w), _mm512_unpackhi_ps((__m512)v, (__m512)w)); };
  __m512d ab = pairs(a, b), cd = pairs(c, d);
  vf all = (vf)_mm512_unpacklo_pd(ab, cd) + (vf)_mm512_unpackhi_pd(ab, cd);
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)all), _mm512_extractf32x8_ps((__m512)all, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif defined(__AVX2__)
  __m256 ab = _mm256_hadd_ps((__m256)a, (__m256)b), cd = _mm256_hadd_ps((__m256)c, (__m256)d);
  __m256 all = _mm256_hadd_ps(ab, cd);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
#elif defined(__aarch64__)
  auto pairs = [](vf v, vf w) { return vpaddq_f32((float32x4_t)v, (float32x4_t)w); };
  vst1q_f32(out, vpaddq_f32(pairs(a, b), pairs(c, d)));
#else
  __m128 rows[4] = {(__m128)a, (__m128)b, (__m128)c, (__m128)d};
  _MM_TRANSPOSE4_PS(rows[0], rows[1], rows[2], rows[3]);
  _mm_storeu_ps(out, _mm_add_ps(_mm_add_ps(rows[0], rows[1]), _mm_add_ps(rows[2], rows[3])));
#endif
}

static inline float sum(vf v) {
#if defined(__aarch64__)
  return vaddvq_f32((float32x4_t)v);
#endif
  float out[4];
  sum4(v, v, v, v, out);
  return out[0];
}

static inline float largest(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#elif defined(__aarch64__)
  return vmaxnmvq_f32((float32x4_t)v);
#else
#if defined(__AVX2__)
  __m128 four = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
#else
  __m128 four = (__m128)v;
#endif
  __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
#endif
}

static inline int32_t largest(vi v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32((__m512i)v);
#elif defined(__AVX2__)
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
#elif defined(__aarch64__)
  return vmaxvq_s32((int32x4_t)v);
#else
  int32_t best = v[0];
  for (int i = 1; i < W; i++) best = v[i] > best ? v[i] : best;
  return best;
#endif
}

// Whether some lane is true.
static inline bool any(vi mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) != 0;
#elif defined(__aarch64__)
  return vmaxvq_u32((uint32x4_t)mask) != 0;
#else
  return _mm_movemask_ps((__m128)mask) != 0;
#endif
}

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLeastExponent = -87.336544f;  // exp of less has no float of full precision

// exp of x - n ln 2: a polynomial of degree 6 (minimax on [-ln 2 / 2, ln 2 / 2], as in Cephes' expf).
static inline vf exp_of_rest(vf x, vf n) {
  vf r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r + 1.0f;
  return p * r + 1.0f;
}

// exp to 1 ulp or so: that polynomial times 2^n. Below -87.3 it is 0, above 88.7 infinity, NaN stays NaN.
static inline vf vexp(vf x) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  vf capped = vmin(splat(88.8f), x);
#if !defined(__AVX512F__)
  capped = vmax(splat(kLeastExponent), capped);
#endif
  vf n = (capped * kLog2e + magic) - magic;
  vf p = exp_of_rest(capped, n);
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(kLeastExponent), _CMP_NLT_UQ), (__m512)p, (__m512)n);
#else
  // 2^n put together by bits; as two factors, because 2^128 has no float of its own.
  vi k = __builtin_convertvector(n, vi);
  vi half = k >> 1;
  vf first = (vf)((half + 127) << 23);
  vf second = (vf)((k - half + 127) << 23);
  vf result = p * first * second;
  result = select(x < splat(kLeastExponent), vf{}, result);
  return select(x == x, result, x);
#endif
}

// The same of what is not above 0, in two thirds of the instructions.
static inline vf vexp_of_negative(vf x) {
#if defined(__AVX512F__)
  return vexp(x);
#else
  const vf magic = splat(12582912.0f), least = splat(kLeastExponent);
  vf capped = vmax(least, x);  // NaN stays
  vf n = capped * kLog2e + magic;
  vf p = exp_of_rest(capped, n - magic);
  // The lowest bits of n hold the integer.
  return select(x < least, vf{}, p * (vf)(((vi)n + 127) << 23));
#endif
}

static inline vf vtanh(vf x) { return 1.0f - 2.0f / (vexp(2.0f * x) + 1.0f); }

// --- a W x W transpose in registers: log2(W) rounds that exchange blocks of 1, 2, 4, ... -----------------------------------

template <int S>
static inline void exchange(vf& a, vf& b) {
  vi low, high;
  for (int j = 0; j < W; j++) {
    low[j] = (j & S) ? W + j - S : j;
    high[j] = (j & S) ? W + j : j + S;
  }
#if defined(__clang__)
  vf x, y;
  for (int j = 0; j < W; j++) {
    x[j] = (j & S) ? b[j - S] : a[j];
    y[j] = (j & S) ? b[j] : a[j + S];
  }
  a = x;
  b = y;
#else
  vf x = __builtin_shuffle(a, b, low), y = __builtin_shuffle(a, b, high);
  a = x;
  b = y;
#endif
}

template <int S>
static inline void transpose_round(vf (&rows)[W]) {
#pragma GCC unroll 16
  for (int i = 0; i < W; i++)
    if (!(i & S)) exchange<S>(rows[i], rows[i | S]);
}

static inline void transpose(vf (&rows)[W]) {
  transpose_round<1>(rows);
  transpose_round<2>(rows);
  if constexpr (W > 4) transpose_round<4>(rows);
  if constexpr (W > 8) transpose_round<8>(rows);
}

}  // namespace dt
