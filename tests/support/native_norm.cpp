// RMS norm and its backward over contiguous float32 rows, as a provider of kernels would have it.
#include <cmath>
#include <cstdint>

extern "C" void norm_forward(const float* x, const float* weight, float* out, int64_t rows, int64_t size, double eps) {
    for (int64_t row = 0; row < rows; ++row, x += size, out += size) {
        double squares = 0;
        for (int64_t i = 0; i < size; ++i) squares += double(x[i]) * x[i];
        const double scale = 1 / std::sqrt(squares / size + eps);
        for (int64_t i = 0; i < size; ++i) out[i] = float(x[i] * scale * weight[i]);
    }
}

// With s = 1 / sqrt(mean(x^2) + eps) and g the gradient of the result:
//   dx = s * g * w - s^3 / size * x * sum(g * w * x),   dw += g * x * s
extern "C" void norm_backward(const float* grad, const float* x, const float* weight, float* grad_x, double* grad_weight,
                              int64_t rows, int64_t size, double eps) {
    for (int64_t row = 0; row < rows; ++row, x += size, grad += size, grad_x += size) {
        double squares = 0, along = 0;
        for (int64_t i = 0; i < size; ++i) {
            squares += double(x[i]) * x[i];
            along += double(grad[i]) * weight[i] * x[i];
        }
        const double scale = 1 / std::sqrt(squares / size + eps);
        const double back = along * scale * scale * scale / size;
        for (int64_t i = 0; i < size; ++i) {
            grad_x[i] = float(scale * grad[i] * weight[i] - back * x[i]);
            grad_weight[i] += grad[i] * x[i] * scale;
        }
    }
}
