// Products of int8 weights with many tokens on the matrix unit or with VNNI: of int8 activations, or of float32 ones without loss.
#pragma once
#include "matmul.h"

namespace dt {

#if defined(__AMX_INT8__) || defined(__AVX512VNNI__)
constexpr bool kHasIntTiles = true;
#else
constexpr bool kHasIntTiles = false;
#endif

// Rows of int8 with a scale each that are multiplied faster one by one (Rounding::kRows): up to so many are (measured).
#if defined(__AMX_INT8__)
constexpr int kMostByRows = kFewRows;
#else
constexpr int kMostByRows = 6;
#endif

// Rows [T, I] as tiles, 16 tokens a panel: [panel][64 inputs][digit], and what the last digit's unit stands for, [panel, 16].
struct Tiled {
  int num_tokens, size, digits;
  const int8_t* tiles;
  const float* scales;
};

// Floats of workspace for T rows of size I.
size_t tiled_floats(int num_tokens, int size);

// digits: 1 for int8, 2 for 16 bits, 3 for all bits of float32.
Tiled tile_rows(const float* rows, size_t stride, int num_tokens, int size, int digits, float* space);

// Several products of the same activations with int8 weights, in one parallel region.
void matmul(const Tiled& x, const Matrix* matrices, const Sink* sinks, int count);

}  // namespace dt
