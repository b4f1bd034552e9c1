// What rounding rows of numbers to integers needs.
#pragma once
#include "simd.h"

namespace dt {

// 1.5 * 2^23: adding it rounds to the nearest integer, ties to even, and leaves that in the lowest bits.
constexpr float kRounder = 12582912.0f;

static inline vf nearest(vf x) { return (x + splat(kRounder)) - splat(kRounder); }

// The largest absolute value of a row. Compared as integers, in which a NaN is larger than any number.
static inline float largest_of(const float* row, int size) {
  vi best = {};
  int i = 0;
  for (; i + W <= size; i += W) {
    vi bits = (vi)load(row + i) & 0x7fffffff;
    vi more = bits > best;
    best = (more & bits) | (~more & best);
  }
  int32_t found = largest(best);
  for (; i < size; i++) {
    int32_t bits;
    memcpy(&bits, row + i, 4);
    bits &= 0x7fffffff;
    found = bits > found ? bits : found;
  }
  float value;
  memcpy(&value, &found, 4);
  return value;
}

}  // namespace dt
