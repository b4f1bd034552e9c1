// Products of activations that are rounded to int8, summed in integers: linear_w8a8, linear_gguf_a8 and linear_int4_a8.
#pragma once
#include "matmul.h"

namespace dt {

enum class Rounding : int { kNone = 0, kRows = 1, kBlocks = 2, kFloat8 = 3, kNibbles = 4 };

// Rows [T, I] in int8 with one scale a row, or one for each 32 inputs. Views into a workspace. kNibbles: as kBlocks, but with the
// even and the odd inputs of each step of a product apart, as bytes of two weights are read, and with scales of 0 up to a whole step.
struct Rounded {
  int num_tokens, size, stride;  // stride: bytes between rows
  bool has_blocks;
  int digits;  // rows of a token: 1, or 3 where all bits of float32 are kept (digit_rows)
  const int8_t* ints;
  const float* scales;  // [T], or [T, I / 32]
  const float* sums;    // what the ints of each 16, and behind those of each 32, stand for: [T, I / 16 + I / 32]
  const int32_t* totals;  // [T]: sum of the ints, as far as vectors reach
  size_t scale_stride = 0;  // kNibbles: floats between the scales of two rows, and between what the ints of each 32 stand for
};

// Floats of workspace for T rows of size I.
size_t rounded_floats(int num_tokens, int size);

Rounded round_rows(const float* rows, size_t stride, int num_tokens, int size, Rounding rounding, float* space);

#if defined(__AVX512VNNI__)
constexpr bool kHasDots = true;
#else
constexpr bool kHasDots = false;
#endif

// Up to kFewRows rows as three digits of 256 with a sign, for products with int8 weights: as in rounded_tiles.cpp. Where kHasDots.
Rounded digit_rows(const float* rows, size_t stride, int num_tokens, int size, float* space);

// 32 inputs in int8: their scale. total: the sum of the ints.
float round_block(const float* x, int8_t* ints, int32_t& total);

// Rows rounded to float8_e4m3fn and back, in place. scale: 0 for one of each row.
void round_to_float8(float* rows, int num_tokens, int size, float scale);

// Rows rounded to int8 and back, with one scale for each 32 inputs, in place.
void round_to_blocks(float* rows, int num_tokens, int size);

// Several products of the same activations, in one parallel region.
void matmul(const Rounded& x, const Matrix* matrices, const Sink* sinks, int count);

}  // namespace dt
