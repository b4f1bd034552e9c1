// What is asked for while products are computed, because it is read next: memory has little else to do then, and the last cache keeps it.
#pragma once
#include <cstddef>
#include <vector>

namespace dt {

// Of every four inputs that a tile multiplies.
constexpr int kAheadLines = 2;

struct Ahead {
  // Bytes that lie side by side, at the same place of two arrays.
  struct Run {
    size_t offset, bytes;
  };

  // What one thread reads next, in its order: of each run the first array's part, then the second's.
  struct alignas(64) Share {
    std::vector<Run> runs;
    const char* bases[2];
    size_t taken = 0;
    const char *at = nullptr, *end = nullptr;

    bool has_more() {
      if (at < end) return true;
      if (taken == 2 * runs.size()) return false;
      const Run& run = runs[taken / 2];
      at = bases[taken % 2] + run.offset;
      end = at + run.bytes;
      taken++;
      return true;
    }
  };
  std::vector<Share> shares;  // one a thread
  size_t most_bytes = 0;      // of the largest share

  void begin(const void* first, const void* second) {
    for (Share& share : shares) {
      share.bases[0] = static_cast<const char*>(first);
      share.bases[1] = static_cast<const char*>(second);
      share.taken = 0;
      share.at = share.end = nullptr;
    }
  }
};

}  // namespace dt
