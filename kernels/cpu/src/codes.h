// Numbers of 8 bits with a scale for a whole row: int8, and fp8 in the e4m3 form (no infinities; 448 is the largest).
//
// A row's scale is its largest absolute value divided by the largest code. The codes are those that drivetrain.pages writes, but
// where a number lies in the middle between two and the last bit of a product decides.
#pragma once
#include <cmath>

#include "nearest.h"

namespace dt {

struct fp8 {
  uint8_t bits;
};

template <class T>
constexpr bool is_code = false;
template <>
constexpr bool is_code<int8_t> = true;
template <>
constexpr bool is_code<fp8> = true;

// What a loaded code has to be multiplied by, beside its row's scale: fp8 comes 256 times too small (below).
template <class T>
constexpr float kUnit = 1.0f;
template <>
constexpr float kUnit<fp8> = 256.0f;

typedef int8_t vb_any __attribute__((vector_size(W), aligned(1), may_alias));
typedef uint8_t vub_any __attribute__((vector_size(W), aligned(1), may_alias));

static inline float get(const int8_t* p) { return float(*p); }

static inline vf load(const int8_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#elif defined(__aarch64__)
  return (vf)vcvtq_f32_s32(widened_signed(p));
#else
  return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const vb_any*>(p), vi), vf);
#endif
}

// Where half precision can be converted: sign, exponent and mantissa of e4m3 moved to their places in it are the number divided
// by 2^8, since the exponents' biases are 7 and 15; small numbers without a leading one come out right too. Elsewhere the same
// is done in float32, where the biases are 7 and 127: times 2^120, then divided by 2^8 like the others.
static inline vf load(const fp8* p) {
#if defined(__AVX512F__)
  __m256i wide = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 8);
  __m256i half = _mm256_and_si256(_mm256_srai_epi16(wide, 1), _mm256_set1_epi16(int16_t(0xbfff)));
  return (vf)_mm512_cvtph_ps(half);
#elif defined(__AVX2__)
  __m128i wide = _mm_slli_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))), 8);
  __m128i half = _mm_and_si128(_mm_srai_epi16(wide, 1), _mm_set1_epi16(int16_t(0xbfff)));
  return (vf)_mm256_cvtph_ps(half);
#elif defined(__aarch64__)
  int16x4_t wide = vreinterpret_s16_u16(vshl_n_u16(widened(p), 8));
  return (vf)vcvt_f32_f16(vreinterpret_f16_s16(vand_s16(vshr_n_s16(wide, 1), vdup_n_s16(int16_t(0xbfff)))));
#else
  vu bits = __builtin_convertvector(*reinterpret_cast<const vub_any*>(p), vu);
  vf number = (vf)(((bits & 0x80u) << 24) | ((bits & 0x7fu) << 20));
  return number * 0x1p112f;
#endif
}

static inline float get(const fp8* p) {
  uint32_t bits = (uint32_t(p->bits & 0x80u) << 24) | (uint32_t(p->bits & 0x7fu) << 20);
  float number;
  memcpy(&number, &bits, 4);
  return number * 0x1p112f;
}

template <class T>
constexpr float kLargestCode = 127.0f;
template <>
constexpr float kLargestCode<fp8> = 448.0f;

static inline int8_t code_of(float x, const int8_t*) {
  float sum = x + kRounder;
  int32_t bits;
  memcpy(&bits, &sum, 4);
  return x == x ? int8_t(bits & 0xff) : int8_t(0);
}

// Nearest, ties to even. From 2^-6 on the mantissa is rounded to three bits; below, the number is a multiple of 2^-9, which the
// addition of 2^14 rounds to.
static inline fp8 code_of(float x, const fp8*) {
  uint32_t bits, sign;
  memcpy(&bits, &x, 4);
  sign = bits >> 24 & 0x80u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return {uint8_t(0x7f)};
  if (bits >= 0x3c800000u) return {uint8_t(sign | (((bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20) - (120u << 3)))};
  float sum = fabsf(x) + 16384.0f;
  memcpy(&bits, &sum, 4);
  return {uint8_t(sign | (bits - 0x46800000u))};
}

static inline void encode_vector(vf x, int8_t* to) {
  vi bits = (vi)(x + splat(kRounder)) & (vi)(x == x);
  *reinterpret_cast<vb_any*>(to) = __builtin_convertvector(bits, vb_any);
}

static inline void encode_vector(vf x, fp8* to) {
  vu bits = (vu)x, sign = bits >> 24 & 0x80u;
  bits &= 0x7fffffffu;
  vu large = ((bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20) - (120u << 3);
  vu small = (vu)((vf)bits + splat(16384.0f)) - 0x46800000u;
  vu is_large = (vu)(bits >= 0x3c800000u), is_nan = (vu)(bits > 0x7f800000u);
  vu chosen = sign | (is_large & large) | (~is_large & small);
  chosen = (is_nan & 0x7fu) | (~is_nan & chosen);
  *reinterpret_cast<vub_any*>(to) = __builtin_convertvector(chosen, vub_any);
}

// Writes a row's codes and returns its scale, which is NaN where the row is not finite.
template <class T>
static inline float encode(const float* row, T* to, int size) {
  float largest = largest_of(row, size);
  if (largest < 0x1p-100f) largest = 0x1p-100f;
  float factor = kLargestCode<T> / largest;
  int i = 0;
  for (; i + W <= size; i += W) encode_vector(load(row + i) * factor, to + i);
  for (; i < size; i++) to[i] = code_of(row[i] * factor, to);
  return largest <= 0x1.fffffep127f ? largest / kLargestCode<T> : NAN;
}

}  // namespace dt
