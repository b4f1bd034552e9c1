// How the attention of a step is cut into work: runs of a prompt's queries, cuts of a long decode's keys, and keys that decodes share.
#pragma once
#include <unistd.h>
#include <utility>
#include <vector>

#include "ahead.h"
#include "attention.h"
#include "pool.h"

namespace dt {

constexpr int kSplitTokens = 512;  // a decode over more is cut, so that all threads have work
constexpr int kLeastShared = 128;  // tokens that sequences must have in common to be attended at once (measured)
constexpr int kLeastLanes = W / 2;  // and queries of one key/value head, of all of them together
constexpr int kShareTokens = 128;  // a shared prefix is cut, so that all threads have work
constexpr int kMostShares = 4;

static inline int query_length(const Batch& batch, int s) { return batch.query_starts[s + 1] - batch.query_starts[s]; }
static inline int num_splits(int keys, int items) {
  if (keys <= 2 * kSplitTokens || items >= 4 * num_threads()) return 1;
  int most = keys / kSplitTokens, useful = (4 * num_threads() + items - 1) / items;
  return most < useful ? most : useful;
}
static inline int visible(const LayerCache& cache, int length) {
  return cache.window > 0 && cache.window < length ? cache.window : length;
}

// part: which run of queries (prefill) or which cut of the keys (decode). For keys that several sequences share, `sequence` is the
// first of them.
struct Item {
  int sequence, kv_head, part;
  bool is_shared = false;
};

// How the work of a step is cut, and where the results of what is cut lie.
struct Plan {
  std::vector<Item> items;
  // cuts: of its own keys. first: of those that it shares its first `tokens` keys with; itself, where it is that one or shares none.
  // next: another of them, or -1. members: how many they are; known to the first. shares: cuts of what is shared. place: of its parts.
  struct Sequence {
    int cuts, first, next, members, tokens, shares;
    size_t place;
    int parts() const { return cuts + shares; }
  };
  std::vector<Sequence> sequences;
  size_t used = 0;
  bool has_shared = false;
  std::vector<int> firsts_by_block;

  bool is_shared(const Sequence& first, int group) const { return first.members > 1 && first.members * group >= kLeastLanes; }

  // Decodes whose tables begin with the same blocks read the same keys there: a prefix that they found in the cache.
  void find_shared(const LayerCache& cache, const Batch& batch, int group) {
    size_t size = 4;
    while (size < 2 * size_t(batch.num_sequences)) size *= 2;
    firsts_by_block.assign(size, -1);
    for (int s = 0; s < batch.num_sequences; s++) {
      // The block of the query itself is its own.
      int length = batch.kv_lengths[s], blocks = (length - 1) / cache.block_size;
      if (query_length(batch, s) != 1 || visible(cache, length) < length || blocks * cache.block_size < kLeastShared) continue;
      const int32_t* table = batch.tables + size_t(s) * batch.table_stride;
      size_t at = uint32_t(table[0]) * 2654435761u & (size - 1);
      auto table_of = [&](int other) { return batch.tables + size_t(other) * batch.table_stride; };
      while (firsts_by_block[at] >= 0 && table_of(firsts_by_block[at])[0] != table[0]) at = (at + 1) & (size - 1);
      if (firsts_by_block[at] < 0) {
        firsts_by_block[at] = s;
        sequences[s].tokens = blocks * cache.block_size;
        continue;
      }
      Sequence& first = sequences[firsts_by_block[at]];
      const int32_t* other = table_of(firsts_by_block[at]);
      int most = first.tokens / cache.block_size, common = 0;
      while (common < most && common < blocks && table[common] == other[common]) common++;
      int tokens = common * cache.block_size;
      // One that has less in common than the others must not cost them more than it gains.
      if (tokens < kLeastShared || first.members * tokens < (first.members - 1) * first.tokens) continue;
      sequences[s].first = firsts_by_block[at];
      sequences[s].next = first.next;
      first.next = s;
      first.members++;
      first.tokens = tokens;
    }
    for (int s = 0; s < batch.num_sequences; s++) {  // of those that share, the first comes first
      Sequence& own = sequences[s];
      const Sequence& first = sequences[own.first];
      if (own.first != s)
        own.tokens = first.tokens;
      else if (!is_shared(first, group))
        own.tokens = 0;
      has_shared |= own.tokens > 0;
    }
  }

  void make(const LayerCache& cache, const Batch& batch, int num_heads) {
    items.clear();
    used = 0;
    has_shared = false;
    sequences.resize(batch.num_sequences);
    int decodes = 0;
    for (int s = 0; s < batch.num_sequences; s++) {
      sequences[s] = {1, s, -1, 1, 0, 0, 0};
      decodes += query_length(batch, s) == 1;
    }
    if (decodes > 1) find_shared(cache, batch, num_heads / cache.kv_heads);
    for (int s = 0; s < batch.num_sequences; s++) {
      int queries = query_length(batch, s), runs = (queries + kPanel - 1) / kPanel;
      if (queries == 1) continue;
      for (int run = runs - 1; run >= 0; run--)  // the last sees most keys: longest work first
        for (int g = 0; g < cache.kv_heads; g++) items.push_back({s, g, run});
    }
    if (has_shared) add_shared(cache);
    for (int s = 0; s < batch.num_sequences; s++) {
      if (query_length(batch, s) != 1) continue;
      Sequence& own = sequences[s];
      own.cuts = num_splits(visible(cache, batch.kv_lengths[s]) - own.tokens, decodes * cache.kv_heads);
      own.shares = sequences[own.first].shares;
      for (int g = 0; g < cache.kv_heads; g++)
        for (int part = 0; part < own.cuts; part++) items.push_back({s, g, part});
      own.place = used;
      if (own.parts() > 1) used += size_t(num_heads) * own.parts() * (cache.head_size + 2);
    }
  }

  void add_shared(const LayerCache& cache) {
    int prefixes = 0;
    for (size_t s = 0; s < sequences.size(); s++) prefixes += sequences[s].first == int(s) && sequences[s].tokens > 0;
    for (size_t s = 0; s < sequences.size(); s++) {
      Sequence& own = sequences[s];
      if (own.first != int(s) || own.tokens == 0) continue;
      int useful = (4 * num_threads() + prefixes * cache.kv_heads - 1) / (prefixes * cache.kv_heads), most = own.tokens / kShareTokens;
      own.shares = useful < most ? useful : most;
      own.shares = own.shares < 1 ? 1 : own.shares > kMostShares ? kMostShares : own.shares;
      for (int g = 0; g < cache.kv_heads; g++)
        for (int part = 0; part < own.shares; part++) items.push_back({int(s), g, part, true});
    }
  }

  // The keys of a decode's part, or of one of what is shared: from, to.
  std::pair<int, int> keys_of(const Item& item, const LayerCache& cache, const Batch& batch) const {
    const Sequence& own = sequences[item.sequence];
    int length = batch.kv_lengths[item.sequence], end = item.is_shared ? own.tokens : length;
    int begin = item.is_shared ? 0 : length - visible(cache, length) + own.tokens, cuts = item.is_shared ? own.shares : own.cuts;
    int size = (end - begin + cuts - 1) / cuts, from = begin + item.part * size;
    from = from < end ? from : end;
    return {from, from + size < end ? from + size : end};
  }
};

// Bytes that each thread asks for ahead, at most: more push each other, or the weights in between, out of the last cache (3 to 4 MB
// measured best where a thread has 16 MB of it).
constexpr size_t kMostAhead = 3 << 20;

static inline size_t most_ahead() {
#if defined(_SC_LEVEL3_CACHE_SIZE)
  static const long cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
  const size_t share = cache > 0 ? size_t(cache) / 4 / num_threads() : 0;
  return share < kMostAhead ? share : kMostAhead;
#else
  return 0;  // who can't say how large it is may have none
#endif
}

// Where the keys and values lie that each thread's decodes read first, in the arrays of any layer with this plan.
static inline void find_ahead(const Plan& plan, const LayerCache& cache, const Batch& batch, Ahead& ahead) {
  const size_t threads = num_threads(), count = plan.items.size(), block = cache.block_size;
  const size_t row = size_t(cache.kv_heads) * cache.head_size * number_bytes(cache.format);
  ahead.shares.resize(threads);
  ahead.most_bytes = 0;
  for (size_t thread = 0; thread < threads; thread++) {
    std::vector<Ahead::Run>& runs = ahead.shares[thread].runs;
    runs.clear();
    const size_t most = most_ahead() / 2;  // of keys, and as much of values
    size_t bytes = 0;
    Item first{-1, 0, 0};  // of those over the same keys: rows hold all heads
    for (size_t i = count * thread / threads; i < count * (thread + 1) / threads && bytes < most; i++) {
      const Item& item = plan.items[i];
      if (query_length(batch, item.sequence) > 1) continue;
      if (item.sequence != first.sequence || item.is_shared != first.is_shared) first = item;
      if (item.kv_head != first.kv_head) continue;
      auto [from, to] = plan.keys_of(item, cache, batch);
      const int32_t* table = batch.tables + size_t(item.sequence) * batch.table_stride;
      for (size_t token = from, stop; token < size_t(to) && bytes < most; token = stop) {
        stop = (token / block + 1) * block < size_t(to) ? (token / block + 1) * block : size_t(to);
        const size_t wanted = (stop - token) * row, taken = wanted < most - bytes ? wanted : most - bytes;
        runs.push_back({(size_t(table[token / block]) * block + token % block) * row, taken});
        bytes += taken;
      }
    }
    ahead.most_bytes = 2 * bytes > ahead.most_bytes ? 2 * bytes : ahead.most_bytes;
  }
}

}  // namespace dt
