#include "amx.h"

#if defined(__AMX_BF16__)

#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <type_traits>

#include "chunk.h"
#include "pool.h"

namespace dt::amx {
namespace {

static_assert(W == 16);

constexpr int kPair = 2 * kTileRows;   // outputs that are multiplied at once
constexpr int kRows = 96;              // outputs that one thread takes at a time
constexpr int kGatedRows = 64;         // the same of a gate, with as many of what it lets through
constexpr int kMostSteps = 64;         // what a thread keeps of weights and panel stays in its second cache
constexpr int kStepBytes = kParts * 2 * kTileBytes;
constexpr int kAhead = 512;            // bytes of a row that are asked for before they are needed

static_assert(kRows % kPair == 0 && kGatedRows % kDeep == 0);

// --- the unit ------------------------------------------------------------------------------------------------------------
//
// Written as assembly: the compilers' own functions for it differ, and GCC 12 drops stores that only a tile load reads.
// Tiles: sums 0 to 3 (outputs i, tokens j: 2 i + j), weights 4 and 5, activations 6 and 7.

struct alignas(64) Shape {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The unit is this thread's while this lives. It is given back after each chunk (both take 50 ns together), because the system
// saves 8 KiB more of a thread that holds it, and other libraries keep shapes of their own.
class Holds {
 public:
  Holds() {
    static const Shape shape;
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  ~Holds() { asm volatile("tilerelease"); }
  Holds(const Holds&) = delete;
};

template <int N>
static inline void load_tile(const char* from, size_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes), "i"(N) : "memory");
}
template <int N>
static inline void store_tile(float* to, size_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row_bytes), "i"(N) : "memory");
}
template <int N>
static inline void clear_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(N));
}
template <int Sum, int A, int B>
static inline void multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(A), "i"(B));
}

template <int R, int N>
static inline void products() {
  multiply<0, 4, 6>();
  if constexpr (N == 2) multiply<1, 4, 7>();
  if constexpr (R == 2) multiply<2, 5, 6>();
  if constexpr (R == 2 && N == 2) multiply<3, 5, 7>();
}

// --- parts of a float32 --------------------------------------------------------------------------------------------------

static inline vf top_half(vf x) { return (vf)((vu)x & 0xffff0000u); }
static inline vf nearest_half(vf x) { return (vf)(((vu)x + 0x8000u) & 0xffff0000u); }

// high + middle + low = x. What is no number, infinite or rounds up to infinity leaves a NaN in some part.
static inline void split(vf x, vf& high, vf& middle, vf& low) {
  high = nearest_half(x);
  vf rest = x - high;
  middle = nearest_half(rest);
  low = rest - middle;
}

// The same of any x: an infinity or a NaN is all in the high part.
static inline void split_any(vf x, vf& high, vf& middle, vf& low) {
  split(x, high, middle, low);
  vu size = (vu)x & 0x7fffffffu;
  vi is_large = size >= 0x7f7f8000u;
  if (_mm512_test_epi32_mask((__m512i)is_large, (__m512i)is_large) == 0) return;
  vi is_finite = size < 0x7f800000u, is_nan = size > 0x7f800000u;
  vf cut = (vf)((vu)top_half(x) | ((vu)is_nan & 0x400000u));
  vf rest = select(is_finite, x - cut, vf{});
  vf cut_rest = top_half(rest);
  high = select(is_large, cut, high);
  middle = select(is_large, cut_rest, middle);
  low = select(is_large, rest - cut_rest, low);
}

// Two features of 16 tokens as the unit takes pairs. Of parts: their lower halves are 0.
static inline void store_pairs(char* to, vf even, vf odd) {
  vu both = ((vu)even >> 16) | (vu)odd;
  memcpy(__builtin_assume_aligned(to, 64), &both, sizeof both);
}

static inline void put_pairs(char* tile, int pair, vf even, vf odd) {
  vf even_parts[kParts], odd_parts[kParts];
  split_any(even, even_parts[0], even_parts[1], even_parts[2]);
  split_any(odd, odd_parts[0], odd_parts[1], odd_parts[2]);
  for (int p = 0; p < kParts; p++) store_pairs(tile + p * 2 * kTileBytes + pair * 64, even_parts[p], odd_parts[p]);
}

// The floats that the parts were made of.
static inline void get_pairs(const char* tile, int pair, vf& even, vf& odd) {
  vf even_parts[kParts], odd_parts[kParts];
  for (int p = 0; p < kParts; p++) {
    vu both;
    memcpy(&both, tile + p * 2 * kTileBytes + pair * 64, sizeof both);
    even_parts[p] = (vf)(both << 16);
    odd_parts[p] = (vf)(both & 0xffff0000u);
  }
  even = even_parts[0] + (even_parts[1] + even_parts[2]);
  odd = odd_parts[0] + (odd_parts[1] + odd_parts[2]);
}

// 32 features of a row of weights, into row `row` of the tiles of each part.
static inline void split_row(const float* from, int valid, char* tiles, int row) {
  vf first, second;
  if (valid >= kDeep) {
    first = load(from);
    second = load(from + W);
  } else {
    auto some = [&](int begin) {
      int left = valid - begin;
      __mmask16 mask = left >= W ? 0xffff : left > 0 ? (1 << left) - 1 : 0;
      return (vf)_mm512_maskz_loadu_ps(mask, from + begin);
    };
    first = some(0);
    second = some(W);
  }
  vf a[kParts], b[kParts];
  split(first, a[0], a[1], a[2]);
  split(second, b[0], b[1], b[2]);
  char* to = tiles + row / kTileRows * kTileBytes + row % kTileRows * 64;
  for (int p = 0; p < kParts; p++) {
    __m512bh both = _mm512_cvtne2ps_pbh((__m512)b[p], (__m512)a[p]);
    memcpy(__builtin_assume_aligned(to + p * 2 * kTileBytes, 64), &both, sizeof both);
  }
}

// --- weights -------------------------------------------------------------------------------------------------------------

// Where the unit finds the weights of up to kPair outputs.
struct Operand {
  const char* tiles;
  size_t row_bytes, group_bytes, part_bytes, step_bytes;
};

// A chunk of a matrix. Either its rows are read by the unit as they are, one part, or as float32 that are split into three.
struct Source {
  const Matrix* m;
  int first, count;
  bool is_plain;      // bfloat16 that fill their tiles
  const float* rows;  // the others
  size_t stride;
  char* planes;       // [pair of tiles][step of a block]
};

static bool is_plain(const Matrix& m, int count) {
  return m.format == Format::kBfloat16 && m.cols % kDeep == 0 && count % kTileRows == 0;
}

static inline int pairs_of(int count) { return (count + kPair - 1) / kPair; }

static Source source_of(const Matrix& m, int first, int count, Scratch& planes, Scratch& decoded) {
  Source source{&m, first, count, is_plain(m, count), nullptr, 0, nullptr};
  if (source.is_plain) return source;
  source.rows = rows_of(m, first, count, source.stride, decoded);
  int deepest = steps(m.cols) < kMostSteps ? steps(m.cols) : kMostSteps;
  source.planes = reinterpret_cast<char*>(planes.reserve(size_t(pairs_of(count)) * deepest * kStepBytes / 4));
  return source;
}

// Steps of one block of features, begin .. end - 1.
struct Block {
  int begin, end;
  bool adds;        // to the sums of the block before
  bool is_first;    // of all panels: the weights come from memory
};

// Asks for the rows of the next pair of tiles, in the order of memory, while this one is multiplied. The first of a chunk has
// nobody before it: it asks for its own, a little ahead.
struct Fetcher {
  const char* rows;   // of this pair
  size_t row_bytes;
  int num_rows;       // of the next pair, 0 for none
  int num_steps;
  bool is_first;

  inline void line(const char* at) const { _mm_prefetch(at, _MM_HINT_T1); }

  void operator()(int step, int begin, int end) const {
    if (0) {
      size_t each = 0;  // bytes for each row of a step
      const char* next = rows + kPair * row_bytes + (size_t(step) * kPair + begin) * each;
      for (const char* stop = next + (end - begin) * each; next < stop; next += 64) line(next);
    }
    if (is_first) {
      size_t step_bytes = row_bytes / num_steps;
      for (int r = begin; r < end; r++) {
        const char* row = rows + r * row_bytes + step * step_bytes + kAhead;
        for (size_t i = 0; i < step_bytes; i += 64) _mm_prefetch(row + i, _MM_HINT_T0);
      }
    }
  }
};

// Splits the weights of a step, a few rows at a time.
struct Splitter {
  const float* rows;
  size_t stride;
  int valid_rows, cols;
  char* planes;
  Block block;
  Fetcher fetch;

  void operator()(int step, int begin, int end) const {
    fetch(step - 2, begin, end);
    if (step >= block.end) return;
    int at = step * kDeep;
    char* tiles = planes + size_t(step - block.begin) * kStepBytes;
    for (int r = begin; r < end; r++)
      split_row(rows + size_t(r < valid_rows ? r : valid_rows - 1) * stride + at, cols - at, tiles, r);
  }
};

struct Nothing {
  void operator()(int, int, int) const {}
};

// --- products ------------------------------------------------------------------------------------------------------------

// Sums of R * 16 outputs and N * 16 tokens over a block. `beside(step, begin, end)` runs between products, for rows of a step.
template <int P, int R, int N, class Beside>
static inline void multiply_block(const Operand& w, const char* x, const Block& block, float* out, int width, const Beside& beside) {
  const size_t out_bytes = width * 4;
  if (block.adds) {
    load_tile<0>(reinterpret_cast<char*>(out), out_bytes);
    if constexpr (N == 2) load_tile<1>(reinterpret_cast<char*>(out + W), out_bytes);
    if constexpr (R == 2) load_tile<2>(reinterpret_cast<char*>(out + kTileRows * width), out_bytes);
    if constexpr (R == 2 && N == 2) load_tile<3>(reinterpret_cast<char*>(out + kTileRows * width + W), out_bytes);
  } else {
    clear_tile<0>();
    if constexpr (N == 2) clear_tile<1>();
    if constexpr (R == 2) clear_tile<2>();
    if constexpr (R == 2 && N == 2) clear_tile<3>();
  }
  constexpr int kPhases = P == 3 ? 6 : 3, kSome = R * kTileRows;
  for (int step = block.begin; step < block.end; step++) {
    const char* a = w.tiles + (step - block.begin) * w.step_bytes;
    const char* b = x + size_t(step) * kStepBytes;
    auto weights = [&](int part) __attribute__((always_inline)) {
      load_tile<4>(a + part * w.part_bytes, w.row_bytes);
      if constexpr (R == 2) load_tile<5>(a + part * w.part_bytes + w.group_bytes, w.row_bytes);
    };
    auto tokens = [&](int part) __attribute__((always_inline)) {
      load_tile<6>(b + part * 2 * kTileBytes, 64);
      if constexpr (N == 2) load_tile<7>(b + part * 2 * kTileBytes + kTileBytes, 64);
    };
    auto phase = [&](int number) __attribute__((always_inline)) {
      products<R, N>();
      beside(step + 2, kSome * number / kPhases, kSome * (number + 1) / kPhases);
    };
    // Small products first; one operand changes at a time.
    weights(0);
    tokens(2);
    phase(0);
    tokens(1);
    phase(1);
    if constexpr (P == 3) {
      weights(1);
      phase(2);
      tokens(0);
      phase(3);
      weights(2);
      phase(4);
      weights(0);
      phase(5);
    } else {
      tokens(0);
      phase(2);
    }
  }
  store_tile<0>(out, out_bytes);
  if constexpr (N == 2) store_tile<1>(out + W, out_bytes);
  if constexpr (R == 2) store_tile<2>(out + kTileRows * width, out_bytes);
  if constexpr (R == 2 && N == 2) store_tile<3>(out + kTileRows * width + W, out_bytes);
}

// The same for one pair of row tiles of a source.
template <int R, int N>
static void multiply_pair(const Source& source, int pair, const char* x, const Block& block, float* out, int width) {
  const Matrix& m = *source.m;
  int left = source.count - (pair + 1) * kPair, next_rows = left < 0 ? 0 : left < kPair ? left : kPair;
  if (source.is_plain) {
    size_t row_bytes = size_t(m.stride) * 2;
    const char* rows = static_cast<const char*>(m.weight) + size_t(source.first + pair * kPair) * row_bytes;
    Operand w{rows + size_t(block.begin) * kDeep * 2, row_bytes, kTileRows * row_bytes, 0, kDeep * 2};
    if (block.is_first)
      multiply_block<1, R, N>(w, x, block, out, width, Fetcher{rows, row_bytes, next_rows, steps(m.cols), pair == 0});
    else
      multiply_block<1, R, N>(w, x, block, out, width, Nothing{});
    return;
  }
  int deepest = steps(m.cols) < kMostSteps ? steps(m.cols) : kMostSteps;
  char* planes = source.planes + size_t(pair) * deepest * kStepBytes;
  Operand w{planes, 64, kTileBytes, 2 * kTileBytes, kStepBytes};
  if (block.is_first) {
    Splitter splitter{source.rows + size_t(pair) * kPair * source.stride, source.stride, source.count - pair * kPair, m.cols, planes, block,
        Fetcher{reinterpret_cast<const char*>(source.rows + size_t(pair) * kPair * source.stride), source.stride * 4, next_rows, steps(m.cols), pair == 0}};
    splitter(block.begin, 0, R * kTileRows);
    splitter(block.begin + 1, 0, R * kTileRows);
    multiply_block<3, R, N>(w, x, block, out, width, splitter);
  } else {
    multiply_block<3, R, N>(w, x, block, out, width, Nothing{});
  }
}

static inline int panel_width(int num_tokens, int panel) { return num_tokens - panel * kWidth <= W ? W : kWidth; }
static inline int panel_tokens(int num_tokens, int panel) {
  int left = num_tokens - panel * kWidth;
  return left < kWidth ? left : kWidth;
}
static inline const char* panel_of(const Activations& x, int panel) {
  return reinterpret_cast<const char*>(x.panels) + panel * panel_bytes(x.size);
}

static void panel_sums(const Source& source, const Activations& x, int panel, const Block& block, float* out) {
  int width = panel_width(x.num_tokens, panel);
  const char* tokens = panel_of(x, panel);
  for (int pair = 0; pair < pairs_of(source.count); pair++) {
    bool has_two = source.count - pair * kPair > kTileRows;
    auto run = width == kWidth ? (has_two ? multiply_pair<2, 2> : multiply_pair<1, 2>)
                               : (has_two ? multiply_pair<2, 1> : multiply_pair<1, 1>);
    run(source, pair, tokens, block, out + size_t(pair) * kPair * width, width);
  }
}

// --- what is not finite --------------------------------------------------------------------------------------------------

// One token of a panel as floats.
static void token_of(const Activations& x, int panel, int token, float* row) {
  const char* from = panel_of(x, panel) + token / W * kTileBytes + token % W * 4;
  for (int k = 0; k < x.size; k++) {
    const char* at = from + size_t(k / kDeep) * kStepBytes + k % kDeep / 2 * 64 + k % 2 * 2;
    float parts[kParts];
    for (int p = 0; p < kParts; p++) {
      bf16 part;
      memcpy(&part, at + p * 2 * kTileBytes, 2);
      parts[p] = to_float(part);
    }
    row[k] = parts[0] + (parts[1] + parts[2]);
  }
}

static float plain_sum(const float* w, const float* x, int size) {
  vf sums = {};
  int k = 0;
  for (; k + W <= size; k += W) sums += load(w + k) * load(x + k);
  float total = sum(sums);
  for (; k < size; k++) total += w[k] * x[k];
  return total;
}

static inline vi is_not_finite(vf x) { return (vi)(((vu)x & 0x7f800000u) == 0x7f800000u); }

static void mend(const Source& source, const Activations& x, int panel, float* sums, int width) {
  static thread_local Scratch room, decoded;
  float* row = room.reserve(x.size);
  for (int t = 0; t < panel_tokens(x.num_tokens, panel); t++) {
    bool is_taken = false, is_nan = false;
    for (int o = 0; o < source.count; o++) {
      float& sum = sums[o * width + t];
      if (std::isfinite(sum)) continue;
      if (!is_taken) {
        token_of(x, panel, t, row);
        for (int k = 0; k < x.size; k++) is_nan |= std::isnan(row[k]);
        is_taken = true;
      }
      size_t stride;
      sum = is_nan ? NAN : plain_sum(rows_of(*source.m, source.first + o, 1, stride, decoded), row, x.size);
    }
  }
}

static void mend_if_needed(const Source& source, const Activations& x, int panel, float* sums) {
  int width = panel_width(x.num_tokens, panel);
  vi found = {};
  for (int i = 0; i < source.count * width; i += W) found |= is_not_finite(load(sums + i));
  if (_mm512_test_epi32_mask((__m512i)found, (__m512i)found)) mend(source, x, panel, sums, width);
}

// --- chunks --------------------------------------------------------------------------------------------------------------

// Sums of M chunks of equal size over all panels: done(panel, sums of each, [count, width]).
template <int M, class Done>
static void chunk_sums(const Activations& x, const Source (&sources)[M], Scratch& room, Done&& done) {
  int all = steps(x.size), num_panels = panels(x.num_tokens);
  int blocks = (all + kMostSteps - 1) / kMostSteps;
  size_t one = size_t(pairs_of(sources[0].count)) * kPair * kWidth;  // floats
  float* space = room.reserve((blocks > 1 ? num_panels : 1) * M * one);
  for (int b = 0; b < blocks; b++) {
    for (int p = 0; p < num_panels; p++) {
      int begin = b * kMostSteps, end = begin + kMostSteps < all ? begin + kMostSteps : all;
      Block block{begin, end, b > 0, p == 0};
      float* sums[M];
      for (int i = 0; i < M; i++) {
        sums[i] = space + ((blocks > 1 ? p : 0) * M + i) * one;
        panel_sums(sources[i], x, p, block, sums[i]);
        if (end == all) mend_if_needed(sources[i], x, p, sums[i]);
      }
      if (end == all) done(p, sums);
    }
  }
}

thread_local Scratch planes[2], decoded[2], sums_room;

static void chunk_of(const Activations& x, const Matrix& m, const Sink& sink, int first, int count) {
  Holds unit;
  Source sources[] = {source_of(m, first, count, planes[0], decoded[0])};
  chunk_sums(x, sources, sums_room, [&](int p, float* (&sums)[1]) {
    turn(sums[0], count, panel_width(x.num_tokens, p), panel_tokens(x.num_tokens, p), m.bias ? m.bias + first : nullptr,
         [&](int t, int o, auto value) { sink.put(p * kWidth + t, first + o, value); });
  });
}

static void gated_chunk(const Activations& x, const Matrix& gate, const Matrix& up, Activation kind, int first, int count, char* out) {
  Holds unit;
  Source sources[] = {source_of(gate, first, count, planes[0], decoded[0]), source_of(up, first, count, planes[1], decoded[1])};
  chunk_sums(x, sources, sums_room, [&](int p, float* (&sums)[2]) {
    int width = panel_width(x.num_tokens, p);
    for (int o = 0; o < (count + kDeep - 1) / kDeep * kDeep; o += 2) {
      char* tile = out + p * panel_bytes(gate.rows) + size_t((first + o) / kDeep) * kStepBytes;
      for (int lane = 0; lane < width; lane += W) {
        vf both[2] = {};  // behind the last feature: 0
        for (int i = 0; i < 2; i++)
          if (o + i < count) {
            size_t at = size_t(o + i) * width + lane;
            both[i] = act(kind, load(sums[0] + at) + bias_of(gate, first + o + i)) * (load(sums[1] + at) + bias_of(up, first + o + i));
          }
        put_pairs(tile + lane / W * kTileBytes, o % kDeep / 2, both[0], both[1]);
      }
    }
  });
}

// Outputs of a chunk: as many as are good for one thread, fewer where there are threads without work.
static int chunk_rows(int rows, int most) {
  while (most > kPair && (rows + most - 1) / most < 2 * num_threads()) most -= kPair;
  return most;
}

}  // namespace

bool enable() {
  constexpr int kAsk = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of Linux, and the number of the tiles' state
  return syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
}

Activations pack(const float* rows, size_t stride, int num_tokens, int size, float* space) {
  constexpr int kSpan = 4;  // steps of one chunk
  int spans = (steps(size) + kSpan - 1) / kSpan;
  char* out = reinterpret_cast<char*>(space);
  parallel(panels(num_tokens) * spans, [&](int chunk, int) {
    int panel = chunk / spans, begin = chunk % spans * kSpan;
    int end = begin + kSpan < steps(size) ? begin + kSpan : steps(size);
    for (int lane = 0; lane < panel_tokens(num_tokens, panel); lane += W) {
      int left = num_tokens - panel * kWidth - lane;
      const float* in = rows + (size_t(panel) * kWidth + lane) * stride;
      for (int step = begin; step < end; step++) {
        char* tile = out + panel * panel_bytes(size) + size_t(step) * kStepBytes + lane / W * kTileBytes;
        for (int half = 0; half < 2; half++) {
          int k = step * kDeep + half * W;
          __mmask16 mask = size - k >= W ? 0xffff : size > k ? (1 << (size - k)) - 1 : 0;
          vf block[W];
          for (int i = 0; i < W; i++) block[i] = i < left ? (vf)_mm512_maskz_loadu_ps(mask, in + i * stride + k) : vf{};
          transpose(block);
          for (int i = 0; i < W; i += 2) put_pairs(tile, half * W / 2 + i / 2, block[i], block[i + 1]);
        }
      }
    }
  });
  return Activations{num_tokens, size, nullptr, nullptr, space};
}

void matmul(const Activations& x, const Matrix* matrices, const Sink* sinks, int count) {
  int rows = 0, total = 0;
  for (int i = 0; i < count; i++) rows += matrices[i].rows;
  int size = chunk_rows(rows, kRows);
  auto chunks_of = [&](int i) { return (matrices[i].rows + size - 1) / size; };
  for (int i = 0; i < count; i++) total += chunks_of(i);
  parallel(total, [&](int chunk, int) {
    int which = 0;
    for (; chunk >= chunks_of(which); which++) chunk -= chunks_of(which);
    const Matrix& m = matrices[which];
    int first = chunk * size;
    chunk_of(x, m, sinks[which], first, m.rows - first < size ? m.rows - first : size);
  });
}

Activations gated_matmul(const Activations& x, const Matrix& gate, const Matrix& up, Activation kind, float* space) {
  int size = chunk_rows(gate.rows, kGatedRows);
  parallel((gate.rows + size - 1) / size, [&](int chunk, int) {
    int first = chunk * size, count = gate.rows - first < size ? gate.rows - first : size;
    gated_chunk(x, gate, up, kind, first, count, reinterpret_cast<char*>(space));
  });
  return Activations{x.num_tokens, gate.rows, nullptr, nullptr, space};
}

void unpack(const Activations& x, float* rows) {
  parallel(panels(x.num_tokens), [&](int p, int) {
    for (int lane = 0; lane < panel_tokens(x.num_tokens, p); lane += W) {
      int left = x.num_tokens - p * kWidth - lane;
      float* to = rows + (size_t(p) * kWidth + lane) * x.size;
      for (int k = 0; k < x.size; k += W) {
        const char* tile = panel_of(x, p) + size_t(k / kDeep) * kStepBytes + lane / W * kTileBytes;
        vf block[W];
        for (int i = 0; i < W; i += 2) get_pairs(tile, k % kDeep / 2 + i / 2, block[i], block[i + 1]);
        transpose(block);
        __mmask16 mask = x.size - k >= W ? 0xffff : (1 << (x.size - k)) - 1;
        for (int i = 0; i < W && i < left; i++) _mm512_mask_storeu_ps(to + size_t(i) * x.size + k, mask, (__m512)block[i]);
      }
    }
  });
}

}  // namespace dt::amx

#endif

// 0 when what the library is built for may be used in this process, else 1. To be called once, before anything else.
DT_API int dt_enable() {
#if defined(__AMX_BF16__)
  return dt::amx::enable() ? 0 : 1;
#else
  return 0;
#endif
}
