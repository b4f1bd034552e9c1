#include "screen.h"

#include <cmath>
#include <cstdlib>
#include <limits>
#include <vector>

#include "chunk.h"
#include "decoder.h"
#include "matmul.h"
#include "pool.h"
#include "rounded.h"
#include "rounded_tiles.h"

using namespace dt;

namespace dt {

void Screen::keep(int token, int o, int number, vf value, vf most) const {
  Token& at = tokens[token];
  float least = at.least.load(std::memory_order_relaxed);
  for (int i = 0; i < number; i++) {
    if (!(most[i] >= least)) continue;
    float own = value[i] - (most[i] - value[i]);
    own -= tied * std::fabs(own);
    while (own > least && !at.least.compare_exchange_weak(least, own, std::memory_order_relaxed)) {
    }
    least = own > least ? own : least;
    const int32_t place = at.count.fetch_add(1, std::memory_order_relaxed);
    if (place < kRoom) at.candidates[place] = {most[i], o + i};
  }
}

}  // namespace dt

namespace {

constexpr float kLeastSquare = 1e-30f;  // of a row; less, and sums of squares lose what they are of

constexpr bool kHasScreen = kHasIntTiles;

// Sums of one output in a fixed order, so that equal rows of weights give equal outputs.
template <class T>
static float exact(const T* w, const float* x, int size) {
  constexpr int kSums = 4;
  vf sums[kSums] = {};
  int k = 0;
  for (; k + kSums * W <= size; k += kSums * W)
    for (int i = 0; i < kSums; i++) sums[i] += load(w + k + i * W) * load(x + k + i * W);
  float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; k < size; k++) total += get(w + k) * x[k];
  return total;
}

// The largest of the candidates and, of equals, the first. False where they don't tell: too many, or no numbers at all.
template <class T>
static bool choose(const Screen::Token& token, const T* weight, const float* x, int size, float& best, int64_t& index) {
  const int count = token.count.load(std::memory_order_relaxed);
  if (count < 1 || count > Screen::kRoom) return false;
  const float least = token.least.load(std::memory_order_relaxed);
  std::vector<int32_t> kept;
  for (int i = 0; i < count; i++)
    if (token.candidates[i].most >= least) kept.push_back(token.candidates[i].index);
  for (int32_t o : kept)
    for (int k = 0; k < size; k += int(64 / sizeof(T))) __builtin_prefetch(weight + size_t(o) * size + k);
  index = -1;
  for (int32_t o : kept) {
    float score = exact(weight + size_t(o) * size, x, size);
    if (sizeof(T) == sizeof(bf16)) score = to_float(to_bf16(score));
    if (index >= 0 && !(score > best || (score == best && o < index))) continue;
    best = score;
    index = o;
  }
  return index >= 0 && std::isfinite(best);
}

}  // namespace

// Whether dt_largest works in this build.
DT_API int dt_has_screen() { return kHasScreen; }

// The largest of y = x[T, I] @ weight[O, I]^T of each token, best [T], and the first output that has it, index [T]. x, weight and the
// rounding of y are of the weight's format. codes: the weight in int8 with a scale of each row; radii [O]: how far a row of it is from
// that, and what rounding adds. Returns 0; 1 when there is no memory; 2 where a row of x does not tell, and y must be computed.
DT_API int dt_largest(const void* x, int tokens, const dt_matrix* weight, const dt_matrix* codes, const float* radii, float* best,
                      int64_t* index) {
  const int size = int(weight->cols);
  const bool is_plain = weight->format == int(Format::kFloat32), is_few = tokens <= kFewRows;
  Matrix rough{codes->weight, nullptr, int(codes->rows), size, int(codes->stride), Format::kInt8, codes->scales};
  rough.scale_format = int(codes->scale_format);

  size_t own = rounded(size_t(tokens) * size), product = rounded_floats(tokens, size);
  if constexpr (!kHasDots) product = packed_floats(tokens, size);
  if constexpr (kHasIntTiles) product = is_few ? product : tiled_floats(tokens, size);
  const size_t lists = rounded(size_t(tokens) * Screen::kRoom * sizeof(Candidate) / 4);
  static thread_local Scratch space;
  float* at = space.reserve((is_plain ? 0 : own) + rounded(product) + lists);
  if (!at) return 1;
  const float* rows = static_cast<const float*>(x);
  if (!is_plain) {
    for (size_t i = 0; i < size_t(tokens) * size; i++) at[i] = to_float(static_cast<const bf16*>(x)[i]);
    rows = at;
    at += own;
  }
  std::vector<Screen::Token> states(tokens);
  for (int t = 0; t < tokens; t++) {
    Screen::Token& token = states[t];
    float square = 0;
    for (int k = 0; k < size; k++) square += rows[size_t(t) * size + k] * rows[size_t(t) * size + k];
    token.norm = std::sqrt(square);
    if (!std::isfinite(token.norm) || square < kLeastSquare) return 2;
    token.least.store(-std::numeric_limits<float>::infinity(), std::memory_order_relaxed);
    token.count.store(0, std::memory_order_relaxed);
    token.candidates = reinterpret_cast<Candidate*>(at + rounded(product)) + size_t(t) * Screen::kRoom;
  }
  const Screen screen{radii, states.data(), is_plain ? 0.0f : 1.0f / 128};
  const Sink sink{Sink::kScreen, nullptr, 0, 1.0f, &screen};
  if constexpr (kHasScreen) {
    if (is_few && kHasDots)
      matmul(digit_rows(rows, size, tokens, size, at), &rough, &sink, 1);
    else if (is_few)
      matmul(pack(rows, size, tokens, size, at), &rough, &sink, 1);
    else
      matmul(tile_rows(rows, size, tokens, size, 2, at), &rough, &sink, 1);
  }
  std::atomic<bool> tells{true};
  parallel(tokens, [&](int t, int) {
    const float* row = rows + size_t(t) * size;
    const bool found = is_plain ? choose(states[t], static_cast<const float*>(weight->weight), row, size, best[t], index[t])
                                : choose(states[t], static_cast<const bf16*>(weight->weight), row, size, best[t], index[t]);
    if (!found) tells.store(false);
  });
  return tells.load() ? 0 : 2;
}
