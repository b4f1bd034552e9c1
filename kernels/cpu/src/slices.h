// A step's rows cut into slices, each of which one thread takes through all layers.
//
// Threads that share the outputs of each product wait for each other nine times a layer, and read activations that another core
// has written. One that has rows of its own does neither; but it reads all weights, which the last cache then gives to every thread.
// So each must have rows enough to compute with a weight for longer than it takes to come.
#pragma once
#include <algorithm>
#include <atomic>
#include <deque>
#include <vector>

#include "attention_plan.h"
#include "decoder.h"
#include "pool.h"

namespace dt {

// Rows of a slice for each thread there is, at least: two threads with 32 each measured 1.04 times as fast as both over all 64. More
// threads ask the last cache for weights more often, unless they compute as much longer.
constexpr int kLeastSliceRows = 16;
// The dearest slice may cost so many times what it would if all were equal and filled as many vectors: else nothing is gained.
constexpr double kMostUneven = 1.03;
// An end that fills no vector must be so many times as good as one that does: costs are but estimates.
constexpr double kUnaligned = 1.03;
// What reading a byte of keys and values costs a decode, in multiply-adds of a product, and what a multiply-add of a prompt's attention
// does, softmax included (fitted to when the threads of steps of 64 and 512 rows end).
constexpr double kReadingCost = 2.5, kAttendingCost = 1.25;

// Rows first .. end - 1 of a step, as a step of their own. No sequence may read what another writes in the same step.
struct Slice {
  dt_step step;
  int first, end;
  bool continues;  // its first sequence has rows in the slice before, whose keys it reads
  std::atomic<int64_t> layers_written{0};  // whose keys and values are in the cache, those of the slice before included if it continues
  std::vector<int32_t> query_starts, kv_lengths;
  std::vector<const int32_t*> tables;
  std::vector<const int64_t*> slots;
  std::vector<const float*> cos, sin;

  Slice(const dt_decoder& model, const dt_step& all, int first, int end) : step(all), first(first), end(end) {
    int sequence = 0, last;
    while (all.query_starts[sequence + 1] <= first) sequence++;
    continues = all.query_starts[sequence] < first;
    for (last = sequence; last < all.num_sequences && all.query_starts[last] < end; last++) {
      const int stop = all.query_starts[last + 1];
      query_starts.push_back(all.query_starts[last] > first ? all.query_starts[last] - first : 0);
      kv_lengths.push_back(all.kv_lengths[last] - (stop > end ? stop - end : 0));
    }
    query_starts.push_back(end - first);
    int64_t groups = 0, ropes = 0;
    for (int64_t i = 0; i < model.num_layers; i++) {
      groups = model.layers[i].group >= groups ? model.layers[i].group + 1 : groups;
      ropes = model.layers[i].rope >= ropes ? model.layers[i].rope + 1 : ropes;
    }
    for (int64_t group = 0; group < groups; group++) {
      tables.push_back(all.tables[group] + sequence * all.table_strides[group]);
      slots.push_back(all.slots[group] + first);
    }
    for (int64_t rope = 0; rope < ropes; rope++) {
      cos.push_back(all.cos[rope] + size_t(first) * model.rotary);
      sin.push_back(all.sin[rope] + size_t(first) * model.rotary);
    }
    step.num_sequences = last - sequence;
    step.num_tokens = end - first;
    step.query_starts = query_starts.data();
    step.kv_lengths = kv_lengths.data();
    step.tables = tables.data();
    step.slots = slots.data();
    step.cos = cos.data();
    step.sin = sin.data();
  }

  // The slice before may be behind.
  void wait_for(int64_t layers) const {
    wait_until([&] { return layers_written.load(std::memory_order_acquire) >= layers; });
  }
};

// What rows of a step cost, in multiply-adds of a layer.
struct Costs {
  const dt_step& step;
  double products;                // of a row
  std::vector<double> attention;  // of the rows before each sequence; of all

  Costs(const dt_decoder& model, const dt_step& step) : step(step), products(0), attention(1, 0.0) {
    const dt_layer& layer = model.layers[0];
    for (const dt_matrix* m : {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down})
      products += double(m->rows) * double(m->cols);
    const double bytes = 2.0 * double(model.kv_heads * model.head_size) * double(number_bytes(CacheFormat(model.cache_format)));
    const double sums = 2.0 * double(model.num_heads * model.head_size);
    for (int64_t s = 0; s < step.num_sequences; s++) {
      const int queries = step.query_starts[s + 1] - step.query_starts[s];
      const double length = step.kv_lengths[s] - (queries - 1) / 2.0;
      double keys = 0;
      for (int64_t i = 0; i < model.num_layers; i++) {
        const double window = double(model.layers[i].window);
        keys += (window > 0 && window < length ? window : length) / double(model.num_layers);
      }
      attention.push_back(attention.back() + queries * keys * (queries == 1 ? bytes * kReadingCost : sums * kAttendingCost));
    }
  }

  // Of attention in the rows before this one. Each row of a prompt sees a key more than the one before it.
  double attention_before(int row) const {
    const int64_t s = std::upper_bound(step.query_starts, step.query_starts + step.num_sequences, row) - step.query_starts - 1;
    const double rows = row - step.query_starts[s], queries = step.query_starts[s + 1] - step.query_starts[s];
    const double seen = step.kv_lengths[s] - queries;
    return attention[s] + (attention[s + 1] - attention[s]) * rows * (seen + rows / 2) / (queries * (seen + queries / 2));
  }
  double of(int first, int end) const {
    return products * rows_of_panels(end - first) + attention_before(end) - attention_before(first);
  }
};

// Where slices of about equal cost end, as many as `count`; none where the dearest of them would cost too much.
static inline std::vector<int> slice_ends(const Costs& costs, int count) {
  const int tokens = int(costs.step.num_tokens);
  const double share = costs.of(0, tokens) / count, each = (costs.products * tokens + costs.attention_before(tokens)) / count;
  std::vector<int> ends;
  double most = 0;
  for (int first = 0; first < tokens; first = ends.back()) {
    const int others = count - int(ends.size()) - 1;  // that follow
    int best = tokens;
    double least = costs.of(first, tokens);
    if (others > 0) {
      int end = first + 1;
      for (int stop = tokens - others; end < stop;) {  // the first row that the share is passed with
        const int middle = (end + stop) / 2;
        if (costs.products * middle + costs.attention_before(middle) < each * double(ends.size() + 1))
          end = middle + 1;
        else
          stop = middle;
      }
      const int whole = first + (end - first) / W * W;  // where vectors are full, before that and behind
      for (int candidate : {whole, whole + W, end}) {
        if (candidate <= first || candidate > tokens - others) continue;
        const double rest = costs.of(candidate, tokens) / others, own = costs.of(first, candidate);
        const double dearest = (own > rest ? own : rest) * ((candidate - first) % W > 0 ? kUnaligned : 1);
        if (dearest < least) {
          least = dearest;
          best = candidate;
        }
      }
    }
    most = costs.of(first, best) > most ? costs.of(first, best) : most;
    ends.push_back(best);
  }
  if (most > kMostUneven * share || int(ends.size()) < count) ends.clear();
  return ends;
}

}  // namespace dt
