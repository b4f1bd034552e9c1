#include "attention.h"

#include <cmath>
#include <type_traits>
#include <vector>

#include "attention_plan.h"
#include "codes.h"
#include "pool.h"
#include "tile.h"

namespace dt {
namespace {

constexpr int kKeys = 48;  // keys in one round of the online softmax
constexpr float kMinusInfinity = -INFINITY;

template <class T>
struct Pages {
  const T* keys;
  const T* values;
  const float* key_scales;
  const float* value_scales;
  const int32_t* table;
  int block_size, kv_heads;
  size_t token_step;

  Pages(const LayerCache& cache, const Batch& batch, int sequence, int kv_head)
      : keys(static_cast<const T*>(cache.keys) + size_t(kv_head) * cache.head_size),
        values(static_cast<const T*>(cache.values) + size_t(kv_head) * cache.head_size),
        key_scales(cache.key_scales ? cache.key_scales + kv_head : nullptr),
        value_scales(cache.value_scales ? cache.value_scales + kv_head : nullptr),
        table(batch.tables + size_t(sequence) * batch.table_stride),
        block_size(cache.block_size),
        kv_heads(cache.kv_heads),
        token_step(size_t(cache.kv_heads) * cache.head_size) {}

  // The slot of a token; its key is at keys + slot * token_step, the scale of that at key_scales + slot * kv_heads.
  size_t slot(int token) const { return size_t(table[token / block_size]) * block_size + token % block_size; }

  // How many tokens from `first` on, up to `most`, lie one behind the other.
  int run_of(int first, int most) const {
    int count = block_size - first % block_size;
    for (const int32_t* block = table + first / block_size; count < most && block[1] == block[0] + 1; block++) count += block_size;
    return count < most ? count : most;
  }
};

template <class T>
static inline void copy_row(const T* from, float* to, int size) {
  int i = 0;
  for (; i + W <= size; i += W) store(to + i, load(from + i));
  for (; i < size; i++) to[i] = get(from + i);
}
template <class T>
static inline void copy_codes(const T* from, float scale, float* to, int size) {
  vf factor = splat(scale);
  int i = 0;
  for (; i + W <= size; i += W) store(to + i, load(from + i) * factor);
  for (; i < size; i++) to[i] = get(from + i) * scale;
}

struct Room {
  std::vector<float> data;
  float* reserve(size_t count) {
    if (data.size() < count) data.resize(count);
    return data.data();
  }
};

// --- decode: one query a head, all heads of a group at once --------------------------------------------------------------

// The state of an online softmax for one head: the largest score so far, the sum of exponentials, and the weighted values.
struct Partial {
  float largest, total;
};

// Query heads of a group that are taken together, so that a key is loaded, and a code turned into a float, once for all of
// them: sums of heads x kTileKeys, the keys and a query fit the registers.
constexpr int kTileHeads = kRegisters == 32 ? 4 : 2;
constexpr int kTileKeys = 4;
constexpr int kRow = (kKeys + W - 1) / W * W;

// Where the keys of a round lie, and its values at the same places behind another address.
template <class T>
struct Places {
  const T* base;
  const size_t* offsets;
  const T* operator[](int i) const { return base + offsets[i]; }
};

// A head's size. Decoding is compiled for the usual ones, so that no loop over it is left; kSize is 0 for any other.
template <int kSize>
static inline int size_of(int size) {
  return kSize > 0 ? kSize : size;
}

// What is asked for while something else is computed, a row at a time: `size` numbers of it.
template <int kSize, class T>
static inline void ask_for(const T* row, int size) {
  const char* at = reinterpret_cast<const char*>(row);
  const size_t bytes = size_t(size_of<kSize>(size)) * sizeof(T);
  if constexpr (kSize > 0) {
#pragma GCC unroll 8
    for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(at + line);
  } else {
    DT_ROLLED
    for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(at + line);
  }
}

// Products of R queries, rows of `size`, with K keys: those of head r go to scores + r * kRow. query(r, d): W numbers of query r.
template <int R, int K, int kSize, class T, class Query>
static inline __attribute__((always_inline)) void products(const Query& query, const float* q, const Places<T>& keys, int first, int size,
                                                           float* scores) {
  vf sums[R][K] = {};
  const T* rows[K];
#pragma GCC unroll 4
  for (int i = 0; i < K; i++) rows[i] = keys[first + i];
  auto multiply = [&](int d) __attribute__((always_inline)) {
    vf key[K];
#pragma GCC unroll 4
    for (int i = 0; i < K; i++) key[i] = load(rows[i] + d);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      vf x = query(r, d);
#pragma GCC unroll 4
      for (int i = 0; i < K; i++) sums[r][i] += x * key[i];
    }
  };
  int d = 0;
  if constexpr (kSize > 0) {
#pragma GCC unroll 16
    for (; d < kSize; d += W) multiply(d);
  } else {
    for (; d + W <= size; d += W) multiply(d);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
    float* out = scores + r * kRow + first;
    if constexpr (K == 4) {
      sum4(sums[r][0], sums[r][1], sums[r][2], sums[r][3], out);
    } else {
      for (int i = 0; i < K; i++) out[i] = sum(sums[r][i]);
    }
    if constexpr (kSize == 0)
      for (int rest = d; rest < size; rest++)
        for (int i = 0; i < K; i++) out[i] += q[size_t(r) * size + rest] * get(rows[i] + rest);
  }
}

DT_CALLED static void cap(float* scores, int count, float soft_cap) {
  for (int i = 0; i < count; i += W) store(scores + i, vtanh(load(scores + i) * (1.0f / soft_cap)) * soft_cap);
}

// out[r][d] = out[r][d] * keep[r] + sum over tokens of p[r][i] * value[i][d], for N vectors of d. next: values of as many tokens,
// whole rows, that are asked for meanwhile.
template <int R, int N, int kSize, class T>
static inline void add_columns(float* out, const float* keep, const float* p, const Places<T>& values, int count, int size,
                               const Places<T>& next, int num_next) {
  vf sums[R][N];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) sums[r][j] = load(out + size_t(r) * size + j * W) * keep[r];
  for (int i = 0; i < count; i++) {
    if (i < num_next) ask_for<kSize>(next[i], size);
    const T* row = values[i];
    vf value[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) value[j] = load(row + j * W);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      vf weight = splat(p[r * kRow + i]);
#pragma GCC unroll 4
      for (int j = 0; j < N; j++) sums[r][j] += weight * value[j];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) store(out + size_t(r) * size + j * W, sums[r][j]);
}

// The same for `rest` columns, one after another.
template <class T>
DT_CALLED static void add_rest(float* out, const float* keep, const float* p, const Places<T>& values, int rows, int count, int size,
                               int rest) {
  for (int column = 0; column < rest; column++)
    for (int r = 0; r < rows; r++) {
      float total = out[size_t(r) * size + column] * keep[r];
      for (int i = 0; i < count; i++) total += p[r * kRow + i] * get(values[i] + column);
      out[size_t(r) * size + column] = total;
    }
}

// The same for all of d.
template <int R, int kSize, class T>
static inline void add_values(float* out, const float* keep, const float* p, Places<T> values, int count, int any_size,
                              const Places<T>& next, int num_next) {
  const int size = size_of<kSize>(any_size);
  int d = 0;
  for (; d + 4 * W <= size; d += 4 * W, values.base += 4 * W, num_next = 0)
    add_columns<R, 4, kSize>(out + d, keep, p, values, count, size, next, num_next);
  for (; d + W <= size; d += W, values.base += W, num_next = 0)
    add_columns<R, 1, kSize>(out + d, keep, p, values, count, size, next, num_next);
  if (d < size) add_rest(out + d, keep, p, values, R, count, size, size - d);
}

// Scores of a head's products with `count` keys; what fills the row up is minus infinity. scales: of the keys, or null.
DT_CALLED static void finish_scores(float* scores, const float* scales, int count, const LayerCache& cache) {
  for (int i = count; i < kRow; i++) scores[i] = 0.0f;
  for (int i = 0; i < count; i += W) {
    vf scaled = load(scores + i) * cache.scale;
    store(scores + i, scales ? scaled * load(scales + i) : scaled);
  }
  if (cache.soft_cap > 0) cap(scores, count, cache.soft_cap);
  for (int i = count; i < kRow; i++) scores[i] = kMinusInfinity;
}

// One round of the online softmax for R heads: scores become weights, times the scales of the values where there are any. keep: what
// the sums so far are to be multiplied by.
template <int R>
DT_CALLED static void soften_rows(float* scores, const float* scales, int count, Partial* partials, float* keep) {
  static_assert(R <= W);
  alignas(64) float before[W] = {}, now[W] = {};
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
    before[r] = partials[r].largest;
    vf best = splat(before[r]);
    for (int i = 0; i < count; i += W) best = vmax(load(scores + r * kRow + i), best);
    now[r] = largest(best);
  }
  const vf kept = vexp_of_negative(load(before) - load(now));
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
    vf total = {};
    for (int i = 0; i < count; i += W) {
      vf p = vexp_of_negative(load(scores + r * kRow + i) - now[r]);
      store(scores + r * kRow + i, scales ? p * load(scales + i) : p);
      total += p;
    }
    keep[r] = before[r] == kMinusInfinity ? 0.0f : kept[r];
    partials[r] = {now[r], partials[r].total * keep[r] + sum(total)};
  }
}

// One round for one key/value head: where its keys and values lie, and their scales where there are any.
template <class T>
struct Round {
  int count = 0;
  const T *keys, *values;
  size_t offsets[kKeys];
  alignas(64) float key_scales[kRow], value_scales[kRow];

  // Tokens first .. first + kKeys - 1, or up to `end`.
  DT_CALLED void find(const Pages<T>& pages, int first, int end) {
    count = end - first < kKeys ? end - first : kKeys;
    keys = pages.keys;
    values = pages.values;
    const int32_t* block = pages.table + first / pages.block_size;
    int place = first % pages.block_size;
    for (int i = 0; i < count; block++, place = 0) {
      size_t slot = size_t(*block) * pages.block_size + place;
      int stop = i + pages.block_size - place < count ? i + pages.block_size - place : count;
      for (size_t at = slot * pages.token_step; i < stop; i++, slot++, at += pages.token_step) {
        offsets[i] = at;
        if constexpr (is_code<T>) {
          key_scales[i] = pages.key_scales[slot * pages.kv_heads] * kUnit<T>;
          value_scales[i] = pages.value_scales[slot * pages.kv_heads] * kUnit<T>;
        }
      }
    }
    if constexpr (is_code<T>)
      for (int i = count; i < kRow; i++) key_scales[i] = value_scales[i] = 0.0f;
  }

  Places<T> key_rows() const { return {keys, offsets}; }
  Places<T> value_rows() const { return {values, offsets}; }

  // R heads whose rows of q and out begin here. next: keys and values that are asked for meanwhile; its count may be 0.
  template <int R, int kSize>
  void attend(const LayerCache& cache, const float* q, float* out, Partial* partials, const Round& next, int num_next) const {
    alignas(64) float scores[R * kRow];
    float keep[R];
    const int size = size_of<kSize>(cache.head_size);
    int i = 0;
    const Places<T> rows = key_rows(), next_rows = next.key_rows();
    auto multiply = [&](const auto& query) __attribute__((always_inline)) {
      for (; i + kTileKeys <= count; i += kTileKeys) {
        for (int j = i; j < i + kTileKeys && j < num_next; j++) ask_for<kSize>(next_rows[j], size);
        products<R, kTileKeys, kSize>(query, q, rows, i, size, scores);
      }
      for (; i < count; i++) products<R, 1, kSize>(query, q, rows, i, size, scores);
    };
    constexpr int kVectors = kSize / W;  // of a query, which stay in registers for all keys if they fit beside sums and keys
    if constexpr (kSize > 0 && R * kVectors + R * kTileKeys + kTileKeys <= kRegisters) {
      vf held[R][kVectors];
#pragma GCC unroll 4
      for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; v++) held[r][v] = load(q + r * kSize + v * W);
      multiply([&](int r, int d) __attribute__((always_inline)) { return held[r][d / W]; });
    } else {
      multiply([&](int r, int d) __attribute__((always_inline)) { return load(q + size_t(r) * size + d); });
    }
    for (int r = 0; r < R; r++) finish_scores(scores + r * kRow, is_code<T> ? key_scales : nullptr, count, cache);
    soften_rows<R>(scores, is_code<T> ? value_scales : nullptr, count, partials, keep);
    add_values<R, kSize>(out, keep, scores, value_rows(), count, size, next.value_rows(), num_next);
  }
};

// Keys begin .. end - 1 of one sequence, for the `group` query heads that share kv_head: heads' rows of q and out are D apart.
// follow(round) finds what this thread is likely to compute next, which is asked for with the last round.
template <int kSize, class T, class F>
static void decode(const LayerCache& cache, const Pages<T>& pages, int group, const float* q, float* out, Partial* partials,
                   int begin, int end, const F& follow) {
  int size = cache.head_size;
  for (int r = 0; r < group; r++) {
    partials[r] = {kMinusInfinity, 0.0f};
    memset(out + size_t(r) * size, 0, size * 4);
  }
  Round<T> rounds[2];
  if (begin < end) rounds[0].find(pages, begin, end);
  for (int first = begin, turn = 0; first < end; first += kKeys, turn ^= 1) {
    const Round<T>& round = rounds[turn];
    Round<T>& next = rounds[turn ^ 1];
    if (first + kKeys < end)
      next.find(pages, first + kKeys, end);
    else
      follow(next);
    int r = 0, num_next = next.count;
    auto run = [&](auto heads) {
      constexpr int R = decltype(heads)::value;
      for (; r + R <= group; r += R, num_next = 0)
        round.template attend<R, kSize>(cache, q + size_t(r) * size, out + size_t(r) * size, partials + r, next, num_next);
    };
    run(std::integral_constant<int, kTileHeads>());
    if constexpr (kTileHeads > 3) run(std::integral_constant<int, 3>());
    if constexpr (kTileHeads > 2) run(std::integral_constant<int, 2>());
    run(std::integral_constant<int, 1>());
  }
}

DT_CALLED static void normalize(float* out, int size, float total) {
  float factor = 1.0f / total;
  for (int d = 0; d < size; d++) out[d] *= factor;
}

// --- prefill: lanes are tokens --------------------------------------------------------------------------------------------

// Scores that a query must not see become minus infinity. Lane i is the query at position first_query + i.
template <int N>
DT_CALLED static void hide(float* scores, int first_key, int count, int first_query, int window) {
  for (int j = 0; j < count; j++)
    for (int lane = 0; lane < N * W; lane++) {
      int position = first_query + lane, key = first_key + j;
      if (key > position || (window > 0 && key <= position - window)) scores[j * N * W + lane] = kMinusInfinity;
    }
}

// One round of the online softmax over `count` keys, lane by lane; scores become weights.
template <int N>
DT_CALLED static void soften(float* scores, int count, float* largest_seen, float* totals, float* keep) {
  for (int n = 0; n < N; n++) {
    float* column = scores + n * W;
    vf before = load(largest_seen + n * W), best = before;
    for (int j = 0; j < count; j++) best = vmax(load(column + j * N * W), best);
    // A lane that has seen no key yet keeps minus infinity; its weights are 0, not exp(inf - inf).
    vf base = select(best == splat(kMinusInfinity), vf{}, best);
    vf total = {};
    for (int j = 0; j < count; j++) {
      vf p = vexp_of_negative(load(column + j * N * W) - base);
      store(column + j * N * W, p);
      total += p;
    }
    vf kept = vexp_of_negative(before - base);
    store(keep + n * W, kept);
    store(totals + n * W, load(totals + n * W) * kept + total);
    store(largest_seen + n * W, best);
  }
}

// Keys and values of some tokens in float32, rows `step` apart.
struct Tokens {
  const float *keys, *values;
  size_t step;
  int count;
};

// Up to kKeys tokens from `first` on: where they lie, if that is one behind the other and in float32, else copied to keys and values.
template <class T>
DT_CALLED static Tokens read_tokens(const Pages<T>& pages, int first, int end, int size, float* keys, float* values) {
  const int most = end - first < kKeys ? end - first : kKeys;
  if constexpr (std::is_same_v<T, float>) {
    const int run = pages.run_of(first, most);
    if (run == most || pages.block_size >= kKeys) {
      const size_t at = pages.slot(first) * pages.token_step;
      return {pages.keys + at, pages.values + at, pages.token_step, run};
    }
  }
  for (int j = 0; j < most; j++) {
    const size_t slot = pages.slot(first + j), at = slot * pages.token_step;
    float *key = keys + size_t(j) * size, *value = values + size_t(j) * size;
    if constexpr (is_code<T>) {
      copy_codes(pages.keys + at, pages.key_scales[slot * pages.kv_heads] * kUnit<T>, key, size);
      copy_codes(pages.values + at, pages.value_scales[slot * pages.kv_heads] * kUnit<T>, value, size);
    } else {
      copy_row(pages.keys + at, key, size);
      copy_row(pages.values + at, value, size);
    }
  }
  return {keys, values, size_t(size), most};
}

// columns[d * step + lane] = rows[lane][d] * factor, and 0 where there is no row.
DT_CALLED static void lay_lanes(const float* const (&rows)[W], int size, float factor, float* columns, int step) {
  int d = 0;
  for (; d + W <= size; d += W) {
    vf block[W];
    for (int i = 0; i < W; i++) block[i] = rows[i] ? load(rows[i] + d) : vf{};
    transpose(block);
    for (int i = 0; i < W; i++) store(columns + size_t(d + i) * step, block[i] * factor);
  }
  for (; d < size; d++)
    for (int i = 0; i < W; i++) columns[size_t(d) * step + i] = rows[i] ? rows[i][d] * factor : 0.0f;
}

// The other way: rows[lane][d] = columns[d * step + lane] * factors[lane], for the lanes with a row.
DT_CALLED static void take_lanes(const float* columns, int step, int size, const float (&factors)[W], float* const (&rows)[W]) {
  int d = 0;
  for (; d + W <= size; d += W) {
    vf block[W];
    for (int i = 0; i < W; i++) block[i] = load(columns + size_t(d + i) * step);
    transpose(block);
    for (int i = 0; i < W; i++)
      if (rows[i]) store(rows[i] + d, block[i] * factors[i]);
  }
  for (; d < size; d++)
    for (int i = 0; i < W; i++)
      if (rows[i]) rows[i][d] = columns[size_t(d) * step + i] * factors[i];
}

// All of N * W lanes: row(lane) is where one lies, or null.
template <int N, class Row>
static void lay_columns(const Row& row, int size, float factor, float* columns) {
  for (int lane = 0; lane < N * W; lane += W) {
    const float* rows[W];
    for (int i = 0; i < W; i++) rows[i] = row(lane + i);
    lay_lanes(rows, size, factor, columns + lane, N * W);
  }
}

// The same back; row(lane, factor) sets the factor of a lane.
template <int N, class Row>
static void lay_rows(const float* columns, int size, const Row& row) {
  for (int lane = 0; lane < N * W; lane += W) {
    float* rows[W];
    float factors[W];
    for (int i = 0; i < W; i++) rows[i] = row(lane + i, factors[i]);
    take_lanes(columns + lane, N * W, size, factors, rows);
  }
}

// Attention of panels of N * W queries over keys begin .. end - 1 of one sequence, all of one key/value head. row(panel, lane): where
// the query lies, or null. mask(scores, first, count): hides scores of keys that follow `first`. result(panel, lane, state, factor):
// where the weighted values go, or null, and what they are multiplied by.
template <class T, int N, class Row, class Mask, class Result>
static void attend_lanes(const LayerCache& cache, const Pages<T>& pages, int panels, int begin, int end, Room& room, const Row& row,
                         const Mask& mask, const Result& result) {
  constexpr int L = N * W;
  int size = cache.head_size;
  size_t packed = size_t(size) * L;
  float* space = room.reserve(2 * kKeys * size_t(size) + kKeys * L + panels * (2 * packed + 2 * L) + L + 64);
  space = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(space) + 63) / 64 * 64);
  float* keys = space;
  float* values = keys + kKeys * size_t(size);
  float* scores = values + kKeys * size_t(size);
  float* queries = scores + kKeys * L;
  float* sums = queries + panels * packed;
  float* seen = sums + panels * packed;
  float* totals = seen + panels * L;
  float* keep = totals + panels * L;
  for (int p = 0; p < panels; p++) lay_columns<N>([&](int lane) { return row(p, lane); }, size, cache.scale, queries + p * packed);
  if (begin >= end) memset(sums, 0, panels * packed * 4);
  for (int i = 0; i < panels * L; i++) {
    seen[i] = kMinusInfinity;
    totals[i] = 0.0f;
  }
  for (int first = begin, here; first < end; first += here) {
    const Tokens tokens = read_tokens(pages, first, end, size, keys, values);
    here = tokens.count;
    for (int next = first + here; next < end && next < first + here + kKeys; next++) {
      const size_t at = pages.slot(next) * pages.token_step;
      ask_for<0>(pages.keys + at, size);
      ask_for<0>(pages.values + at, size);
    }
    for (int p = 0; p < panels; p++) {
      tiles<N>(tokens.keys, tokens.step, 1, here, queries + p * packed, size, scores, nullptr, nullptr);
      if (cache.soft_cap > 0) cap(scores, here * L, cache.soft_cap);
      mask(scores, first, here);
      soften<N>(scores, here, seen + p * L, totals + p * L, keep);
      float* sum_DL = sums + p * packed;
      if (first == begin)
        tiles<N, false, false>(tokens.values, 1, tokens.step, size, scores, here, sum_DL, nullptr, nullptr);
      else
        tiles<N, true, false>(tokens.values, 1, tokens.step, size, scores, here, sum_DL, keep, nullptr);
    }
  }
  for (int p = 0; p < panels; p++)
    lay_rows<N>(sums + p * packed, size, [&](int lane, float& factor) {
      return result(p, lane, Partial{seen[p * L + lane], totals[p * L + lane]}, factor);
    });
}

// Queries first .. first + count - 1 (at most N * W) of one sequence, a panel for each head of a group.
template <class T, int N>
static void prefill(const LayerCache& cache, const Pages<T>& pages, int group, const float* q, size_t q_stride, float* out,
                    size_t out_stride, int count, int first_position, Room& room) {
  const int size = cache.head_size, window = cache.window;
  int end = first_position + count;  // one past the last key that any query sees
  int begin = window > 0 && first_position - window + 1 > 0 ? first_position - window + 1 : 0;
  attend_lanes<T, N>(
      cache, pages, group, begin, end, room,
      [&](int r, int lane) { return lane < count ? q + size_t(lane) * q_stride + size_t(r) * size : nullptr; },
      [&](float* scores, int first, int here) {
        bool is_cut = first + here - 1 > first_position || (window > 0 && first <= first_position + count - 1 - window);
        if (is_cut) hide<N>(scores, first, here, first_position, window);
      },
      [&](int r, int lane, Partial state, float& factor) {
        factor = 1.0f / state.total;
        return lane < count ? out + size_t(lane) * out_stride + size_t(r) * size : nullptr;
      });
}

// --- a step's work ------------------------------------------------------------------------------------------------------

// The queries, outputs and workspace of a step. Results of what is cut: for each head and part its state, then its weighted values.
struct Rows {
  const LayerCache& cache;
  const Batch& batch;
  const Plan& plan;
  int group, num_heads;
  const float* q;
  size_t q_stride;
  float* out;
  size_t out_stride;
  float* space;

  const float* query(int s, int head) const {
    return q + size_t(batch.query_starts[s]) * q_stride + size_t(head) * cache.head_size;
  }
  float* output(int s, int head) const { return out + size_t(batch.query_starts[s]) * out_stride + size_t(head) * cache.head_size; }
  float* part(int s, int head, int part) const {
    const Plan::Sequence& own = plan.sequences[s];
    return space + own.place + (size_t(head) * own.parts() + part) * (cache.head_size + 2);
  }
};

template <class T>
static void prefill(const Rows& rows, const Item& item) {
  static thread_local Room room;
  const Batch& batch = rows.batch;
  int s = item.sequence, queries = query_length(batch, s), head = item.kv_head * rows.group;
  int first = item.part * kPanel, count = queries - first < kPanel ? queries - first : kPanel;
  auto run = count <= W ? prefill<T, 1> : prefill<T, 2>;
  run(rows.cache, Pages<T>(rows.cache, batch, s, item.kv_head), rows.group, rows.query(s, head) + size_t(first) * rows.q_stride,
      rows.q_stride, rows.output(s, head) + size_t(first) * rows.out_stride, rows.out_stride, count,
      batch.kv_lengths[s] - queries + first, room);
}

// Keys that several sequences share: their queries lie side by side, those of all heads of a group, and each key is read once.
template <class T, int N>
static void decode_shared(const Rows& rows, const Item& item, const std::vector<int>& members, Room& room) {
  constexpr int L = N * W;
  const int count = int(members.size()) * rows.group;
  auto [from, to] = rows.plan.keys_of(item, rows.cache, rows.batch);
  auto head_of = [&](int index) { return item.kv_head * rows.group + index % rows.group; };
  attend_lanes<T, N>(
      rows.cache, Pages<T>(rows.cache, rows.batch, item.sequence, item.kv_head), (count + L - 1) / L, from, to, room,
      [&](int panel, int lane) {
        int index = panel * L + lane;
        return index < count ? rows.query(members[index / rows.group], head_of(index)) : nullptr;
      },
      [](float*, int, int) {},
      [&](int panel, int lane, Partial state, float& factor) -> float* {
        int index = panel * L + lane;
        if (index >= count) return nullptr;
        int s = members[index / rows.group];
        float* place = rows.part(s, head_of(index), rows.plan.sequences[s].cuts + item.part);
        place[0] = state.largest;
        place[1] = state.total;
        factor = 1.0f;
        return place + 2;
      });
}

template <class T>
static void decode_shared(const Rows& rows, const Item& item) {
  static thread_local Room room;
  static thread_local std::vector<int> members;
  members.clear();
  for (int s = item.sequence; s >= 0; s = rows.plan.sequences[s].next) members.push_back(s);
  auto run = int(members.size()) * rows.group <= W ? decode_shared<T, 1> : decode_shared<T, 2>;
  run(rows, item, members, room);
}

// next: what this thread is likely to compute then, or null.
template <class T>
static void decode(const Rows& rows, const Item& item, const Item* next) {
  static thread_local Room room;
  static thread_local std::vector<Partial> partials;
  const LayerCache& cache = rows.cache;
  const int s = item.sequence, group = rows.group, size = cache.head_size, head = item.kv_head * group;
  partials.resize(group);
  auto [begin, end] = rows.plan.keys_of(item, cache, rows.batch);
  auto follow = [&](Round<T>& round) {
    round.count = 0;
    if (!next) return;
    auto [from, to] = rows.plan.keys_of(*next, cache, rows.batch);
    if (from < to) round.find(Pages<T>(cache, rows.batch, next->sequence, next->kv_head), from, to);
  };
  const bool is_whole = rows.plan.sequences[s].parts() == 1;
  float* sums = is_whole ? rows.output(s, head) : room.reserve(size_t(group) * size);
  const Pages<T> pages(cache, rows.batch, s, item.kv_head);
  const float* q = rows.query(s, head);
  if (size == 64)
    decode<64>(cache, pages, group, q, sums, partials.data(), begin, end, follow);
  else if (size == 128)
    decode<128>(cache, pages, group, q, sums, partials.data(), begin, end, follow);
  else
    decode<0>(cache, pages, group, q, sums, partials.data(), begin, end, follow);
  for (int r = 0; r < group; r++) {
    float* row = sums + size_t(r) * size;
    if (is_whole) {
      normalize(row, size, partials[r].total);
      continue;
    }
    float* place = rows.part(s, head + r, item.part);
    place[0] = partials[r].largest;
    place[1] = partials[r].total;
    memcpy(place + 2, row, size_t(size) * 4);
  }
}

// Puts the parts of one sequence together.
static void join(const Rows& rows, int s) {
  const int parts = rows.plan.sequences[s].parts(), size = rows.cache.head_size;
  if (parts == 1 || query_length(rows.batch, s) != 1) return;
  for (int h = 0; h < rows.num_heads; h++) {
    float best = kMinusInfinity, total = 0.0f;
    for (int p = 0; p < parts; p++) best = *rows.part(s, h, p) > best ? *rows.part(s, h, p) : best;
    float* row = rows.output(s, h);
    memset(row, 0, size_t(size) * 4);
    for (int p = 0; p < parts; p++) {
      const float* part = rows.part(s, h, p);
      float weight = part[1] > 0 ? expf(part[0] - best) : 0.0f;
      total += part[1] * weight;
      for (int d = 0; d < size; d++) row[d] += part[2 + d] * weight;
    }
    normalize(row, size, total);
  }
}

template <class T>
static void attend_as(const LayerCache& cache, const Batch& batch, const Plan& plan, int num_heads, const float* q, size_t q_stride, float* out,
                      size_t out_stride, float* space) {
  const Rows rows{cache, batch, plan, num_heads / cache.kv_heads, num_heads, q, q_stride, out, out_stride, space};
  parallel(int(plan.items.size()), [&](int index, int) {
    const Item& item = plan.items[index];
    if (query_length(batch, item.sequence) > 1) return prefill<T>(rows, item);
    if (item.is_shared) return decode_shared<T>(rows, item);
    decode<T>(rows, item, size_t(index) + 1 < plan.items.size() ? &plan.items[index + 1] : nullptr);
  });
  if (plan.has_shared)
    parallel(batch.num_sequences, [&](int s, int) { join(rows, s); });
  else if (plan.used > 0)
    for (int s = 0; s < batch.num_sequences; s++) join(rows, s);
}

template <class T>
static void write_as(const LayerCache& cache, const Batch& batch, const float* keys, const float* values, size_t stride) {
  int row = cache.kv_heads * cache.head_size;
  for (int t = 0; t < batch.num_tokens; t++) {
    size_t at = size_t(batch.slots[t]) * row;
    T* key = static_cast<T*>(cache.keys) + at;
    T* value = static_cast<T*>(cache.values) + at;
    const float *k = keys + size_t(t) * stride, *v = values + size_t(t) * stride;
    int i = 0;
    for (; i + W <= row; i += W) {
      store(key + i, load(k + i));
      store(value + i, load(v + i));
    }
    for (; i < row; i++) {
      put(key + i, k[i]);
      put(value + i, v[i]);
    }
  }
}

template <class T>
static void write_codes(const LayerCache& cache, const Batch& batch, const float* keys, const float* values, size_t stride) {
  int size = cache.head_size;
  for (int t = 0; t < batch.num_tokens; t++)
    for (int g = 0; g < cache.kv_heads; g++) {
      size_t row = size_t(batch.slots[t]) * cache.kv_heads + g, from = size_t(t) * stride + size_t(g) * size;
      cache.key_scales[row] = encode(keys + from, static_cast<T*>(cache.keys) + row * size, size);
      cache.value_scales[row] = encode(values + from, static_cast<T*>(cache.values) + row * size, size);
    }
}

}  // namespace

void write_cache(const LayerCache& cache, const Batch& batch, const float* keys, const float* values, size_t stride) {
  auto write = cache.format == CacheFormat::kFloat32    ? write_as<float>
               : cache.format == CacheFormat::kBfloat16 ? write_as<bf16>
               : cache.format == CacheFormat::kInt8     ? write_codes<int8_t>
                                                        : write_codes<fp8>;
  write(cache, batch, keys, values, stride);
}

size_t attention_floats(int num_sequences, int num_heads, int kv_heads, int head_size) {
  // num_splits makes fewer than 8 parts a thread, over all sequences and key/value heads. Who shares a prefix has a part of its own
  // keys besides those.
  size_t cut = size_t(8) * num_threads() * (num_heads / kv_heads);
  size_t shared = num_sequences > 1 ? size_t(num_sequences) * num_heads * (kMostShares + 1) : 0;
  return (cut + shared) * (head_size + 2);
}

void attend(const LayerCache& cache, const Batch& batch, const Plan& plan, int num_heads, const float* q, size_t q_stride, float* out,
            size_t out_stride, float* space) {
  auto run = cache.format == CacheFormat::kFloat32    ? attend_as<float>
             : cache.format == CacheFormat::kBfloat16 ? attend_as<bf16>
             : cache.format == CacheFormat::kInt8     ? attend_as<int8_t>
                                                      : attend_as<fp8>;
  run(cache, batch, plan, num_heads, q, q_stride, out, out_stride, space);
}

}  // namespace dt
