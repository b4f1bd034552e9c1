// Weights in fewer bits, with float32 activations: read where they lie, in the layouts of core/packed/decode.py.
#pragma once
#include "turns.h"

namespace dt {

// Weights of outputs first .. first + count - 1 as float32 rows, `stride` apart.
void decode_rows(const Matrix& m, int first, int count, float* out, size_t stride);

// Whether few_packed_sums reads this matrix as it is; else its rows are decoded first.
bool streams(const Matrix& m);

// Dot products of up to kFewRows tokens with the rows of a turn of kFewChunk, without bias.
void few_packed_sums(const Activations& x, const Matrix& m, const Turn& turn, float (*out)[kChunk]);

}  // namespace dt
