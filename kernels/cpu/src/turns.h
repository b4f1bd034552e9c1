// How a thread walks through outputs when weights stream by: in turns of some that are computed together.
#pragma once
#include <type_traits>

#include "matmul.h"

namespace dt {

constexpr int kFewChunk = kStreams > 1 ? 32 : 16;  // outputs of a turn of whole activations

// Outputs of a turn: number i of them is first + i / kRun * apart + i % kRun, where kRun is kMost / kStreams.
struct Turn {
  int first, apart, count;
};

// Calls body(turn) for outputs begin .. end - 1 of a matrix. Whole turns take kRun rows from each of kStreams places, as far apart as can be;
// but where a group's scales are apart from its weights, and would be as many places more: then rows follow each other.
template <int kMost, class Body>
static inline void each_turn(const Matrix& m, int begin, int end, const Body& body) {
  constexpr int kRun = kMost / kStreams;
  const int whole = m.group ? 0 : (end - begin) / kMost * kMost, apart = whole / kStreams;
  for (int j = 0; j < apart; j += kRun) body(Turn{begin + j, apart, kMost});
  for (int first = begin + whole; first < end; first += kMost) body(Turn{first, kRun, end - first < kMost ? end - first : kMost});
}

// Calls body(number, output, apart, at, at_apart) for all outputs of a turn, `number` of them together (an integral_constant: R or 1):
// output + r * apart is number at + r * at_apart of the turn.
template <int kMost, int R, class Body>
static inline void each_rows(const Turn& turn, const Body& body) {
  constexpr int kRun = kMost / kStreams;
  const std::integral_constant<int, R> some;
  int r = 0;
  if (kStreams > 1 && turn.apart > kRun) {
    static_assert(kStreams == 1 || kStreams % R == 0);
    for (int s = 0; s < kStreams; s += R)
      for (r = 0; r < kRun; r++) body(some, turn.first + s * turn.apart + r, turn.apart, s * kRun + r, kRun);
    return;
  }
  for (; r + R <= turn.count; r += R) body(some, turn.first + r, 1, r, 1);
  for (; r < turn.count; r++) body(std::integral_constant<int, 1>(), turn.first + r, 1, r, 1);
}

// Calls body(output, number, at) for outputs of a turn that follow each other.
template <int kMost, class Body>
static inline void each_run(const Turn& turn, const Body& body) {
  constexpr int kRun = kMost / kStreams;
  for (int at = 0; at < turn.count; at += kRun)
    body(turn.first + at / kRun * turn.apart, turn.count - at < kRun ? turn.count - at : kRun, at);
}

}  // namespace dt
