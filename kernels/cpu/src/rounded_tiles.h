// Products of int8 weights with many tokens, in integers: of int8 activations, of such of 16 bits and, on the matrix unit or with VNNI, of
// float32 ones without loss.
#pragma once
#include "matmul.h"

namespace dt {

#if defined(__AVX2__)
constexpr bool kHasIntTiles = true;
#else
constexpr bool kHasIntTiles = false;
#endif
// Whether all bits of float32 are kept: by words (word_tiles.cpp) that would be no faster than in float32.
#if defined(__AMX_INT8__) || defined(__AVX512VNNI__)
constexpr bool kHasWholeTiles = true;
#else
constexpr bool kHasWholeTiles = false;
#endif

// Rows of int8 with a scale each that are multiplied faster one by one (Rounding::kRows): up to so many are (measured).
#if defined(__AMX_INT8__)
constexpr int kMostByRows = kFewRows;
#elif defined(__AVX512VNNI__)
constexpr int kMostByRows = 6;
#else
constexpr int kMostByRows = 64;
#endif

// Rows [T, I] as tiles, and what the last digit's unit stands for, [panel, tokens of a panel]. 16 tokens a panel:
// [panel][64 inputs][digit]; or W tokens a panel, as words of one or two digits: [panel][2 inputs][token][2].
struct Tiled {
  int num_tokens, size, digits;
  const int8_t* tiles;
  const float* scales;
};

// Floats of workspace for T rows of size I.
size_t tiled_floats(int num_tokens, int size);

// digits: 1 for int8, 2 for 16 bits, 3 for all bits of float32 (kHasWholeTiles).
Tiled tile_rows(const float* rows, size_t stride, int num_tokens, int size, int digits, float* space);

// Several products of the same activations with int8 weights, in one parallel region.
void matmul(const Tiled& x, const Matrix* matrices, const Sink* sinks, int count);

}  // namespace dt
