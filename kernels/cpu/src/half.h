// Numbers of float16, one and W at a time.
#pragma once
#include "simd.h"

namespace dt {

struct f16 {
  uint16_t bits;
};

static inline float half_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#elif defined(__aarch64__)
  __fp16 half;
  memcpy(&half, &h, 2);
  return half;
#else
  uint32_t size = h & 0x7fffu, bits = size << 13;
  float f;
  memcpy(&f, &bits, 4);
  f *= 5.192296858534828e33f;  // 2^112: the difference of the two exponents' biases
  memcpy(&bits, &f, 4);
  if (size >= 0x7c00u) bits = 0x7f800000u | (size & 0x3ffu) << 13;
  bits |= uint32_t(h & 0x8000u) << 16;
  memcpy(&f, &bits, 4);
  return f;
#endif
}

// Nearest, ties to even; what is too large becomes infinity, a NaN stays one.
static inline uint16_t float_to_half(float f) {
#if defined(__F16C__)
  return uint16_t(_cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  __fp16 half = f;
  uint16_t h;
  memcpy(&h, &half, 2);
  return h;
#else
  uint32_t bits;
  memcpy(&bits, &f, 4);
  const uint32_t sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (bits >= 0x47800000u) return uint16_t(sign | 0x7c00u);  // 65536 and above
  if (bits < 0x38800000u) {                                   // below 2^-14: multiples of 2^-24, which adding 1/2 rounds to
    float size;
    memcpy(&size, &bits, 4);
    size += 0.5f;
    memcpy(&bits, &size, 4);
    return uint16_t(sign | (bits - 0x3f000000u));
  }
  return uint16_t(sign | ((bits + 0xfffu + (bits >> 13 & 1u) - 0x38000000u) >> 13));
#endif
}

static inline float get(const f16* p) { return half_to_float(p->bits); }
static inline void put(f16* p, float x) { p->bits = float_to_half(x); }

static inline vf load(const f16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__) && defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__aarch64__)
  return (vf)vcvt_f32_f16(vld1_f16(reinterpret_cast<const __fp16*>(p)));
#else
  vf v;
  for (int i = 0; i < W; i++) v[i] = get(p + i);
  return v;
#endif
}

static inline void store(f16* p, vf v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__) && defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  vst1_f16(reinterpret_cast<__fp16*>(p), vcvt_f16_f32((float32x4_t)v));
#else
  for (int i = 0; i < W; i++) put(p + i, v[i]);
#endif
}

}  // namespace dt
