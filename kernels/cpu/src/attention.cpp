#include "attention.h"

#include <cmath>
#include <vector>

#include "pool.h"
#include "tile.h"

namespace dt {
namespace {

constexpr int kKeys = 48;         // keys in one round of the online softmax
constexpr int kSplitTokens = 512;  // a decode over more is cut, so that all threads have work
constexpr float kMinusInfinity = -INFINITY;

template <class T>
struct Pages {
  const T* keys;
  const T* values;
  const int32_t* table;
  int block_size;
  size_t token_step;

  Pages(const LayerCache& cache, const Batch& batch, int sequence, int kv_head)
      : keys(static_cast<const T*>(cache.keys) + size_t(kv_head) * cache.head_size),
        values(static_cast<const T*>(cache.values) + size_t(kv_head) * cache.head_size),
        table(batch.tables + size_t(sequence) * batch.table_stride),
        block_size(cache.block_size),
        token_step(size_t(cache.kv_heads) * cache.head_size) {}

  size_t at(int token) const {
    return (size_t(table[token / block_size]) * block_size + token % block_size) * token_step;
  }
};

static inline void copy_row(const float* from, float* to, int size) { memcpy(to, from, size * 4); }
static inline void copy_row(const bf16* from, float* to, int size) {
  int i = 0;
  for (; i + W <= size; i += W) store(to + i, load(from + i));
  for (; i < size; i++) to[i] = to_float(from[i]);
}

// --- decode: one query a head, all heads of a group at once --------------------------------------------------------------

// The state of an online softmax for one head: the largest score so far, the sum of exponentials, and the weighted values.
struct Partial {
  float largest, total;
};

template <class T>
static float dot(const float* q, const T* key, int size) {
  vf sums[2] = {};
  int d = 0;
  for (; d + 2 * W <= size; d += 2 * W) {
    sums[0] += load(q + d) * load(key + d);
    sums[1] += load(q + d + W) * load(key + d + W);
  }
  for (; d + W <= size; d += W) sums[0] += load(q + d) * load(key + d);
  float total = sum(sums[0] + sums[1]);
  for (; d < size; d++) total += q[d] * get(key + d);
  return total;
}

template <class T>
static void dot4(const float* q, const T* const (&keys)[4], int size, float* out) {
  vf sums[4] = {};
  int d = 0;
  for (; d + W <= size; d += W) {
    vf x = load(q + d);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) sums[i] += x * load(keys[i] + d);
  }
  sum4(sums[0], sums[1], sums[2], sums[3], out);
  for (; d < size; d++)
    for (int i = 0; i < 4; i++) out[i] += q[d] * get(keys[i] + d);
}

static void cap(float* scores, int count, float soft_cap) {
  for (int i = 0; i < count; i += W) store(scores + i, vtanh(load(scores + i) * (1.0f / soft_cap)) * soft_cap);
}

// out[d] = out[d] * keep + sum over tokens of p[i] * value[i][d]
template <class T>
static void add_values(float* out, float keep, const float* p, const T* const* values, int count, int size) {
  int d = 0;
  for (; d + 4 * W <= size; d += 4 * W) {
    vf sums[4];
    for (int j = 0; j < 4; j++) sums[j] = load(out + d + j * W) * keep;
    for (int i = 0; i < count; i++) {
      vf weight = splat(p[i]);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) sums[j] += weight * load(values[i] + d + j * W);
    }
    for (int j = 0; j < 4; j++) store(out + d + j * W, sums[j]);
  }
  for (; d + W <= size; d += W) {
    vf total = load(out + d) * keep;
    for (int i = 0; i < count; i++) total += splat(p[i]) * load(values[i] + d);
    store(out + d, total);
  }
  for (; d < size; d++) {
    float total = out[d] * keep;
    for (int i = 0; i < count; i++) total += p[i] * get(values[i] + d);
    out[d] = total;
  }
}

// Keys begin .. end - 1 of one sequence, for the `group` query heads that share kv_head: heads' rows of q and out are D apart.
template <class T>
static void decode(const LayerCache& cache, const Pages<T>& pages, int group, const float* q, float* out, Partial* partials,
                   int begin, int end) {
  constexpr int kRow = (kKeys + W - 1) / W * W;
  int size = cache.head_size;
  for (int r = 0; r < group; r++) {
    partials[r] = {kMinusInfinity, 0.0f};
    memset(out + size_t(r) * size, 0, size * 4);
  }
  alignas(64) float scores[kRow];
  const T* keys[kKeys];
  const T* values[kKeys];
  for (int first = begin; first < end; first += kKeys) {
    int count = end - first < kKeys ? end - first : kKeys;
    for (int i = 0; i < count; i++) {
      size_t at = pages.at(first + i);
      keys[i] = pages.keys + at;
      values[i] = pages.values + at;
    }
    for (int r = 0; r < group; r++) {
      const float* query = q + size_t(r) * size;
      int i = 0;
      for (; i + 4 <= count; i += 4) {
        const T* const four[4] = {keys[i], keys[i + 1], keys[i + 2], keys[i + 3]};
        dot4(query, four, size, scores + i);
      }
      for (; i < count; i++) scores[i] = dot(query, keys[i], size);
      for (; i < kRow; i++) scores[i] = 0.0f;
      for (i = 0; i < count; i += W) store(scores + i, load(scores + i) * cache.scale);
      if (cache.soft_cap > 0) cap(scores, count, cache.soft_cap);
      for (i = count; i < kRow; i++) scores[i] = kMinusInfinity;
      vf best = splat(partials[r].largest);
      for (i = 0; i < count; i += W) best = vmax(load(scores + i), best);
      float now = largest(best);
      vf total = {};
      for (i = 0; i < count; i += W) {
        vf p = vexp(load(scores + i) - now);
        store(scores + i, p);
        total += p;
      }
      float keep = partials[r].largest == kMinusInfinity ? 0.0f : expf(partials[r].largest - now);
      partials[r] = {now, partials[r].total * keep + sum(total)};
      add_values(out + size_t(r) * size, keep, scores, values, count, size);
    }
  }
}

static void normalize(float* out, int size, float total) {
  float factor = 1.0f / total;
  for (int d = 0; d < size; d++) out[d] *= factor;
}

// --- prefill: lanes are tokens --------------------------------------------------------------------------------------------

struct Room {
  std::vector<float> data;
  float* reserve(size_t count) {
    if (data.size() < count) data.resize(count);
    return data.data();
  }
};

// Scores that a query must not see become minus infinity. Lane i is the query at position first_query + i.
template <int N>
static void hide(float* scores, int first_key, int count, int first_query, int window) {
  for (int j = 0; j < count; j++)
    for (int lane = 0; lane < N * W; lane++) {
      int position = first_query + lane, key = first_key + j;
      if (key > position || (window > 0 && key <= position - window)) scores[j * N * W + lane] = kMinusInfinity;
    }
}

// One round of the online softmax over `count` keys, lane by lane; scores become weights.
template <int N>
static void soften(float* scores, int count, float* largest_seen, float* totals, float* keep) {
  for (int n = 0; n < N; n++) {
    float* column = scores + n * W;
    vf before = load(largest_seen + n * W), best = before;
    for (int j = 0; j < count; j++) best = vmax(load(column + j * N * W), best);
    // A lane that has seen no key yet keeps minus infinity; its weights are 0, not exp(inf - inf).
    vf base = select(best == splat(kMinusInfinity), vf{}, best);
    vf total = {};
    for (int j = 0; j < count; j++) {
      vf p = vexp(load(column + j * N * W) - base);
      store(column + j * N * W, p);
      total += p;
    }
    vf kept = vexp(before - base);
    store(keep + n * W, kept);
    store(totals + n * W, load(totals + n * W) * kept + total);
    store(largest_seen + n * W, best);
  }
}

// Queries first .. first + count - 1 (at most N * W) of one sequence, for all heads of a group.
template <class T, int N>
static void prefill(const LayerCache& cache, const Pages<T>& pages, int group, const float* q, size_t q_stride, float* out,
                    size_t out_stride, int count, int first_position, Room& room) {
  constexpr int L = N * W;
  int size = cache.head_size;
  size_t packed = size_t(size) * L;
  float* space = room.reserve(2 * kKeys * size_t(size) + kKeys * L + group * (2 * packed + 2 * L) + L + 64);
  space = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(space) + 63) / 64 * 64);
  float* keys = space;
  float* values = keys + kKeys * size_t(size);
  float* scores = values + kKeys * size_t(size);
  float* queries = scores + kKeys * L;
  float* sums = queries + group * packed;
  float* seen = sums + group * packed;
  float* totals = seen + group * L;
  float* keep = totals + group * L;
  memset(sums, 0, group * packed * 4);
  for (int r = 0; r < group; r++)
    for (int lane = 0; lane < L; lane++) {
      const float* row = q + size_t(lane) * q_stride + size_t(r) * size;
      for (int d = 0; d < size; d++) queries[r * packed + size_t(d) * L + lane] = lane < count ? row[d] * cache.scale : 0.0f;
    }
  for (int i = 0; i < group * L; i++) {
    seen[i] = kMinusInfinity;
    totals[i] = 0.0f;
  }
  int last = first_position + count;  // one past the last key that any query sees
  int begin = cache.window > 0 && first_position - cache.window + 1 > 0 ? first_position - cache.window + 1 : 0;
  for (int first = begin; first < last; first += kKeys) {
    int here = last - first < kKeys ? last - first : kKeys;
    for (int j = 0; j < here; j++) {
      size_t at = pages.at(first + j);
      copy_row(pages.keys + at, keys + size_t(j) * size, size);
      copy_row(pages.values + at, values + size_t(j) * size, size);
    }
    bool is_cut = first + here - 1 > first_position || (cache.window > 0 && first <= first_position + count - 1 - cache.window);
    for (int r = 0; r < group; r++) {
      tiles<N>(keys, size, 1, here, queries + r * packed, size, scores);
      if (cache.soft_cap > 0) cap(scores, here * L, cache.soft_cap);
      if (is_cut) hide<N>(scores, first, here, first_position, cache.window);
      soften<N>(scores, here, seen + r * L, totals + r * L, keep);
      float* sum_DL = sums + r * packed;
      for (int d = 0; d < size; d++)
        for (int n = 0; n < N; n++)
          store(sum_DL + size_t(d) * L + n * W, load(sum_DL + size_t(d) * L + n * W) * load(keep + n * W));
      tiles<N, true, false>(values, 1, size, size, scores, here, sum_DL);
    }
  }
  for (int r = 0; r < group; r++)
    for (int lane = 0; lane < count; lane++) {
      float factor = 1.0f / totals[r * L + lane];
      float* row = out + size_t(lane) * out_stride + size_t(r) * size;
      for (int d = 0; d < size; d++) row[d] = sums[r * packed + size_t(d) * L + lane] * factor;
    }
}

// --- a step's work ------------------------------------------------------------------------------------------------------

// part: which run of queries (prefill) or which cut of the keys (decode).
struct Item {
  int sequence, kv_head, part;
};

static inline int query_length(const Batch& batch, int s) { return batch.query_starts[s + 1] - batch.query_starts[s]; }
static inline int num_splits(int keys, int items) {
  if (keys <= 2 * kSplitTokens || items >= 4 * num_threads()) return 1;
  int most = keys / kSplitTokens, useful = (4 * num_threads() + items - 1) / items;
  return most < useful ? most : useful;
}
static inline int visible(const LayerCache& cache, int length) {
  return cache.window > 0 && cache.window < length ? cache.window : length;
}

template <class T>
static void attend_as(const LayerCache& cache, const Batch& batch, int num_heads, const float* q, size_t q_stride, float* out,
                      size_t out_stride, float* space) {
  int group = num_heads / cache.kv_heads, size = cache.head_size;
  static thread_local std::vector<Item> items;
  static thread_local std::vector<int> splits;
  items.clear();
  splits.assign(batch.num_sequences, 1);
  int decodes = 0;
  for (int s = 0; s < batch.num_sequences; s++) decodes += query_length(batch, s) == 1;
  for (int s = 0; s < batch.num_sequences; s++) {
    int queries = query_length(batch, s);
    if (queries > 1) {
      int runs = (queries + kPanel - 1) / kPanel;
      for (int run = runs - 1; run >= 0; run--)  // the last sees most keys: longest work first
        for (int g = 0; g < cache.kv_heads; g++) items.push_back({s, g, run});
    }
  }
  for (int s = 0; s < batch.num_sequences; s++) {
    if (query_length(batch, s) != 1) continue;
    splits[s] = num_splits(visible(cache, batch.kv_lengths[s]), decodes * cache.kv_heads);
    for (int g = 0; g < cache.kv_heads; g++)
      for (int part = 0; part < splits[s]; part++) items.push_back({s, g, part});
  }
  // Results of a cut decode: for each head and part its state, then its weighted values.
  size_t part_floats = size + 2;
  std::vector<size_t> places(batch.num_sequences, 0);
  size_t used = 0;
  for (int s = 0; s < batch.num_sequences; s++)
    if (splits[s] > 1) {
      places[s] = used;
      used += size_t(num_heads) * splits[s] * part_floats;
    }
  const std::vector<Item>& work = items;
  const std::vector<int>& cuts = splits;
  parallel(int(work.size()), [&](int index, int) {
    const Item& item = work[index];
    int s = item.sequence, start = batch.query_starts[s], queries = query_length(batch, s);
    Pages<T> pages(cache, batch, s, item.kv_head);
    size_t head = size_t(item.kv_head) * group * size;
    if (queries > 1) {
      static thread_local Room room;
      int first = item.part * kPanel, count = queries - first < kPanel ? queries - first : kPanel;
      int position = batch.kv_lengths[s] - queries + first;
      auto run = count <= W ? prefill<T, 1> : prefill<T, 2>;
      run(cache, pages, group, q + size_t(start + first) * q_stride + head, q_stride, out + size_t(start + first) * out_stride + head,
          out_stride, count, position, room);
      return;
    }
    static thread_local std::vector<Partial> partials;
    partials.resize(group);
    int end = batch.kv_lengths[s], begin = end - visible(cache, end);
    const float* query = q + size_t(start) * q_stride + head;
    if (cuts[s] == 1) {
      float* row = out + size_t(start) * out_stride + head;
      decode(cache, pages, group, query, row, partials.data(), begin, end);
      for (int r = 0; r < group; r++) normalize(row + size_t(r) * size, size, partials[r].total);
      return;
    }
    int length = (end - begin + cuts[s] - 1) / cuts[s];
    int from = begin + item.part * length, to = from + length < end ? from + length : end;
    static thread_local Room room;
    float* rows = room.reserve(size_t(group) * size);
    decode(cache, pages, group, query, rows, partials.data(), from < end ? from : end, to);
    for (int r = 0; r < group; r++) {
      float* place = space + places[s] + (size_t(item.kv_head * group + r) * cuts[s] + item.part) * part_floats;
      place[0] = partials[r].largest;
      place[1] = partials[r].total;
      memcpy(place + 2, rows + size_t(r) * size, size * 4);
    }
  });
  if (used == 0) return;
  for (int s = 0; s < batch.num_sequences; s++) {
    if (splits[s] == 1) continue;
    for (int h = 0; h < num_heads; h++) {
      const float* parts = space + places[s] + size_t(h) * splits[s] * part_floats;
      float best = kMinusInfinity, total = 0.0f;
      for (int p = 0; p < splits[s]; p++) best = parts[p * part_floats] > best ? parts[p * part_floats] : best;
      float* row = out + size_t(batch.query_starts[s]) * out_stride + size_t(h) * size;
      memset(row, 0, size * 4);
      for (int p = 0; p < splits[s]; p++) {
        const float* part = parts + p * part_floats;
        float weight = part[1] > 0 ? expf(part[0] - best) : 0.0f;
        total += part[1] * weight;
        for (int d = 0; d < size; d++) row[d] += part[2 + d] * weight;
      }
      normalize(row, size, total);
    }
  }
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

}  // namespace

void write_cache(const LayerCache& cache, const Batch& batch, const float* keys, const float* values, size_t stride) {
  (cache.format == Format::kFloat32 ? write_as<float> : write_as<bf16>)(cache, batch, keys, values, stride);
}

size_t attention_floats(int num_heads, int kv_heads, int head_size) {
  // num_splits makes fewer than 8 parts a thread, over all sequences and key/value heads.
  return size_t(8) * num_threads() * (num_heads / kv_heads) * (head_size + 2);
}

void attend(const LayerCache& cache, const Batch& batch, int num_heads, const float* q, size_t q_stride, float* out,
            size_t out_stride, float* space) {
  (cache.format == Format::kFloat32 ? attend_as<float> : attend_as<bf16>)(cache, batch, num_heads, q, q_stride, out, out_stride,
                                                                         space);
}

}  // namespace dt
