// Norms, rotary embedding and gated activations over rows, in float32 inside whatever the rows are kept in.
#pragma once
#include "matmul.h"

namespace dt {

// norm of one row of `size`; in and out may be the same.
void rms_norm_row(const float* x, const Norm& norm, int size, float* out);

// What a row is multiplied by before the norm's weights.
float rms_norm_factor(const float* x, float eps, int size);

// gate = act(gate) * up, on all threads.
void gate_in_place(float* gate, const float* up, int rows, int size, Activation kind);

// Rotates the first `rotary` features of one head in place, pairs (i, i + rotary / 2).
void rotate(float* head, const float* cos, const float* sin, int rotary);

}  // namespace dt
