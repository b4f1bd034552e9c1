// Products of int8 weights with many tokens where no VNNI of 512 bits multiplies bytes: weights and activations as words of 16 bits, of which
// AVX2 multiplies and adds pairs, twice as many an instruction as of float32. Two words of an output are broadcast, as four bytes are in
// group_tiles.cpp.
#include "rounded_tiles.h"

#if defined(__AVX2__) && !defined(__AVX512VNNI__)

#include "chunk.h"
#include "formats.h"
#include "fours.h"
#include "nearest.h"
#include "pool.h"

namespace dt {
namespace {

constexpr int kUnit = 16;                 // pairs of inputs that a row is a whole number of
constexpr size_t kPad = 64;               // bytes, so that rows do not start on the same cache set

// Pairs of inputs whose products with int8 fit 32 bits: of activations of 8 and of 16 bits.
constexpr int kMostPairs[] = {32768, 256};
constexpr float kMost[] = {127.0f, 32600.0f};

static inline int pairs_of_row(int size) { return (size + 2 * kUnit - 1) / (2 * kUnit) * kUnit; }
// int8 as words, zeros behind the row's end.
static void widen(const int8_t* from, int size, int pairs, int8_t* out) {
  int16_t* to = reinterpret_cast<int16_t*>(out);
  int k = 0;
  for (; k + 16 <= size; k += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k), _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + k))));
  for (; k < 2 * pairs; k++) to[k] = k < size ? from[k] : 0;
}

// Sums of R outputs and N panels times the unit of the activations, [R, N * kWidth].
template <int R, int N>
static void multiply(const int8_t* w, size_t stride, const Tiled& x, int panel, float* out) {
  const int pairs = pairs_of_row(x.size), most = kMostPairs[x.digits - 1];
  const size_t panel_bytes = size_t(pairs) * kWidth * 4;
  const uint8_t* in = reinterpret_cast<const uint8_t*>(x.tiles) + panel * panel_bytes;
  vf sums[R][N] = {};
  for (int first = 0; first < pairs; first += most) {
    const int end = pairs - first < most ? pairs : first + most;
    vi dots[R][N] = {};
    for (int at = first; at < end; at += kUnit)
      each_step<R, N, kUnit>(w + 4 * at, stride, in + size_t(at) * sizeof(vi), panel_bytes,
                             [&](int r, int n, vi inputs, vi weights) __attribute__((always_inline)) {
                               dots[r][n] = add_words(dots[r][n], inputs, weights);
                             });
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 3
      for (int n = 0; n < N; n++) sums[r][n] += __builtin_convertvector(dots[r][n], vf);
  }
#pragma GCC unroll 3
  for (int n = 0; n < N; n++) {
    const vf unit = load(x.scales + (panel + n) * kWidth);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) store(out + (r * N + n) * W, sums[r][n] * unit);
  }
}

template <int N>
static void some_panels(const int8_t* w, size_t stride, int count, const Tiled& x, int panel, float* out) {
  int r = 0;
  for (; r + kRows <= count; r += kRows) multiply<kRows, N>(w + r * stride, stride, x, panel, out + r * N * W);
  for (; r < count; r++) multiply<1, N>(w + r * stride, stride, x, panel, out + r * N * W);
}

static void some_outputs(const Tiled& x, const Matrix& m, const Sink& sink, int first, int count) {
  static thread_local Scratch scratch;
  const int pairs = pairs_of_row(m.cols), panels = panels_of(x.num_tokens);
  const size_t stride = size_t(pairs) * 4 + kPad;
  int8_t* words = reinterpret_cast<int8_t*>(scratch.reserve(count * stride / 4));
  float scales[kMostOutputs];
  for (int o = 0; o < count; o++) {
    widen(static_cast<const int8_t*>(m.weight) + size_t(first + o) * m.stride, m.cols, pairs, words + o * stride);
    scales[o] = scale_at(m.scales, m.scale_format, first + o);
  }
  alignas(64) float out[kMostOutputs * kPanels * kWidth];
  for (int p = 0; p < panels; p += kPanels) {
    const int number = panels - p < kPanels ? panels - p : kPanels, left = x.num_tokens - p * kWidth, width = number * kWidth;
    auto run = number == 1 ? some_panels<1> : number == 2 ? some_panels<2> : some_panels<kPanels>;
    run(words, stride, count, x, p, out);
    for (int o = 0; o < count; o++)
      for (int t = 0; t < width; t += W) store(out + o * width + t, load(out + o * width + t) * scales[o]);
    turn(out, count, width, left < width ? left : width, m.bias ? m.bias + first : nullptr,
         [&](int t, int o, auto value) { sink.put(p * kWidth + t, first + o, value); });
  }
}

}  // namespace

size_t tiled_floats(int num_tokens, int size) {
  return size_t(panels_of(num_tokens)) * (size_t(pairs_of_row(size)) * kWidth + kWidth);
}

Tiled tile_rows(const float* rows, size_t stride, int num_tokens, int size, int digits, float* space) {
  const int panels = panels_of(num_tokens), pairs = pairs_of_row(size);
  int32_t* tiles = reinterpret_cast<int32_t*>(space);
  float* scales = space + size_t(panels) * pairs * kWidth;
  parallel(panels, [&](int panel, int) {
    int32_t* out = tiles + size_t(panel) * pairs * kWidth;
    vf by[kWidth];
    for (int t = 0; t < kWidth; t++) {
      const bool is_there = panel * kWidth + t < num_tokens;
      const float largest = is_there ? largest_of(rows + (size_t(panel) * kWidth + t) * stride, size) : 0.0f;
      scales[panel * kWidth + t] = largest / kMost[digits - 1];
      by[t] = splat(largest == 0 ? 1.0f : scales[panel * kWidth + t]);
    }
    // W inputs of W tokens: each pair of them in a lane of its token.
    for (int k = 0; k < 2 * pairs; k += W) {
      vf block[W];
      for (int t = 0; t < W; t++) {
        const float* row = rows + (size_t(panel) * kWidth + t) * stride;
        const bool is_there = panel * kWidth + t < num_tokens && k < size;
        vf values{};
        if (is_there && k + W <= size)
          values = load(row + k);
        else if (is_there)
          memcpy(&values, row + k, size_t(size - k) * 4);
        block[t] = values / by[t];
      }
      transpose(block);
      for (int i = 0; i < W; i += 2) {
        auto word = [&](int at) { return (vu)__builtin_convertvector(nearest(block[at]), vi); };
        const vu words = (word(i) & 0xffffu) | word(i + 1) << 16;
        memcpy(out + size_t((k + i) / 2) * kWidth, &words, sizeof words);
      }
    }
  });
  return Tiled{num_tokens, size, digits, reinterpret_cast<const int8_t*>(tiles), scales};
}

void matmul(const Tiled& x, const Matrix* matrices, const Sink* sinks, int count) {
  int total = 0;
  for (int i = 0; i < count; i++) total += (matrices[i].rows + kMostOutputs - 1) / kMostOutputs;
  parallel(total, [&](int chunk, int) {
    int which = 0;
    for (int chunks; chunk >= (chunks = (matrices[which].rows + kMostOutputs - 1) / kMostOutputs); which++) chunk -= chunks;
    const Matrix& m = matrices[which];
    const int first = chunk * kMostOutputs, left = m.rows - first;
    some_outputs(x, m, sinks[which], first, left < kMostOutputs ? left : kMostOutputs);
  });
}

}  // namespace dt

#endif
