// Four bytes of an output's weights are broadcast and multiplied with the same inputs of some tokens, as in rounded_tiles.cpp. After each
// atom, or each half of one where a format has a scale for 16 inputs, the sums become floats with the scales of both sides.
#include "group_tiles.h"

#if defined(__AVX2__) && !defined(__AMX_INT8__)

#include "chunk.h"
#include "fours.h"
#include "groups.h"
#include "packed.h"
#include "pool.h"
#include "rounded.h"

namespace dt {
namespace {

constexpr int kCodeBytes = 256 << 10;     // of codes of a chunk, so that they and the inputs of some panels stay in the second cache

// Weights of some outputs as signed bytes or words in the order of inputs, and what goes with each run of inputs that has a scale.
struct Codes {
  static constexpr size_t kPad = 64;  // so that rows do not start on the same cache set
  int runs;                           // of an output: scales
  size_t stride, run_stride;          // bytes, numbers
  int8_t* codes;
  float *scales, *mins;
  int32_t* starts;  // what sums of bytes begin with, since inputs are moved up by 128

  static size_t floats(int outputs, int row_bytes, int cols) {
    return size_t(outputs) * ((row_bytes + kPad) / 4 + 3 * (cols / 16 + kWidth));
  }
  Codes(float* space, int outputs, int row_bytes, int number_of_runs)
      : runs(number_of_runs), stride(row_bytes + kPad), run_stride(size_t(number_of_runs + kWidth - 1) / kWidth * kWidth) {
    codes = reinterpret_cast<int8_t*>(space);
    scales = space + outputs * stride / 4;
    mins = scales + outputs * run_stride;
    starts = reinterpret_cast<int32_t*>(mins + outputs * run_stride);
  }
};

// An atom's codes as bytes and, of each half, -128 times their sum.
static inline void put_atom(v32u values, int centre, int8_t* codes, int32_t (&starts)[2]) {
  const __m256i signed_codes = _mm256_sub_epi8((__m256i)values, _mm256_set1_epi8(char(centre)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), signed_codes);
  const __m256i sums = _mm256_sad_epu8((__m256i)values, _mm256_setzero_si256());
  const __m256i halves = _mm256_add_epi64(sums, _mm256_unpackhi_epi64(sums, sums));
  for (int half = 0; half < 2; half++) {
    const int sum = half ? _mm256_extract_epi32(halves, 4) : _mm256_extract_epi32(halves, 0);
    starts[half] = -128 * (sum - 16 * centre);
  }
}

// An atom's codes, which are signed already, as words.
static inline void put_words(v32u values, int8_t* codes) {
  __m256i* to = reinterpret_cast<__m256i*>(codes);
  _mm256_storeu_si256(to, _mm256_cvtepi8_epi16(_mm256_castsi256_si128((__m256i)values)));
  _mm256_storeu_si256(to + 1, _mm256_cvtepi8_epi16(_mm256_extracti128_si256((__m256i)values, 1)));
}

// How a format's codes, scales and minima are read: weight = scale * (code - centre) + min. kInputs: that have the same scale.
// kBits: of a code. kMoves: the centre is ours, so that sums of words hold more products, and minima have to make up for it.
struct GroupsOf4 {
  static constexpr int kInputs = kAtom, kBits = 4, kCentre = kSumsWords ? 8 : 0;
  static constexpr bool kMoves = kSumsWords, kIsWide = false;
  static constexpr bool kHasMins = true;
  const Matrix& m;
  const Groups groups;
  explicit GroupsOf4(const Matrix& m) : m(m), groups(m) {}
  static inline v32u values_at(const uint8_t* row, int atom) {
    const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + atom * (kAtom / 2))), nibble = _mm_set1_epi8(15);
    const __m128i even = _mm_and_si128(both, nibble), odd = _mm_and_si128(_mm_srli_epi16(both, 4), nibble);
    return (v32u)_mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
  }
  void scales_at(int o, const uint8_t*, int first, int count, float* scales, float* mins) const {
    group_scales(m, groups, m.scales, o, first, count, scales);
    group_mins(m, groups, o, first, count, scales, mins);
  }
};

template <int T>
struct BlocksOf {
  static constexpr bool kIsWide = T == kQ8_0 && kSumsWords;
  static constexpr bool kHasMins = T == kQ4_1 || T == kQ5_1 || T == kQ4_K || T == kQ5_K, kMoves = kHasMins && kSumsWords;
  static constexpr int kInputs = T == kQ6_K ? kAtom / 2 : kAtom;
  static constexpr int kBits = T == kQ8_0 ? 8 : T == kQ6_K ? 6 : T == kQ5_0 || T == kQ5_1 || T == kQ5_K ? 5 : 4;
  static constexpr int kCentre = kIsWide || (kHasMins && !kMoves) ? 0 : 1 << (kBits - 1);
  explicit BlocksOf(const Matrix&) {}
  static inline v32u values_at(const uint8_t* row, int atom) {
    const v32u found = values<T>(row, atom);
    return T == kQ8_0 && !kIsWide ? found ^ 0x80 : found;
  }
  void scales_at(int, const uint8_t* row, int first, int count, float* scales, float* mins) const {
    atom_scales<T>(row, first, count, scales, mins);
  }
};

// Bytes of so many inputs.
template <class F>
constexpr int bytes_of(int inputs) {
  return F::kIsWide ? 2 * inputs : inputs;
}

template <class F>
static void decode(const Matrix& m, int first, int count, const Codes& to) {
  constexpr int kRuns = kAtom / F::kInputs;
  const F format(m);
  const int atoms = m.cols / kAtom;
  for (int o = 0; o < count; o++) {
    const uint8_t* row = static_cast<const uint8_t*>(m.weight) + size_t(first + o) * m.stride;
    int8_t* codes = to.codes + o * to.stride;
    int32_t* starts = to.starts + o * to.run_stride;
    for (int begin = 0; begin < atoms; begin += kSpan) {
      const int number = atoms - begin < kSpan ? atoms - begin : kSpan;
      alignas(64) float scales[kSpan * kRuns], mins[kSpan * kRuns];
      format.scales_at(first + o, row, begin, number, scales, mins);
      if constexpr (F::kMoves)
        for (int i = 0; i < number * kRuns; i++) mins[i] += F::kCentre * scales[i];
      memcpy(to.scales + o * to.run_stride + begin * kRuns, scales, size_t(number) * kRuns * 4);
      if (F::kHasMins) memcpy(to.mins + o * to.run_stride + begin * kRuns, mins, size_t(number) * kRuns * 4);
      for (int a = begin; a < begin + number; a++) {
        const v32u values = F::values_at(row, a);
        int32_t halves[2] = {};
        if constexpr (F::kIsWide)
          put_words(values, codes + a * bytes_of<F>(kAtom));
        else
          put_atom(values, F::kCentre, codes + a * kAtom, halves);
        if (kRuns == 2) {
          starts[2 * a] = halves[0];
          starts[2 * a + 1] = halves[1];
        } else {
          starts[a] = halves[0] + halves[1];
        }
      }
    }
  }
}

// Sums of R outputs, from `first` of the chunk on, and N panels, [R, N * kWidth].
template <class F, int R, int N>
static void multiply(const Codes& w, int first, const GroupTiled& x, int panel, float* out) {
  constexpr int kRunBytes = bytes_of<F>(F::kInputs), kAtomBytes = bytes_of<F>(kAtom) * kWidth;
  const int atoms = x.size / kAtom;
  const int8_t* codes = w.codes + first * w.stride;
  const size_t at = first * w.run_stride, panel_bytes = size_t(atoms) * kAtomBytes, panel_scales = size_t(atoms) * kWidth;
  const uint8_t* in = x.tiles + panel * panel_bytes;
  const float *steps = x.scales + panel * panel_scales, *sums_of_inputs = x.sums + panel * panel_scales;
  vf sums[R][N] = {};
  for (int run = 0; run < w.runs; run++, codes += kRunBytes, in += kRunBytes * kWidth) {
    vi dots[R][N];
    if constexpr (F::kIsWide)
      word_dots<R, N, kRunBytes / 4>(codes, w.stride, in, panel_bytes, dots);
    else
      byte_dots<F::kBits, R, N, kRunBytes / 4>(codes, w.stride, in, panel_bytes, w.starts + at + run, w.run_stride, dots);
    const size_t atom = size_t(run * F::kInputs / kAtom) * kWidth;
#pragma GCC unroll 3
    for (int n = 0; n < N; n++) {
      const vf step = load(steps + n * panel_scales + atom);
#pragma GCC unroll 6
      for (int r = 0; r < R; r++)
        sums[r][n] += __builtin_convertvector(dots[r][n], vf) * (step * splat(w.scales[at + r * w.run_stride + run]));
      if constexpr (F::kHasMins) {
        const vf inputs = load(sums_of_inputs + n * panel_scales + atom);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) sums[r][n] += inputs * splat(w.mins[at + r * w.run_stride + run]);
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 3
    for (int n = 0; n < N; n++) store(out + (r * N + n) * W, sums[r][n]);
}

template <class F, int N>
static void some_panels(const Codes& w, int count, const GroupTiled& x, int panel, float* out) {
  int r = 0;
  for (; r + kRows <= count; r += kRows) multiply<F, kRows, N>(w, r, x, panel, out + r * N * W);
  for (; r < count; r++) multiply<F, 1, N>(w, r, x, panel, out + r * N * W);
}

template <class F>
static void some_outputs(const GroupTiled& x, const Matrix& m, const Sink& sink, int first, int count) {
  static thread_local Scratch scratch;
  const int row_bytes = bytes_of<F>(m.cols);
  const Codes w(scratch.reserve(Codes::floats(count, row_bytes, m.cols)), count, row_bytes, m.cols / F::kInputs);
  decode<F>(m, first, count, w);
  alignas(64) float out[kMostOutputs * kPanels * kWidth];
  const int panels = panels_of(x.num_tokens);
  for (int p = 0; p < panels; p += kPanels) {
    const int number = panels - p < kPanels ? panels - p : kPanels, left = x.num_tokens - p * kWidth;
    auto run = number == 1 ? some_panels<F, 1> : number == 2 ? some_panels<F, 2> : some_panels<F, kPanels>;
    run(w, count, x, p, out);
    const float* bias = m.bias ? m.bias + first : nullptr;
    turn(out, count, number * kWidth, left < number * kWidth ? left : number * kWidth, bias,
         [&](int t, int o, auto value) { sink.put(p * kWidth + t, first + o, value); });
  }
}

static auto outputs_of(const Matrix& m) -> void (*)(const GroupTiled&, const Matrix&, const Sink&, int, int) {
  switch (int(m.format) - int(Format::kBlocks)) {
    case kQ4_0: return some_outputs<BlocksOf<kQ4_0>>;
    case kQ4_1: return some_outputs<BlocksOf<kQ4_1>>;
    case kQ5_0: return some_outputs<BlocksOf<kQ5_0>>;
    case kQ5_1: return some_outputs<BlocksOf<kQ5_1>>;
    case kQ8_0: return some_outputs<BlocksOf<kQ8_0>>;
    case kQ4_K: return some_outputs<BlocksOf<kQ4_K>>;
    case kQ5_K: return some_outputs<BlocksOf<kQ5_K>>;
    case kQ6_K: return some_outputs<BlocksOf<kQ6_K>>;
    default: return some_outputs<GroupsOf4>;
  }
}

}  // namespace

bool takes_group_tiles(const Matrix& m) {
  return m.format >= Format::kBlocks || (m.format == Format::kInt4 && streams(m) && m.cols % kAtom == 0);
}

bool takes_words(Format format) { return kSumsWords && format == Format(int(Format::kBlocks) + kQ8_0); }

size_t group_tiled_floats(int num_tokens, int size) {
  return size_t(panels_of(num_tokens)) * (size / kAtom) * ((kSumsWords ? 2 : 1) * kAtom * kWidth / 4 + 2 * kWidth);
}

// An atom of a token as bytes moved up by 128, four inputs beside those of other tokens, or as words, two inputs.
static inline void put_inputs(const int8_t (&ints)[kAtom], bool as_words, uint8_t* out) {
  if (as_words) {
    for (int two = 0; two < kAtom / 2; two++) {
      const int16_t words[] = {ints[2 * two], ints[2 * two + 1]};
      memcpy(out + two * kWidth * 4, words, sizeof words);
    }
    return;
  }
  for (int four = 0; four < kAtom / 4; four++) {
    uint32_t bytes;
    memcpy(&bytes, ints + 4 * four, sizeof bytes);
    bytes ^= 0x80808080u;
    memcpy(out + four * kWidth * 4, &bytes, sizeof bytes);
  }
}

GroupTiled group_tile_rows(const float* rows, size_t stride, int num_tokens, int size, Format format, float* space) {
  const bool as_words = takes_words(format);
  const int panels = panels_of(num_tokens), atoms = size / kAtom, tile = (as_words ? 2 : 1) * kAtom * kWidth;
  uint8_t* tiles = reinterpret_cast<uint8_t*>(space);
  float* scales = space + size_t(panels) * atoms * tile / 4;
  float* sums = scales + size_t(panels) * atoms * kWidth;
  parallel(panels, [&](int panel, int) {
    const int tokens = num_tokens - panel * kWidth < kWidth ? num_tokens - panel * kWidth : kWidth;
    for (int t = 0; t < kWidth; t++) {
      const float* row = rows + (size_t(panel) * kWidth + t) * stride;
      for (int a = 0; a < atoms; a++) {
        const size_t atom = size_t(panel) * atoms + a;
        alignas(32) int8_t ints[kAtom] = {};
        int32_t total = 0;
        float& scale = scales[atom * kWidth + t];
        scale = t < tokens ? round_block(row + a * kAtom, ints, total) : 0.0f;
        sums[atom * kWidth + t] = scale * float(total);
        put_inputs(ints, as_words, tiles + atom * tile + t * 4);
      }
    }
  });
  return GroupTiled{num_tokens, size, tiles, scales, sums};
}

void matmul(const GroupTiled& x, const Matrix* matrices, const Sink* sinks, int count) {
  int size = kCodeBytes / (x.size > 0 ? x.size : 1) / W * W, total = 0;
  size = size < W ? W : size > kMostOutputs ? kMostOutputs : size;
  for (int i = 0; i < count; i++) total += (matrices[i].rows + size - 1) / size;
  parallel(total, [&](int chunk, int) {
    int which = 0;
    for (int chunks; chunk >= (chunks = (matrices[which].rows + size - 1) / size); which++) chunk -= chunks;
    const Matrix& m = matrices[which];
    const int first = chunk * size, left = m.rows - first;
    outputs_of(m)(x, m, sinks[which], first, left < size ? left : size);
  });
}

}  // namespace dt

#endif
