// Products of many tokens with weights in groups or blocks, in integers: of activations rounded to int8 with a scale for each 32 inputs
// (linear_gguf_a8 and linear_int4_a8).
#pragma once
#include "matmul.h"

namespace dt {

#if defined(__AVX2__) && !defined(__AMX_INT8__)  // beside a matrix unit not measured
constexpr bool kHasGroupTiles = true;
#else
constexpr bool kHasGroupTiles = false;
#endif

// Whether a matrix can be multiplied so: 4 bits in groups of whole atoms, and all GGUF blocks.
bool takes_group_tiles(const Matrix& m);

// Whether a format's weights, and the activations they meet, are words of 16 bits: what is too large to be multiplied as bytes.
bool takes_words(Format format);

// Rows [T, I] in int8, moved up by 128, as many tokens a panel as a vector has lanes: [panel][32 inputs][4 inputs][token][4], or as words
// [panel][32 inputs][2 inputs][token][2]; the scales of each 32 inputs, and what their ints stand for together, [panel][32 inputs][token].
struct GroupTiled {
  int num_tokens, size;
  const uint8_t* tiles;
  const float *scales, *sums;
};

// Floats of workspace for T rows of size I.
size_t group_tiled_floats(int num_tokens, int size);

// format: of the weights.
GroupTiled group_tile_rows(const float* rows, size_t stride, int num_tokens, int size, Format format, float* space);

// Several products of the same activations, in one parallel region.
void matmul(const GroupTiled& x, const Matrix* matrices, const Sink* sinks, int count);

}  // namespace dt
