// Products on the matrix unit (AMX), with the accuracy of float32.
//
// A float32 is the sum of three bfloat16, high + middle + low, without error: each takes 8 bits of the 24. A product of two such
// sums has nine parts; the six largest are computed by TDPBF16PS, which multiplies exactly and sums in float32:
//
//   x w = (xh wh) + (xm wh + xh wm) + (xl wh + xm wm + xh wl) + three parts below 2^-24 of it, left out
//
// Weights in bfloat16 are one part, so that three parts are left and all are computed.
//
// The unit takes what is smaller than 2^-126 for 0. So a number below 2^-102 loses its last bits, and below 2^-126 it is 0.
// Sums that are no finite numbers are computed anew in plain float32, because a part's infinity times another's 0 is none.
#pragma once
#include "matmul.h"

namespace dt::amx {

#if defined(__AMX_BF16__)
constexpr bool kIsBuilt = true;
#else
constexpr bool kIsBuilt = false;
#endif

constexpr int kParts = 3;
constexpr int kDeep = 32;       // features in a tile
constexpr int kTileRows = 16;   // outputs, or pairs of features, in a tile
constexpr int kWidth = 32;      // tokens in a panel
constexpr int kTileBytes = 1024;

// Activations [T, I] as planes for products: for each panel of kWidth tokens (the last may have half), for each kDeep features, for
// each part, for each 16 tokens, one tile: 16 pairs of features (i and i + 16), each with its 16 tokens side by side.
inline int steps(int size) { return (size + kDeep - 1) / kDeep; }
inline size_t panel_bytes(int size) { return size_t(steps(size)) * kParts * 2 * kTileBytes; }
inline int panels(int num_tokens) { return (num_tokens + kWidth - 1) / kWidth; }
inline size_t packed_floats(int num_tokens, int size) { return panels(num_tokens) * panel_bytes(size) / 4; }

// Asks the system for the right to use the unit, once for the process. False when it is refused.
bool enable();

Activations pack(const float* rows, size_t stride, int num_tokens, int size, float* space);
void matmul(const Activations& x, const Matrix* matrices, const Sink* sinks, int count);
Activations gated_matmul(const Activations& x, const Matrix& gate, const Matrix& up, Activation activation, float* space);
void unpack(const Activations& x, float* rows);

}  // namespace dt::amx
