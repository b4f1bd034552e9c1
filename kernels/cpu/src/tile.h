// The register tiles of products with many columns: out[R, tokens] (+)= weights[R, size] x[size, tokens], and of those with rows
// that are too few to lie side by side.
#pragma once
#include <cstddef>
#include <type_traits>

#include "ahead.h"
#include "simd.h"

namespace dt {

// Outputs in a tile with two vectors and with one vector of tokens: sums, a row of x and a broadcast weight fit the registers,
// and there are enough sums to hide the latency of a multiply-add.
constexpr int kTile2 = kRegisters == 32 ? 12 : 6;
constexpr int kTile1 = 12;

constexpr int kAhead = 128;  // floats that are asked for before they are needed: 384 to 1,024 bytes measured alike

// Weight (r, k) is at w[r * row_step + k * step], and dense rows have a step of 1; x and out are packed, N * W tokens a row.
// kAdds: to what is at out, times keep[tokens]. kFetches: the weights come from memory, in order. kPairs: w and x are pairs of bf16
// (pairs_of), and steps and size count pairs. kAsks: for what comes next, meanwhile.
template <int R, int N, bool kAdds, bool kIsDense, bool kFetches, bool kPairs, bool kAsks>
static inline void tile(const float* w, size_t row_step, size_t step, const float* x, int size, float* __restrict out,
                        const float* keep, Ahead::Share* ahead) {
  const char* next = kAsks ? ahead->at : nullptr;
  const char* next_end = kAsks ? ahead->end : nullptr;
  auto ask = [&]() __attribute__((always_inline)) {
    if (!kAsks || next >= next_end) return;
#pragma GCC unroll 4
    for (int i = 0; i < kAheadLines; i++) __builtin_prefetch(next + 64 * i, 0, 2);
    next += 64 * kAheadLines;
  };
  vf sums[R][N];
#pragma GCC unroll 24
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int n = 0; n < N; n++) sums[r][n] = kAdds ? load(out + (r * N + n) * W) * load(keep + n * W) : vf{};
  // Three rows share a pointer, so that all pointers of a tile stay in registers: a processor adds once or twice the row step
  // while it forms an address.
  constexpr int kPointers = (R + 2) / 3;
  const char* rows[kPointers];
  const size_t row_bytes = row_step * 4, step_bytes = step * 4;
#pragma GCC unroll 8
  for (int i = 0; i < kPointers; i++) rows[i] = reinterpret_cast<const char*>(w) + 3 * i * row_bytes;
  auto multiply = [&](size_t ahead) __attribute__((always_inline)) {
    vf row[N];
#pragma GCC unroll 2
    for (int n = 0; n < N; n++) row[n] = load(x + n * W);
    x += N * W;
#pragma GCC unroll 24
    for (int r = 0; r < R; r++) {
      vf weight = splat(*reinterpret_cast<const float*>(rows[r / 3] + r % 3 * row_bytes + ahead));
#pragma GCC unroll 2
      for (int n = 0; n < N; n++) sums[r][n] = kPairs ? add_pairs(sums[r][n], weight, row[n]) : sums[r][n] + weight * row[n];
    }
  };
  int k = 0;
  if (kIsDense) {
    if (kFetches) {
      // Rows are short, and the processor's own prefetching starts anew with each: ask for what each pointer will reach next,
      // which behind the end of a row is the same row of the next tile.
      for (; k + 16 <= size; k += 16) {
        size_t ahead = k + kAhead < size ? kAhead * 4 : R * row_bytes + (kAhead - size) * 4;
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
          multiply(16 * i);
          multiply(16 * i + 4);
          multiply(16 * i + 8);
          multiply(16 * i + 12);
          ask();
          if (i < kPointers) {
            __builtin_prefetch(rows[i] + ahead);
            __builtin_prefetch(rows[i] + row_bytes + ahead);
            __builtin_prefetch(rows[i] + 2 * row_bytes + ahead);
          }
        }
#pragma GCC unroll 8
        for (int i = 0; i < kPointers; i++) rows[i] += 64;
      }
    }
    for (; k + 4 <= size; k += 4) {
      multiply(0);
      multiply(4);
      multiply(8);
      multiply(12);
      ask();
#pragma GCC unroll 8
      for (int i = 0; i < kPointers; i++) rows[i] += 16;
    }
  }
  for (; k < size; k++) {
    multiply(0);
#pragma GCC unroll 8
    for (int i = 0; i < kPointers; i++) rows[i] += step_bytes;
  }
#pragma GCC unroll 24
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int n = 0; n < N; n++) store(out + (r * N + n) * W, sums[r][n]);
  if (kAsks) ahead->at = next;
}

// Rows of x in a tile of dot products with 4 outputs: sums, 4 weights and a row of x fit the registers.
constexpr int kTileRows = kRegisters == 32 ? 6 : 2;

static inline vf load_part(const float* p, int count) {
  vf v{};
  memcpy(&v, p, size_t(count) * 4);
  return v;
}

// sums[r][m] = the products of weights w + r * row_step with x + m * size, `size` floats each, to be summed across.
// A panel has brought the weights into the cache. kPairs: as above.
template <int R, int M, bool kPairs>
static inline void row_tile(const float* w, size_t row_step, const float* x, int size, vf (&sums)[R][M]) {
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) sums[r][m] = vf{};
  const size_t row_bytes = row_step * 4;
  const char* rows[(R + 2) / 3];
#pragma GCC unroll 2
  for (int i = 0; i < (R + 2) / 3; i++) rows[i] = reinterpret_cast<const char*>(w) + 3 * i * row_bytes;
  auto multiply = [&](int k, const auto& read) __attribute__((always_inline)) {
    vf weights[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) weights[r] = read(reinterpret_cast<const float*>(rows[r / 3] + r % 3 * row_bytes) + k);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      vf row = read(x + size_t(m) * size + k);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) sums[r][m] = kPairs ? add_pairs(sums[r][m], weights[r], row) : sums[r][m] + weights[r] * row;
    }
  };
  int k = 0;
  for (; k + W <= size; k += W) multiply(k, [](const float* p) __attribute__((always_inline)) { return load(p); });
  if (k < size) multiply(k, [&](const float* p) __attribute__((always_inline)) { return load_part(p, size - k); });
}

template <int N, bool kAdds = false, bool kIsDense = true, bool kFetches = false, bool kPairs = false>
static void tiles(const float* w, size_t row_step, size_t step, int count, const float* x, int size, float* out,
                  const float* keep, Ahead::Share* ahead) {
  constexpr int kFull = N == 2 ? kTile2 : kTile1;
  int r = 0;
  auto run = [&](auto rows) {
    constexpr int R = decltype(rows)::value;
    for (; r + R <= count; r += R) {
      const float* rows = w + r * row_step;
      float* to = out + r * N * W;
      if constexpr (R == kFull && N == 2 && kIsDense && !kAdds)
        if (ahead && ahead->has_more()) {
          tile<R, N, kAdds, kIsDense, kFetches, kPairs, true>(rows, row_step, step, x, size, to, keep, ahead);
          continue;
        }
      tile<R, N, kAdds, kIsDense, kFetches, kPairs, false>(rows, row_step, step, x, size, to, keep, nullptr);
    }
  };
  run(std::integral_constant<int, kFull>());
  run(std::integral_constant<int, 4>());
  run(std::integral_constant<int, 1>());
}

}  // namespace dt
