// The largest output of a product, found without computing most outputs exactly.
//
// Weights rounded to int8 give every output within a known distance: |w . x - q . x| <= |w - q| |x| (Cauchy and Schwarz). Where the
// largest that an output can be is less than the least that another one is, it is not the largest; only the others, mostly a handful of
// tens of thousands, are computed with the weights themselves.
#pragma once
#include <atomic>
#include <cstdint>

#include "simd.h"

namespace dt {

// An output that may be the largest of its token, and the most that it can be.
struct Candidate {
  float most;
  int32_t index;
};

// What products screen their sums by, in place of storing them (Sink::kScreen).
struct Screen {
  // No more were found in 11,757 rows of random prompts, whose outputs are nearer to each other than those of a text.
  static constexpr int kRoom = 2048;

  struct alignas(64) Token {
    float norm;                    // of its row: how far off a sum may be is this times the output's radius
    std::atomic<float> least;      // some output is at least so much
    std::atomic<int32_t> count;    // of candidates; beyond kRoom they are not kept
    Candidate* candidates;
  };

  const float* radii;  // of outputs
  Token* tokens;
  float tied;  // outputs that differ by less than this share may be equal once they are rounded

  void take(int token, int o, vf value) const {
    const Token& at = tokens[token];
    const vf most = value + at.norm * load(radii + o);
    if (any(most >= splat(at.least.load(std::memory_order_relaxed)))) keep(token, o, W, value, most);
  }
  void take(int token, int o, float value) const {
    const vf most = splat(value + tokens[token].norm * radii[o]);
    if (most[0] >= tokens[token].least.load(std::memory_order_relaxed)) keep(token, o, 1, splat(value), most);
  }

  void keep(int token, int o, int number, vf value, vf most) const;
};

}  // namespace dt
