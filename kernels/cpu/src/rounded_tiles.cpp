// Products of int8 weights with many tokens, 16 rows of 64 bytes at a time, read where they lie: on the matrix unit (AMX), or with VNNI by
// four weights of an output, which are broadcast, times the same inputs of 16 tokens.
//
// Activations are int8 (linear_w8a8), or, where they keep their 24 bits, three digits of 256 with a sign:
//   x = (65536 a + 256 b + c) * step,  step = max(|x|) / 8355000 of the row (a little less than three digits of 127)
// so that every number is within half of 2^-23 of the row's largest, and all products and sums are exact. Two digits keep 16 bits alike.
#include "rounded_tiles.h"

#if defined(__AMX_INT8__) || defined(__AVX512VNNI__)

#include "chunk.h"
#include "formats.h"
#include "pool.h"
#if defined(__AMX_INT8__)
#include "unit.h"
#endif

namespace dt {
namespace {

static_assert(W == 16);

constexpr int kRows = 16;     // outputs in a tile
constexpr int kDeep = 64;     // inputs in a tile
constexpr int kWidth = 16;    // tokens in a tile
constexpr int kTile = 1024;   // bytes
constexpr int kColumns = 3;   // tiles of activations that a tile of weights is multiplied with at once

#if defined(__AMX_INT8__)
constexpr bool kIsMoved = false;
using Unit = Holds;

static void starts_of(const int8_t*, size_t, int, int32_t*) {}

// Tiles: sums 0 to 2, weights 3, activations 4 to 6.

// Sums of 16 outputs and N tiles of tokens: out[N][16 outputs][16 tokens]. start: what sums of an output begin with.
template <int N>
static void multiply(const int8_t* w, size_t row_bytes, const int32_t*, const int8_t* fetch, size_t fetch_bytes, const int8_t* x,
                     size_t x_step, size_t x_column, int steps, int32_t* out) {
  asm volatile("tilezero %tmm0");
  if constexpr (N > 1) asm volatile("tilezero %tmm1");
  if constexpr (N > 2) asm volatile("tilezero %tmm2");
  for (int s = 0; s < steps; s++) {
    load_tile<3>(w + s * kDeep, row_bytes);
    load_tile<4>(x + s * x_step, kDeep);
    asm volatile("tdpbssd %tmm4, %tmm3, %tmm0");
    if constexpr (N > 1) {
      load_tile<5>(x + s * x_step + x_column, kDeep);
      asm volatile("tdpbssd %tmm5, %tmm3, %tmm1");
    }
    if constexpr (N > 2) {
      load_tile<6>(x + s * x_step + 2 * x_column, kDeep);
      asm volatile("tdpbssd %tmm6, %tmm3, %tmm2");
    }
    if (fetch)
      for (int r = 0; r < kRows; r++) _mm_prefetch(fetch + r * fetch_bytes + s * kDeep, _MM_HINT_T1);
  }
  asm volatile("tilestored %%tmm0, (%0,%1,1)" ::"r"(out), "r"(size_t(kDeep)) : "memory");
  if constexpr (N > 1) asm volatile("tilestored %%tmm1, (%0,%1,1)" ::"r"(out + 256), "r"(size_t(kDeep)) : "memory");
  if constexpr (N > 2) asm volatile("tilestored %%tmm2, (%0,%1,1)" ::"r"(out + 512), "r"(size_t(kDeep)) : "memory");
}
#else
// VNNI multiplies unsigned bytes by signed ones: digits are moved up by 128, and 128 times the sum of an output's weights is taken off.
constexpr bool kIsMoved = true;
struct Unit {
  ~Unit() {}  // so that one that is only declared is no unused variable
};

static void starts_of(const int8_t* w, size_t row_bytes, int steps, int32_t* start) {
  const __m512i ones = _mm512_set1_epi8(1);
  for (int r = 0; r < kRows; r++) {
    __m512i sums = _mm512_setzero_si512();
    for (int s = 0; s < steps; s++) sums = _mm512_dpbusd_epi32(sums, ones, _mm512_loadu_si512(w + r * row_bytes + s * kDeep));
    start[r] = -128 * _mm512_reduce_add_epi32(sums);
  }
}

constexpr int kHalf = 8;  // outputs whose sums, inputs and a weight fit the registers

template <int N>
static void multiply(const int8_t* w, size_t row_bytes, const int32_t* start, const int8_t* fetch, size_t fetch_bytes, const int8_t* x,
                     size_t x_step, size_t x_column, int steps, int32_t* out) {
  for (int first = 0; first < kRows; first += kHalf) {
    __m512i sums[kHalf][N];
#pragma GCC unroll 8
    for (int r = 0; r < kHalf; r++)
#pragma GCC unroll 3
      for (int n = 0; n < N; n++) sums[r][n] = _mm512_set1_epi32(start[first + r]);
    const int8_t* rows[3];  // each of three rows, as in tile.h
    for (int i = 0; i < 3; i++) rows[i] = w + (first + 3 * i) * row_bytes;
    for (int s = 0; s < steps; s++) {
      const int8_t* in = x + s * x_step;
#pragma GCC unroll 4
      for (int four = 0; four < kDeep / 4; four++) {
        __m512i inputs[N];
#pragma GCC unroll 3
        for (int n = 0; n < N; n++) inputs[n] = _mm512_load_si512(in + n * x_column + 64 * four);
#pragma GCC unroll 8
        for (int r = 0; r < kHalf; r++) {
          int32_t weights;
          memcpy(&weights, rows[r / 3] + r % 3 * row_bytes + 4 * four, sizeof weights);
#pragma GCC unroll 3
          for (int n = 0; n < N; n++) sums[r][n] = _mm512_dpbusd_epi32(sums[r][n], inputs[n], _mm512_set1_epi32(weights));
        }
      }
      for (const int8_t*& row : rows) row += kDeep;
      if (fetch)
        for (int r = 0; r < kHalf; r++) _mm_prefetch(fetch + (first + r) * fetch_bytes + s * kDeep, _MM_HINT_T1);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kHalf; r++)
#pragma GCC unroll 3
      for (int n = 0; n < N; n++) _mm512_store_si512(out + n * 256 + (first + r) * kWidth, sums[r][n]);
  }
}
#endif

static inline int steps_of(int size) { return (size + kDeep - 1) / kDeep; }
static inline int panels_of(int tokens) { return (tokens + kWidth - 1) / kWidth; }

// Sums of one panel, with their scales, as rows of tokens.
static void put_panel(const Tiled& x, const Matrix& m, const Sink& sink, int first, int count, int panel, const int32_t* sums) {
  const vf steps = load(x.scales + panel * kWidth);
  const int tokens = x.num_tokens - panel * kWidth < kWidth ? x.num_tokens - panel * kWidth : kWidth;
  vf rows[W];
  for (int o = 0; o < kRows; o++) {
    auto sum = [&](int digit) {
      vi whole;
      memcpy(&whole, sums + digit * 256 + o * kWidth, sizeof whole);
      return __builtin_convertvector(whole, vf);
    };
    vf value = sum(x.digits - 1);
    float unit = 256;
    for (int digit = x.digits - 2; digit >= 0; digit--, unit *= 256) value = sum(digit) * unit + value;
    rows[o] = o < count ? value * steps * scale_at(m.scales, m.scale_format, first + o) + (m.bias ? m.bias[first + o] : 0.0f) : vf{};
  }
  transpose(rows);
  for (int t = 0; t < tokens; t++) {
    if (count == kRows) {
      sink.put(panel * kWidth + t, first, rows[t]);
    } else {
      for (int o = 0; o < count; o++) sink.put(panel * kWidth + t, first + o, rows[t][o]);
    }
  }
}

static void some_outputs(const Tiled& x, const Matrix& m, const Sink& sink, int first, int count, bool has_next) {
  static thread_local Scratch copied;
  const int steps = steps_of(m.cols), panels = panels_of(x.num_tokens);
  const int8_t* w = static_cast<const int8_t*>(m.weight) + size_t(first) * m.stride;
  const int8_t* fetch = has_next ? w + size_t(kRows) * m.stride : nullptr;
  size_t row_bytes = m.stride;
  if (count < kRows || m.cols % kDeep != 0) {  // what fills no tile
    int8_t* copy = reinterpret_cast<int8_t*>(copied.reserve(size_t(steps) * kTile / 4));
    memset(copy, 0, size_t(steps) * kTile);
    for (int r = 0; r < count; r++) memcpy(copy + size_t(r) * steps * kDeep, w + size_t(r) * m.stride, m.cols);
    w = copy;
    row_bytes = size_t(steps) * kDeep;
  }
  const size_t x_step = size_t(x.digits) * kTile, panel_bytes = steps * x_step;
  int32_t start[kRows];
  starts_of(w, row_bytes, steps, start);
  alignas(64) int32_t sums[kColumns * 256];
  // The tiles of columns are of one panel's digits, or of panels with one digit each.
  const int at_once = x.digits == 1 ? kColumns : 1;
  const size_t column_bytes = x.digits == 1 ? panel_bytes : kTile;
  for (int p = 0; p < panels; p += at_once) {
    const int columns = x.digits > 1 ? x.digits : panels - p < kColumns ? panels - p : kColumns;
    auto run = columns == 1 ? multiply<1> : columns == 2 ? multiply<2> : multiply<3>;
    run(w, row_bytes, start, p == 0 ? fetch : nullptr, m.stride, x.tiles + p * panel_bytes, x_step, column_bytes, steps, sums);
    if (x.digits > 1) {
      put_panel(x, m, sink, first, count, p, sums);
    } else {
      for (int c = 0; c < columns; c++) put_panel(x, m, sink, first, count, p + c, sums + c * 256);
    }
  }
}

static vf largest_of(const float* row, int size, float& found) {
  vf best = {};
  __mmask16 is_nan = 0;
  for (int k = 0; k < size; k += W) {
    __mmask16 mask = size - k >= W ? 0xffff : (1 << (size - k)) - 1;
    __m512 now = _mm512_abs_ps(_mm512_maskz_loadu_ps(mask, row + k));
    is_nan |= _mm512_cmp_ps_mask(now, now, _CMP_UNORD_Q);
    best = (vf)_mm512_max_ps((__m512)best, now);
  }
  found = is_nan ? __builtin_nanf("") : _mm512_reduce_max_ps((__m512)best);
  return best;
}

// Inputs k .. k + 63 of a token as a row of 64 bytes for each digit.
static inline void digits_of(const float* row, int k, int size, vf scale, int digits, __m512i* out) {
  __m128i parts[kColumns][4];
  for (int i = 0; i < 4; i++) {
    const int left = size - k - i * W;
    const __mmask16 mask = left >= W ? 0xffff : left > 0 ? (1 << left) - 1 : 0;
    vf x = (vf)_mm512_maskz_loadu_ps(mask, row + k + i * W);
    vi q = (vi)_mm512_cvtps_epi32((__m512)(x / scale));
    for (int d = digits - 1; d >= 0; d--) {
      vi digit = d > 0 ? ((q + 128) & 255) - 128 : q;
      q = (q - digit) >> 8;
      parts[d][i] = _mm512_cvtepi32_epi8((__m512i)(kIsMoved ? digit + 128 : digit));
    }
  }
  for (int d = 0; d < digits; d++) {
    __m512i all = _mm512_castsi128_si512(parts[d][0]);
    all = _mm512_inserti32x4(all, parts[d][1], 1);
    all = _mm512_inserti32x4(all, parts[d][2], 2);
    out[d] = _mm512_inserti32x4(all, parts[d][3], 3);
  }
}

}  // namespace

size_t tiled_floats(int num_tokens, int size) {
  return size_t(panels_of(num_tokens)) * (size_t(steps_of(size)) * kColumns * kTile / 4 + kWidth);
}

Tiled tile_rows(const float* rows, size_t stride, int num_tokens, int size, int digits, float* space) {
  const int panels = panels_of(num_tokens), steps = steps_of(size);
  const size_t panel_bytes = size_t(steps) * digits * kTile;
  int8_t* tiles = reinterpret_cast<int8_t*>(space);
  float* scales = space + panels * panel_bytes / 4;
  const float most = digits == 1 ? 127.0f : digits == 2 ? 32600.0f : 8355000.0f;
  parallel(panels, [&](int panel, int) {
    const float* in = rows + size_t(panel) * kWidth * stride;
    const int tokens = num_tokens - panel * kWidth < kWidth ? num_tokens - panel * kWidth : kWidth;
    vf by[kWidth];
    for (int t = 0; t < kWidth; t++) {
      float largest = 0;
      if (t < tokens) largest_of(in + t * stride, size, largest);
      scales[panel * kWidth + t] = largest / most;
      by[t] = splat(largest == 0 ? 1.0f : largest / most);
    }
    for (int s = 0; s < steps; s++) {
      vf block[kColumns][W] = {};
      for (int t = 0; t < tokens; t++) {
        __m512i found[kColumns];
        digits_of(in + t * stride, s * kDeep, size, by[t], digits, found);
        for (int d = 0; d < digits; d++) block[d][t] = (vf)found[d];
      }
      for (int d = 0; d < digits; d++) {
        transpose(block[d]);
        float* to = reinterpret_cast<float*>(tiles + panel * panel_bytes + (size_t(s) * digits + d) * kTile);
        for (int i = 0; i < W; i++) store(to + i * W, block[d][i]);
      }
    }
  });
  return Tiled{num_tokens, size, digits, tiles, scales};
}

void matmul(const Tiled& x, const Matrix* matrices, const Sink* sinks, int count) {
  int size = few_rows_at_a_time(matrices, count), total = 0;
  for (int i = 0; i < count; i++) total += (matrices[i].rows + size - 1) / size;
  parallel(total, [&](int chunk, int) {
    int which = 0;
    for (int chunks; chunk >= (chunks = (matrices[which].rows + size - 1) / size); which++) chunk -= chunks;
    const Matrix& m = matrices[which];
    int begin = chunk * size, end = begin + size < m.rows ? begin + size : m.rows;
    Unit unit;
    for (int first = begin; first < end; first += kRows)
      some_outputs(x, m, sinks[which], first, end - first < kRows ? end - first : kRows, first + 2 * kRows <= end);
  });
}

}  // namespace dt

#endif
