// Products of activations that are rounded to int8, summed in integers: linear_w8a8 and linear_gguf_a8.
#pragma once
#include "matmul.h"

namespace dt {

enum class Rounding : int { kNone = 0, kRows = 1, kBlocks = 2, kFloat8 = 3 };

// Rows [T, I] in int8 with one scale a row, or one for each 32 inputs. Views into a workspace.
struct Rounded {
  int num_tokens, size, stride;  // stride: bytes between rows
  bool has_blocks;
  const int8_t* ints;
  const float* scales;  // [T], or [T, I / 32]
  const float* sums;    // what the ints of each 16, and behind those of each 32, stand for: [T, I / 16 + I / 32]
  const int32_t* totals;  // [T]: sum of the ints, as far as vectors reach
};

// Floats of workspace for T rows of size I.
size_t rounded_floats(int num_tokens, int size);

Rounded round_rows(const float* rows, size_t stride, int num_tokens, int size, Rounding rounding, float* space);

// Rows rounded to float8_e4m3fn and back, in place. scale: 0 for one of each row.
void round_to_float8(float* rows, int num_tokens, int size, float scale);

// Several products of the same activations, in one parallel region.
void matmul(const Rounded& x, const Matrix* matrices, const Sink* sinks, int count);

}  // namespace dt
