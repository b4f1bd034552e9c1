#include "amx.h"

#if defined(__AMX_BF16__)

#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <type_traits>

#include "chunk.h"
#include "pool.h"
#include "unit.h"

namespace dt::amx {
namespace {

static_assert(W == 16);

constexpr int kPair = 2 * kTileRows;   // outputs that are multiplied at once
constexpr int kRows = 96;              // outputs that one thread takes at a time
constexpr int kGatedRows = 64;         // the same of a gate, with as many of what it lets through
constexpr int kMostSteps = 64;         // what a thread keeps of weights and panel stays in its second cache
constexpr int kStepBytes = kParts * 2 * kTileBytes;
constexpr int kFewPanels = 2;          // panels that are taken together while weights stream by
constexpr int kDepth = 6;              // steps for which the tokens of a panel stay in the first cache, while weights stream by
constexpr int kRing = 4;               // steps that are kept of weights that only one panel takes
constexpr int kLead = 2;               // steps between splitting and multiplying: a tile can't be read before it is in the cache

static_assert(kRows % kPair == 0 && kGatedRows % kDeep == 0);

// --- the unit ------------------------------------------------------------------------------------------------------------
//
// Tiles: sums 0 to 3 (outputs i, tokens j: 2 i + j), weights 4 and 5, activations 6 and 7.

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

template <int N>
using Number = std::integral_constant<int, N>;

// With one tile of tokens, odd phases have sums of their own, because a product waits 52 cycles for the one before it.
template <int R, int N, int kPhase>
static inline void products() {
  constexpr int kOther = N == 1 ? kPhase % 2 : 0;
  multiply<kOther, 4, 6>();
  if constexpr (N == 2) multiply<1, 4, 7>();
  if constexpr (R == 2) multiply<2 + kOther, 5, 6>();
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

// Two parts of 16 floats as the unit takes pairs: without a shuffle. Cut, because the last part of a number below 2^-126 is not
// always a bfloat16.
static inline void store_pairs(char* to, vf first, vf second) {
  vu both = ((vu)first >> 16) | ((vu)second & 0xffff0000u);
  memcpy(__builtin_assume_aligned(to, 64), &both, sizeof both);
}

// Features i and i + 16 of 16 tokens, into a step's tiles.
static inline void put_pair(char* tile, int i, vf first, vf second) {
  vf a[kParts], b[kParts];
  split_any(first, a[0], a[1], a[2]);
  split_any(second, b[0], b[1], b[2]);
  for (int p = 0; p < kParts; p++) store_pairs(tile + p * 2 * kTileBytes + i * 64, a[p], b[p]);
}

// The floats that the parts were made of.
static inline void get_pair(const char* tile, int i, vf& first, vf& second) {
  vf a[kParts], b[kParts];
  for (int p = 0; p < kParts; p++) {
    vu both;
    memcpy(&both, tile + p * 2 * kTileBytes + i * 64, sizeof both);
    a[p] = (vf)(both << 16);
    b[p] = (vf)(both & 0xffff0000u);
  }
  first = a[0] + (a[1] + a[2]);
  second = b[0] + (b[1] + b[2]);
}

// Up to 32 features of a row of weights, into a row of the tile of each part; features behind the last are 0.
static inline __mmask16 mask_of(int valid) { return valid >= W ? 0xffff : valid > 0 ? (1 << valid) - 1 : 0; }

// What splitting adds and keeps, in registers: the compiler would make both anew for each row, on the port that splitting needs.
struct Constants {
  vu half = splat_bits(0x8000u), top = splat_bits(0xffff0000u);
  Constants() { asm("" : "+v"(half), "+v"(top)); }
  static vu splat_bits(uint32_t bits) { return vu{} + bits; }
};

// (first >> 16) | (second & top)
static inline void store_pairs(char* to, vf first, vf second, vu top) {
  __m512i both = _mm512_ternarylogic_epi32((__m512i)((vu)first >> 16), (__m512i)second, (__m512i)top, 0xf8);
  _mm512_store_si512(to, both);
}

static inline void put_row(const float* from, char* to, const Constants& k) {
  vf x[2] = {load(from), load(from + W)};
  for (int p = 0; p < kParts - 1; p++) {
    vu rounded[2] = {((vu)x[0] + k.half) & k.top, ((vu)x[1] + k.half) & k.top};
    store_pairs(to + p * 2 * kTileBytes, (vf)rounded[0], (vf)rounded[1], k.top);
    for (int i = 0; i < 2; i++) x[i] -= (vf)rounded[i];
  }
  store_pairs(to + (kParts - 1) * 2 * kTileBytes, x[0], x[1], k.top);
}

static inline void put_row(const float* from, int valid, char* to) {
  vf first = (vf)_mm512_maskz_loadu_ps(mask_of(valid), from);
  vf second = (vf)_mm512_maskz_loadu_ps(mask_of(valid - W), from + W);
  vf a[kParts], b[kParts];
  split(first, a[0], a[1], a[2]);
  split(second, b[0], b[1], b[2]);
  for (int p = 0; p < kParts; p++) store_pairs(to + p * 2 * kTileBytes, a[p], b[p]);
}

// bfloat16 are one part: put in the order of pairs.
static inline void put_row(const bf16* from, int valid, char* to) {
  alignas(64) static const uint16_t order[kDeep] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                    8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  __mmask32 mask = valid >= kDeep ? 0xffffffffu : (1u << valid) - 1;
  __m512i row = _mm512_maskz_loadu_epi16(mask, from);
  _mm512_store_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(order), row));
}
static inline void put_row(const bf16* from, char* to, const Constants&) { put_row(from, kDeep, to); }

// --- weights -------------------------------------------------------------------------------------------------------------

// A chunk of a matrix, and the tiles that are made of it: for each pair of row tiles, for each step of a block, for each part.
struct Source {
  const Matrix* m;
  int first, count;
  const void* rows;  // bfloat16 or float32, `stride` elements apart
  size_t stride;
  char* planes;
  const char* ahead;  // weights that this thread will probably take next, as many bytes; null for none

  bool is_bf16() const { return m->format == Format::kBfloat16; }
};

static inline int pairs_of(int count) { return (count + kPair - 1) / kPair; }

// Steps of weights that are kept while they stream by: in the first cache where one panel takes them; where two do, those of a
// block and of the beginning of the next.
static inline int ring_steps(int num_panels) { return num_panels == 1 ? kRing : 2 * kRing; }
static_assert(kLead < kRing && kDepth + kLead <= 2 * kRing);
constexpr int kAll = -1;  // mask of tiles that are not wrapped around

static Source source_of(const Matrix& m, int first, int count, int num_panels, const char* ahead, Scratch& planes, Scratch& decoded) {
  Source source{&m, first, count, nullptr, size_t(m.stride), nullptr, ahead};
  if (source.is_bf16())
    source.rows = static_cast<const bf16*>(m.weight) + size_t(first) * m.stride;
  else
    source.rows = rows_of(m, first, count, source.stride, decoded);
  int deepest = steps(m.cols) < kMostSteps ? steps(m.cols) : kMostSteps;
  int kept = num_panels <= kFewPanels ? ring_steps(num_panels) : pairs_of(count) * deepest;
  source.planes = reinterpret_cast<char*>(planes.reserve(size_t(kept) * kStepBytes / 4));
  return source;
}

// Steps of one block of features, begin .. end - 1.
struct Block {
  int begin, end;
  bool adds;        // to the sums of the block before
  bool is_first;    // of all panels: the weights come from memory
  int slot = 0;     // where the tiles of its first step lie, in steps, before they are wrapped around
};

template <class T>
constexpr int kPartsOf = kParts;
template <>
constexpr int kPartsOf<bf16> = 1;

// A pair of row tiles in one block of features, whose weights are T.
template <class T>
struct Unit {
  const T* from = nullptr;  // first row, first feature of the block; null where there is none
  size_t stride = 0;
  int rows = 0;    // that there are
  int valid = 0;   // features from the block's first one on
  int length = 0;  // steps
  int whole = 0;   // so many of the first ones lack neither rows nor features

  static Unit of(const Source& source, int pair, int begin, int end) {
    const T* row = static_cast<const T*>(source.rows) + size_t(pair) * kPair * source.stride;
    int rows = source.count - pair * kPair, valid = source.m->cols - begin * kDeep;
    return {row + begin * kDeep, source.stride, rows, valid, end - begin, rows < kPair ? 0 : valid / kDeep};
  }

  // Makes rows kBegin .. kEnd - 1 of a step's tiles. `fetches`: the tiles lie in the second cache, and the next step's behind
  // them are fetched before they are written.
  template <int kBegin, int kEnd, bool kFetches>
  inline __attribute__((always_inline)) void fill(int step, char* to, const Constants& constants) const {
    if (step >= whole) return fill_edge(step, to, kBegin, kEnd);
    const T* row = from + step * kDeep;
#pragma GCC unroll 32
    for (int r = kBegin; r < kEnd; r++) {
      if constexpr (kFetches)
        for (int p = 0; p < kPartsOf<T>; p++) __builtin_prefetch(place(to + kStepBytes, r) + p * 2 * kTileBytes, 1);
      put_row(row + r * stride, place(to, r), constants);
    }
  }

 private:
  static char* place(char* tiles, int r) { return tiles + r / kTileRows * kTileBytes + r % kTileRows * 64; }

  // Behind the last row it is taken again, for sums that nobody reads.
  __attribute__((noinline)) void fill_edge(int step, char* to, int begin, int end) const {
    int left = valid - step * kDeep;
    for (int r = begin; r < end; r++)
      put_row(from + step * kDeep + (r < rows ? r : rows - 1) * stride, left < kDeep ? left : kDeep, place(to, r));
  }
};

// Makes the tiles of a pair, a few rows at a time between products.
//
// Beside that it asks for the weights that come next, in the order of memory and to the second cache: in the order in which
// tiles take them they would come at half the speed.
template <class T>
class Filler {
 public:
  Filler(const Source& source, int pair, char* tiles, const Block& block)
      : unit_(Unit<T>::of(source, pair, block.begin, block.end)), tiles_(tiles), begin_(block.begin) {
    const void* here = static_cast<const T*>(source.rows) + size_t(pair) * kPair * source.stride;
    size_t before = size_t(pair) * steps(source.m->cols) * kPair * kRowBytes;
    ahead_ = source.ahead ? source.ahead + before : static_cast<const char*>(here);
  }

  template <int kBegin, int kEnd>
  inline __attribute__((always_inline)) void beside(int step, const Constants& constants) const {
    const char* ahead = ahead_ + size_t(step) * kPair * kRowBytes;
#pragma GCC unroll 32
    for (int i = kBegin * kRowBytes; i < kEnd * kRowBytes; i += 64) _mm_prefetch(ahead + i, _MM_HINT_T1);
    fill<kBegin, kEnd>(step - begin_ + kLead, constants);
  }

  // step: of the block.
  template <int kBegin, int kEnd>
  inline __attribute__((always_inline)) void fill(int step, const Constants& constants) const {
    if (step < unit_.length) unit_.template fill<kBegin, kEnd, true>(step, tiles_ + size_t(step) * kStepBytes, constants);
  }

 private:
  static constexpr int kRowBytes = kDeep * sizeof(T);

  Unit<T> unit_;
  char* tiles_;
  int begin_;
  const char* ahead_;
};

struct Nothing {
  template <int, int>
  void beside(int, const Constants&) const {}
};

// --- products ------------------------------------------------------------------------------------------------------------

// Sums of R * 16 outputs and N * 16 tokens over a block. `work.beside<begin, end>(step)` runs between products, for rows of a step.
template <int P, int R, int N, class Work>
static inline void multiply_block(const char* w, int mask, const char* x, const Block& block, float* out, int width,
                                  const Work& work) {
  const size_t out_bytes = width * 4;
  if (block.adds) {
    load_tile<0>(reinterpret_cast<char*>(out), out_bytes);
    if constexpr (N == 2) load_tile<1>(reinterpret_cast<char*>(out + W), out_bytes);
    if constexpr (R == 2) load_tile<2>(reinterpret_cast<char*>(out + kTileRows * width), out_bytes);
    if constexpr (R == 2 && N == 2) load_tile<3>(reinterpret_cast<char*>(out + kTileRows * width + W), out_bytes);
  } else {
    clear_tile<0>();
    if constexpr (R == 2) clear_tile<2>();
  }
  if (N == 1 || !block.adds) {
    clear_tile<1>();
    if constexpr (R == 2) clear_tile<3>();
  }
  const Constants constants;
  constexpr int kPhases = P == 3 ? 6 : 3, kSome = R * kTileRows;
  for (int step = block.begin; step < block.end; step++) {
    const char* a = w + size_t((block.slot + step - block.begin) & mask) * kStepBytes;
    const char* b = x + size_t(step) * kStepBytes;
    auto weights = [&](int part) __attribute__((always_inline)) {
      load_tile<4>(a + part * 2 * kTileBytes, 64);
      if constexpr (R == 2) load_tile<5>(a + part * 2 * kTileBytes + kTileBytes, 64);
    };
    auto tokens = [&](int part) __attribute__((always_inline)) {
      load_tile<6>(b + part * 2 * kTileBytes, 64);
      if constexpr (N == 2) load_tile<7>(b + part * 2 * kTileBytes + kTileBytes, 64);
    };
    auto phase = [&](auto number) __attribute__((always_inline)) {
      products<R, N, decltype(number)::value>();
      work.template beside<kSome * number / kPhases, kSome*(number + 1) / kPhases>(step, constants);
    };
    // Small products first; one operand changes at a time.
    weights(0);
    tokens(2);
    phase(Number<0>());
    tokens(1);
    phase(Number<1>());
    if constexpr (P == 3) {
      weights(1);
      phase(Number<2>());
      tokens(0);
      phase(Number<3>());
      weights(2);
      phase(Number<4>());
      weights(0);
      phase(Number<5>());
    } else {
      tokens(0);
      phase(Number<2>());
    }
  }
  store_tile<0>(out, out_bytes);
  if constexpr (N == 2) store_tile<1>(out + W, out_bytes);
  if constexpr (R == 2) store_tile<2>(out + kTileRows * width, out_bytes);
  if constexpr (R == 2 && N == 2) store_tile<3>(out + kTileRows * width + W, out_bytes);
  if constexpr (N == 1) {
    alignas(64) float others[R * kTileRows * W];
    store_tile<1>(others, 64);
    if constexpr (R == 2) store_tile<3>(others + kTileRows * W, 64);
    for (int i = 0; i < R * kTileRows; i++) store(out + i * width, load(out + i * width) + load(others + i * W));
  }
}

// The same for one pair of row tiles of a source, whose weights are T.
template <class T, int R, int N>
static void multiply_pair(const Source& source, int pair, const char* x, const Block& block, float* out, int width) {
  int kept = steps(source.m->cols) < kMostSteps ? steps(source.m->cols) : kMostSteps;
  char* tiles = source.planes + size_t(pair) * kept * kStepBytes;
  if (!block.is_first) return multiply_block<kPartsOf<T>, R, N>(tiles, kAll, x, block, out, width, Nothing{});
  Filler<T> filler(source, pair, tiles, block);
  const Constants constants;
  for (int i = 0; i < kLead; i++) filler.template fill<0, R * kTileRows>(i, constants);
  multiply_block<kPartsOf<T>, R, N>(tiles, kAll, x, block, out, width, filler);
}

template <class T>
static void multiply_pair(const Source& source, int pair, const char* x, const Block& block, float* out, int width) {
  bool has_two = source.count - pair * kPair > kTileRows;
  auto run = width == kWidth ? (has_two ? multiply_pair<T, 2, 2> : multiply_pair<T, 1, 2>)
                             : (has_two ? multiply_pair<T, 2, 1> : multiply_pair<T, 1, 1>);
  run(source, pair, x, block, out, width);
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
  for (int pair = 0; pair < pairs_of(source.count); pair++)
    (source.is_bf16() ? multiply_pair<bf16> : multiply_pair<float>)(source, pair, tokens, block,
                                                                              out + size_t(pair) * kPair * width, width);
}

// --- what is not finite --------------------------------------------------------------------------------------------------

// One token of a panel as floats.
static void token_of(const Activations& x, int panel, int token, float* row) {
  const char* from = panel_of(x, panel) + token / W * kTileBytes + token % W * 4;
  for (int k = 0; k < x.size; k++) {
    const char* at = from + size_t(k / kDeep) * kStepBytes + k % W * 64 + k % kDeep / W * 2;
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

// --- few tokens ----------------------------------------------------------------------------------------------------------
//
// With one or two panels, weights come from memory about as fast as they are multiplied. What the first cache has to fetch from
// the second waits behind them, so tokens are taken kDepth steps at a time, which stay in the first cache for all outputs of a
// chunk, and so do the tiles of weights. While the steps of one pair are multiplied, those of the next are asked for.

template <class T>
class Stream {
 public:
  Stream(const Unit<T>& now, const Unit<T>& next, const T* ahead, char* ring, int mask, const Block& block)
      : now_(now), next_(next), ahead_(ahead), ring_(ring), mask_(mask), block_(block) {
    lead_ = now.length < kLead ? now.length : kLead;
  }

  template <int kBegin, int kEnd>
  inline __attribute__((always_inline)) void beside(int step, const Constants& constants) const {
    int s = step - block_.begin, to = s + lead_;
    ask<kBegin, kEnd>(s);
    if (to < now_.length)
      now_.template fill<kBegin, kEnd, false>(to, tiles_of(to), constants);
    else if (next_.from)
      next_.template fill<kBegin, kEnd, false>(to - now_.length, tiles_of(to), constants);
  }

  // The steps that have to be there before the first product.
  void begin() const {
    const Constants constants;
    for (int s = 0; s < lead_; s++) now_.template fill<0, kPair, false>(s, tiles_of(s), constants);
  }

 private:
  char* tiles_of(int step) const { return ring_ + size_t((block_.slot + step) & mask_) * kStepBytes; }

  // The weights of the unit that is filled after the next steps.
  template <int kBegin, int kEnd>
  inline __attribute__((always_inline)) void ask(int s) const {
    const char* from = reinterpret_cast<const char*>(ahead_ + s * kDeep);
#pragma GCC unroll 32
    for (int r = kBegin; r < kEnd; r++)
      for (size_t i = 0; i < kDeep * sizeof(T); i += 64) _mm_prefetch(from + r * now_.stride * sizeof(T) + i, _MM_HINT_T1);
  }

  Unit<T> now_, next_;
  const T* ahead_;
  char* ring_;
  int mask_, lead_;
  Block block_;
};

// Sums of M chunks of equal size, with weights of one type, over one or two panels: sums[panel][chunk].
template <class T, int M>
static void few_sums_of(const Activations& x, const Source (&sources)[M], float* const (&sums)[kFewPanels][M]) {
  int all = steps(x.size), num_panels = panels(x.num_tokens), blocks = (all + kDepth - 1) / kDepth;
  int pairs = pairs_of(sources[0].count), per_block = M * pairs, units = blocks * per_block;
  int mask = ring_steps(num_panels) - 1;
  auto begin_of = [&](int b) { return int(int64_t(all) * b / blocks); };
  auto unit_of = [&](int u) {
    int b = u / per_block;
    return u < units ? Unit<T>::of(sources[u % per_block / pairs], u % pairs, begin_of(b), begin_of(b + 1)) : Unit<T>();
  };
  Unit<T> now = unit_of(0), next = unit_of(1);
  for (int u = 0, slot = 0; u < units; u++, slot += now.length, now = next, next = unit_of(u + 1)) {
    int b = u / per_block, i = u % per_block / pairs, pair = u % pairs;
    Block block{begin_of(b), begin_of(b + 1), b > 0, true, slot};
    const T* ahead = next.from ? next.from : sources[0].ahead ? reinterpret_cast<const T*>(sources[0].ahead) : now.from;
    Stream<T> stream(now, next, ahead, sources[0].planes, mask, block);
    if (u == 0) stream.begin();
    for (int p = 0; p < num_panels; p++) {
      int width = panel_width(x.num_tokens, p);
      float* out = sums[p][i] + size_t(pair) * kPair * width;
      auto multiply = [&](const auto& work) {
        using Work = std::decay_t<decltype(work)>;
        auto run = width == kWidth ? multiply_block<kPartsOf<T>, 2, 2, Work> : multiply_block<kPartsOf<T>, 2, 1, Work>;
        run(sources[0].planes, mask, panel_of(x, p), block, out, width, work);
      };
      p == 0 ? multiply(stream) : multiply(Nothing{});
    }
  }
}

template <int M>
static void few_sums(const Activations& x, const Source (&sources)[M], float* const (&sums)[kFewPanels][M]) {
  bool is_bf16 = sources[0].is_bf16(), is_mixed = M > 1 && sources[M - 1].is_bf16() != is_bf16;
  if (!is_mixed) return (is_bf16 ? few_sums_of<bf16, M> : few_sums_of<float, M>)(x, sources, sums);
  for (int i = 0; i < M; i++) {
    const Source one[] = {sources[i]};
    float* const own[kFewPanels][1] = {{sums[0][i]}, {sums[1][i]}};
    few_sums<1>(x, one, own);
  }
}

// --- chunks --------------------------------------------------------------------------------------------------------------

// Sums of M chunks of equal size over all panels: done(panel, sums of each, [count, width]).
template <int M, class Done>
static void chunk_sums(const Activations& x, const Source (&sources)[M], Scratch& room, Done&& done) {
  int all = steps(x.size), num_panels = panels(x.num_tokens);
  int blocks = (all + kMostSteps - 1) / kMostSteps;
  size_t one = size_t(pairs_of(sources[0].count)) * kPair * kWidth;  // floats
  if (num_panels <= kFewPanels) {
    float* few[kFewPanels][M];
    float* space = room.reserve(num_panels * M * one);
    for (int p = 0; p < kFewPanels; p++)
      for (int i = 0; i < M; i++) few[p][i] = space + ((p < num_panels ? p : 0) * M + i) * one;
    few_sums<M>(x, sources, few);
    for (int p = 0; p < num_panels; p++) {
      for (int i = 0; i < M; i++) mend_if_needed(sources[i], x, p, few[p][i]);
      done(p, few[p]);
    }
    return;
  }
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

// Outputs first .. first + count - 1 of a matrix.
struct Chunk {
  const Matrix* m;
  int first, count;

  const char* weights() const {
    size_t element = m->format == Format::kBfloat16 ? 2 : 4;
    return static_cast<const char*>(m->weight) + size_t(first) * m->stride * element;
  }
};

static Chunk nth_chunk(const Matrix& m, int n, int size) {
  int first = n * size;
  return {&m, first, m.rows - first < size ? m.rows - first : size};
}

static void chunk_of(const Activations& x, const Chunk& chunk, const Sink& sink, const char* ahead) {
  Holds unit;
  const Matrix& m = *chunk.m;
  int first = chunk.first, count = chunk.count;
  Source sources[] = {source_of(m, first, count, panels(x.num_tokens), ahead, planes[0], decoded[0])};
  chunk_sums(x, sources, sums_room, [&](int p, float* (&sums)[1]) {
    turn(sums[0], count, panel_width(x.num_tokens, p), panel_tokens(x.num_tokens, p), m.bias ? m.bias + first : nullptr,
         [&](int t, int o, auto value) { sink.put(p * kWidth + t, first + o, value); });
  });
}

// Pairs whose first feature is behind the last: 0.
static void clear_behind(char* panel, int end, int size) {
  if (end < size) return;
  char* tiles = panel + size_t((size - 1) / kDeep) * kStepBytes;
  for (int i = (size - 1) % kDeep + 1; i < W; i++)
    for (int t = 0; t < 2; t++) put_pair(tiles + t * kTileBytes, i, vf{}, vf{});
}

static void gated_chunk(const Activations& x, const Chunk (&chunks)[2], const char* const (&ahead)[2], Activation kind, char* out) {
  Holds unit;
  const Matrix &gate = *chunks[0].m, &up = *chunks[1].m;
  int first = chunks[0].first, count = chunks[0].count;
  Source sources[] = {source_of(gate, first, count, panels(x.num_tokens), ahead[0], planes[0], decoded[0]),
                      source_of(up, first, count, panels(x.num_tokens), ahead[1], planes[1], decoded[1])};
  chunk_sums(x, sources, sums_room, [&](int p, float* (&sums)[2]) {
    int width = panel_width(x.num_tokens, p);
    for (int o = 0; o < count; o = o % kDeep == W - 1 ? o + W + 1 : o + 1) {  // the first half of each step, with the second
      char* tile = out + p * panel_bytes(gate.rows) + size_t((first + o) / kDeep) * kStepBytes;
      for (int lane = 0; lane < width; lane += W) {
        vf both[2] = {};  // behind the last feature: 0
        for (int i = 0; i < 2; i++)
          if (int at = o + i * W; at < count) {
            size_t place = size_t(at) * width + lane;
            both[i] = act(kind, load(sums[0] + place) + bias_of(gate, first + at)) * (load(sums[1] + place) + bias_of(up, first + at));
          }
        put_pair(tile + lane / W * kTileBytes, o % kDeep, both[0], both[1]);
      }
    }
    clear_behind(out + p * panel_bytes(gate.rows), first + count, gate.rows);
  });
}

// Outputs of a chunk: as many as fill the second cache, so that tokens are read less often; fewer where there would be threads
// without work.
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
        vf halves[2][W];
        for (int half = 0; half < 2; half++) {
          int k = step * kDeep + half * W;
          __mmask16 mask = mask_of(size - k);
          for (int i = 0; i < W; i++) halves[half][i] = i < left ? (vf)_mm512_maskz_loadu_ps(mask, in + i * stride + k) : vf{};
          transpose(halves[half]);
        }
        for (int i = 0; i < W; i++) put_pair(tile, i, halves[0][i], halves[1][i]);
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
  auto find = [&](int n, int& which) {
    for (which = 0; n >= chunks_of(which); which++) n -= chunks_of(which);
    return nth_chunk(matrices[which], n, size);
  };
  parallel(total, [&](int n, int) {
    int which, other, next = n + num_threads();  // what this thread takes next, if all are equally fast
    Chunk chunk = find(n, which);
    chunk_of(x, chunk, sinks[which], next < total ? find(next, other).weights() : nullptr);
  });
}

Activations gated_matmul(const Activations& x, const Matrix& gate, const Matrix& up, Activation kind, float* space) {
  int size = chunk_rows(gate.rows, kGatedRows), total = (gate.rows + size - 1) / size;
  parallel(total, [&](int n, int) {
    Chunk chunks[] = {nth_chunk(gate, n, size), nth_chunk(up, n, size)};
    int next = n + num_threads();
    const char* ahead[] = {next < total ? nth_chunk(gate, next, size).weights() : nullptr,
                           next < total ? nth_chunk(up, next, size).weights() : nullptr};
    gated_chunk(x, chunks, ahead, kind, reinterpret_cast<char*>(space));
  });
  return Activations{x.num_tokens, gate.rows, nullptr, nullptr, space};
}

void unpack(const Activations& x, float* rows) {
  parallel(panels(x.num_tokens), [&](int p, int) {
    for (int lane = 0; lane < panel_tokens(x.num_tokens, p); lane += W) {
      int left = x.num_tokens - p * kWidth - lane;
      float* to = rows + (size_t(p) * kWidth + lane) * x.size;
      for (int k = 0; k < x.size; k += kDeep) {
        const char* tile = panel_of(x, p) + size_t(k / kDeep) * kStepBytes + lane / W * kTileBytes;
        vf halves[2][W];
        for (int i = 0; i < W; i++) get_pair(tile, i, halves[0][i], halves[1][i]);
        for (int half = 0; half < 2; half++) {
          transpose(halves[half]);
          __mmask16 mask = mask_of(x.size - k - half * W);
          for (int i = 0; i < W && i < left; i++)
            _mm512_mask_storeu_ps(to + size_t(i) * x.size + k + half * W, mask, (__m512)halves[half][i]);
        }
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
