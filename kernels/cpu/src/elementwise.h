// Norms, rotary embedding and gated activations over rows, in float32 inside whatever the rows are kept in.
#pragma once
#include "matmul.h"

namespace dt {

// A vector of weights in either format.
struct Weights {
  const void* data;
  Format format;
};

// out = x / sqrt(mean(x^2) + eps) * (weight + offset), one row of `size`; in and out may be the same.
void rms_norm_row(const float* x, const Weights& weight, float eps, float offset, int size, float* out);

// gate = act(gate) * up, on all threads.
void gate_in_place(float* gate, const float* up, int rows, int size, Activation kind);

// Rotates the first `rotary` features of one head in place, pairs (i, i + rotary / 2).
void rotate(float* head, const float* cos, const float* sin, int rotary);

}  // namespace dt
