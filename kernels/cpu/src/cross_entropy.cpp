// Between the products of a linear layer with the cross-entropy behind it: losses of rows of logits, and logits turned into their
// own gradients. Each reads its rows from memory once.
#include <cmath>

#include "matmul.h"
#include "pool.h"

using namespace dt;

namespace {

constexpr int64_t kIgnored = -100;  // of targets: gives 0 and no gradient
constexpr int kBlock = 2048;        // logits whose largest is sought before their exponentials are summed; they stay in the first cache
static_assert(kBlock % W == 0);

static inline float capped(float x, float cap) { return cap > 0 ? (vtanh(splat(x / cap)) * cap)[0] : x; }

// The log of the sum of exponentials of a row.
template <class T>
static float log_total_of(const T* row, int64_t size, float cap) {
  alignas(64) float block[kBlock];
  float best = -INFINITY;
  double total = 0;
  for (int64_t first = 0; first < size; first += kBlock) {
    const int count = size - first < kBlock ? int(size - first) : kBlock;
    vf most = splat(-INFINITY);
    int i = 0;
    auto keep = [&](vf x) {
      if (cap > 0) x = vtanh(x * (1.0f / cap)) * cap;
      store(block + i, x);
      most = vmax(x, most);
    };
    for (; i + W <= count; i += W) keep(load(row + first + i));
    if (i < count) {
      alignas(64) float rest[W];
      for (int lane = 0; lane < W; lane++) rest[lane] = i + lane < count ? get(row + first + i + lane) : -INFINITY;
      keep(load(rest));
      for (int lane = count - i; lane < W; lane++) block[i + lane] = -INFINITY;
    }
    const float now = largest(most);
    if (now > best) {
      total = best == -INFINITY ? total : total * exp(double(best) - double(now));
      best = now;
    }
    const vf base = splat(best == -INFINITY ? 0.0f : best);
    vf sums = {};
    for (i = 0; i < count; i += W) sums += vexp_of_negative(load(block + i) - base);
    total += sum(sums);
  }
  return best == -INFINITY ? float(total) : float(double(best) + log(total));  // of no finite number: 0 or NaN
}

template <class T>
static void losses_of(const T* logits, const int64_t* targets, int rows, int64_t size, float cap, float* losses, float* log_totals) {
  parallel(rows, [&](int r, int) {
    const T* row = logits + r * size;
    log_totals[r] = log_total_of(row, size, cap);
    losses[r] = targets[r] == kIgnored ? 0.0f : log_totals[r] - capped(get(row + targets[r]), cap);
  });
}

// In place: grad * (softmax - one at the target), times the slope of the soft cap.
template <class T>
static void gradients_of(T* logits, const int64_t* targets, const float* log_totals, const float* grads, int rows, int64_t size,
                         float cap) {
  parallel(rows, [&](int r, int) {
    T* row = logits + r * size;
    const float grad = grads ? grads[r] : 1.0f, log_total = log_totals[r];
    if (targets[r] == kIgnored) {
      memset(static_cast<void*>(row), 0, size * sizeof(T));
      return;
    }
    auto gradient = [&](vf x, vf one) {
      if (cap > 0) {
        vf scaled = vtanh(x * (1.0f / cap));
        return (vexp(scaled * cap - log_total) - one) * (1.0f - scaled * scaled) * grad;
      }
      return (vexp(x - log_total) - one) * grad;
    };
    const float at_target = gradient(splat(get(row + targets[r])), splat(1.0f))[0];
    int64_t i = 0;
    for (; i + W <= size; i += W) store(row + i, gradient(load(row + i), vf{}));
    for (; i < size; i++) put(row + i, gradient(splat(get(row + i)), vf{})[0]);
    put(row + targets[r], at_target);
  });
}

static bool are_there(const int64_t* targets, int rows, int64_t size) {
  for (int r = 0; r < rows; r++)
    if (targets[r] != kIgnored && (targets[r] < 0 || targets[r] >= size)) return false;
  return true;
}

}  // namespace

// Rows of `size` logits; `format` 0 float32 and 1 bfloat16. Returns 0, or 1 for a target that is no logit.
DT_API int dt_token_losses(const void* logits, const int64_t* targets, int rows, int64_t size, float cap, int format, float* losses,
                           float* log_totals) {
  if (!are_there(targets, rows, size)) return 1;
  if (format == int(Format::kFloat32))
    losses_of(static_cast<const float*>(logits), targets, rows, size, cap, losses, log_totals);
  else
    losses_of(static_cast<const bf16*>(logits), targets, rows, size, cap, losses, log_totals);
  return 0;
}

// grads: of the losses, or null where each is 1.
DT_API int dt_logit_gradients(void* logits, const int64_t* targets, const float* log_totals, const float* grads, int rows, int64_t size,
                              float cap, int format) {
  if (!are_there(targets, rows, size)) return 1;
  if (format == int(Format::kFloat32))
    gradients_of(static_cast<float*>(logits), targets, log_totals, grads, rows, size, cap);
  else
    gradients_of(static_cast<bf16*>(logits), targets, log_totals, grads, rows, size, cap);
  return 0;
}
