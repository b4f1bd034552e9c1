// Products of four bytes of an output, which are broadcast, with those of as many tokens as a vector has lanes: of four inputs each, or of
// two in words of 16 bits. With VNNI, or as AVX2 has them.
#pragma once
#include <cstring>

#include "simd.h"

#if defined(__AVX2__)

namespace dt {

constexpr int kWidth = W;                 // tokens in a panel
constexpr int kRows = W == 16 ? 4 : 6;    // outputs and
constexpr int kPanels = W == 16 ? 3 : 2;  // panels at once: sums, inputs and a weight fit the registers
constexpr int kMostOutputs = 48;          // in a chunk

static inline int panels_of(int tokens) { return (tokens + kWidth - 1) / kWidth; }

static inline vi same(int32_t x) {
#if defined(__AVX512F__)
  return (vi)_mm512_set1_epi32(x);
#else
  return (vi)_mm256_set1_epi32(x);
#endif
}

// Keeps sums in the order in which they are written: GCC adds integers in another, for which all products have to wait in memory.
static inline vi in_order(vi sums) {
  asm("" : "+x"(sums));
  return sums;
}

// Inputs, as bytes, are unsigned and weights are signed. kSumsWords: products of two and two of four bytes are summed in the words of a
// lane, and widened where those are full.
#if defined(__AVX512VNNI__)
constexpr bool kSumsWords = false;
static inline vi add_bytes(vi sums, vi x, vi w) { return (vi)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)x, (__m512i)w); }
static inline vi widened_words(vi sums) { return sums; }
static inline vi add_words(vi sums, vi x, vi w) { return (vi)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)x, (__m512i)w); }
#elif defined(__AVX512F__)
constexpr bool kSumsWords = true;
static inline vi add_bytes(vi sums, vi x, vi w) {
  return in_order((vi)_mm512_add_epi16((__m512i)sums, _mm512_maddubs_epi16((__m512i)x, (__m512i)w)));
}
static inline vi widened_words(vi sums) { return (vi)_mm512_madd_epi16((__m512i)sums, _mm512_set1_epi16(1)); }
static inline vi add_words(vi sums, vi x, vi w) { return in_order(sums + (vi)_mm512_madd_epi16((__m512i)x, (__m512i)w)); }
#elif defined(__AVXVNNI__)
constexpr bool kSumsWords = false;
static inline vi add_bytes(vi sums, vi x, vi w) { return (vi)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)x, (__m256i)w); }
static inline vi widened_words(vi sums) { return sums; }
static inline vi add_words(vi sums, vi x, vi w) { return (vi)_mm256_dpwssd_avx_epi32((__m256i)sums, (__m256i)x, (__m256i)w); }
#else
constexpr bool kSumsWords = true;
static inline vi add_bytes(vi sums, vi x, vi w) {
  return in_order((vi)_mm256_add_epi16((__m256i)sums, _mm256_maddubs_epi16((__m256i)x, (__m256i)w)));
}
static inline vi widened_words(vi sums) { return (vi)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(1)); }
static inline vi add_words(vi sums, vi x, vi w) { return in_order(sums + (vi)_mm256_madd_epi16((__m256i)x, (__m256i)w)); }
#endif

// Calls add(r, n, inputs, weights) for kSteps times four bytes of R outputs, `stride` bytes apart, and N panels, `panel_bytes` apart.
template <int R, int N, int kSteps, class Add>
static inline __attribute__((always_inline)) void each_step(const int8_t* w, size_t stride, const uint8_t* x, size_t panel_bytes,
                                                            const Add& add) {
#pragma GCC unroll 16
  for (int step = 0; step < kSteps; step++) {
    vi inputs[N];
#pragma GCC unroll 3
    for (int n = 0; n < N; n++) memcpy(&inputs[n], x + n * panel_bytes + step * sizeof(vi), sizeof(vi));
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
      int32_t four;
      memcpy(&four, w + r * stride + 4 * step, sizeof four);
      const vi weights = same(four);
#pragma GCC unroll 3
      for (int n = 0; n < N; n++) add(r, n, inputs[n], weights);
    }
  }
}

// dots[r][n] = starts[r * start_stride] + the products of kSteps times four bytes. Weights are of kBits with a sign.
template <int kBits, int R, int N, int kSteps>
static inline __attribute__((always_inline)) void byte_dots(const int8_t* w, size_t stride, const uint8_t* x, size_t panel_bytes,
                                                            const int32_t* starts, size_t start_stride, vi (&dots)[R][N]) {
  if constexpr (!kSumsWords) {
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 3
      for (int n = 0; n < N; n++) dots[r][n] = same(starts[r * start_stride]);
    each_step<R, N, kSteps>(w, stride, x, panel_bytes, [&](int r, int n, vi inputs, vi weights) __attribute__((always_inline)) {
      dots[r][n] = add_bytes(dots[r][n], inputs, weights);
    });
  } else {
    // Twice 255 times the largest weight, so many times, fits 16 bits.
    constexpr int kMost = 64 >> (kBits - 1), kPiece = kSteps < kMost ? kSteps : kMost;
    static_assert(kMost >= 1 && kSteps % kPiece == 0);
    for (int first = 0; first < kSteps; first += kPiece) {
      vi parts[R][N] = {};
      each_step<R, N, kPiece>(w + 4 * first, stride, x + first * sizeof(vi), panel_bytes,
                              [&](int r, int n, vi inputs, vi weights) __attribute__((always_inline)) {
                                parts[r][n] = add_bytes(parts[r][n], inputs, weights);
                              });
#pragma GCC unroll 6
      for (int r = 0; r < R; r++)
#pragma GCC unroll 3
        for (int n = 0; n < N; n++)
          dots[r][n] = (first == 0 ? same(starts[r * start_stride]) : dots[r][n]) + widened_words(parts[r][n]);
    }
  }
}

// dots[r][n] = the products of kSteps times two words.
template <int R, int N, int kSteps>
static inline __attribute__((always_inline)) void word_dots(const int8_t* w, size_t stride, const uint8_t* x, size_t panel_bytes,
                                                            vi (&dots)[R][N]) {
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 3
    for (int n = 0; n < N; n++) dots[r][n] = vi{};
  each_step<R, N, kSteps>(w, stride, x, panel_bytes, [&](int r, int n, vi inputs, vi weights) __attribute__((always_inline)) {
    dots[r][n] = add_words(dots[r][n], inputs, weights);
  });
}

}  // namespace dt

#endif
