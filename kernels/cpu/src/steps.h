// Few tokens by weights in groups or blocks, in integers: 128 inputs a step, with the dot products of AVX-512 (VNNI).
//
// An activation is rounded to int8, or kept whole as three digits of 256, with a scale for each 32 inputs of a token either way. Then
// 64 bytes of weights are a few operations for 128 products, where widening them to float32 took as many for each 16.
#pragma once
#include "matmul.h"

namespace dt {

#if defined(__AVX512VNNI__)
constexpr bool kHasSteps = true;
#else
constexpr bool kHasSteps = false;
#endif

// Whether a matrix can be multiplied so: 4 bits in groups of whole atoms, and all GGUF blocks.
bool takes_steps(const Matrix& m);

// Rows [T, I] as the weights of one format meet them: records of a step or some (Layout in steps.cpp) of each token.
struct Steps {
  int num_tokens, digits, steps;
  Format format;
  size_t token_bytes;
  const char* data;
};

// Floats of workspace for T rows of size I, whatever the format.
size_t step_floats(int num_tokens, int size);

// digits: 1 for int8, 3 for all bits of float32.
Steps step_rows(const float* rows, size_t stride, int num_tokens, int size, int digits, Format format, float* space);

// Several products of the same activations, with matrices of one format, in one parallel region.
void matmul(const Steps& x, const Matrix* matrices, const Sink* sinks, int count);

}  // namespace dt
