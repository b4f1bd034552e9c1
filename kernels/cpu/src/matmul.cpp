#include "matmul.h"

#include "amx.h"
#include "chunk.h"
#include "elementwise.h"
#include "packed.h"
#include "pool.h"
#include "tile.h"

namespace dt {
namespace {

static_assert(kChunk % kTile1 == 0 && kChunk % kTile2 == 0 && kChunk % W == 0);

constexpr size_t kFewBytes = kStreams > 1 ? 192 << 10 : 96 << 10;  // of weights that one thread takes at a time
constexpr int kFewShares = 4;           // of a product for each thread
static_assert(kFewChunk <= kChunk);

thread_local Scratch decoded;  // weights of one chunk in float32

// --- many rows -----------------------------------------------------------------------------------------------------------

// num_tokens: those in panels.
static inline int num_panels(int num_tokens) { return (num_tokens + kPanel - 1) / kPanel; }
static inline int panel_width(int num_tokens, int panel) { return num_tokens - panel * kPanel <= W ? W : kPanel; }
static inline int panel_tokens(int num_tokens, int panel) {
  int left = num_tokens - panel * kPanel;
  return left < kPanel ? left : kPanel;
}

template <bool kPairs>
static void panel_sums(const Activations& x, int panel, const float* w, size_t stride, int count, float* out, Ahead::Share* ahead) {
  const float* packed = x.panels + size_t(panel) * kPanel * x.depth();
  bool is_wide = panel_width(x.in_panels(), panel) == kPanel;
  const bool fetches = panel == 0;  // and so brings the weights into the cache for the others
  auto run = is_wide ? (fetches ? tiles<2, false, true, true, kPairs> : tiles<2, false, true, false, kPairs>)
                     : (fetches ? tiles<1, false, true, true, kPairs> : tiles<1, false, true, false, kPairs>);
  run(w, stride, 1, count, packed, x.depth(), out, nullptr, ahead);
}

static void panel_sums(const Activations& x, int panel, const float* w, size_t stride, int count, float* out, Ahead::Share* ahead) {
  if (kHasPairs && x.is_paired) return panel_sums<kHasPairs>(x, panel, w, stride, count, out, ahead);
  panel_sums<false>(x, panel, w, stride, count, out, ahead);
}

// Sums of a chunk and rows of the rest: out[row][output]. x: rows of `depth` floats.
template <int M, bool kPairs>
static void row_sums(const float* w, size_t stride, int count, const float* x, int depth, float (*out)[kChunk]) {
  int o = 0;
  for (; o + 4 <= count; o += 4) {
    vf sums[4][M];
    row_tile<4, M, kPairs>(w + o * stride, stride, x, depth, sums);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) sum4(sums[0][m], sums[1][m], sums[2][m], sums[3][m], out[m] + o);
  }
  for (; o < count; o++) {
    vf sums[1][M];
    row_tile<1, M, kPairs>(w + o * stride, stride, x, depth, sums);
    for (int m = 0; m < M; m++) out[m][o] = sum(sums[0][m]);
  }
}

template <bool kPairs>
static void rest_sums(const Activations& x, const float* w, size_t stride, int count, float (*out)[kChunk]) {
  const int depth = x.depth(), rest = x.num_rest(), turns = (rest + kTileRows - 1) / kTileRows;
  for (int turn = 0, row = 0; turn < turns; turn++) {
    int rows = (rest - row + turns - turn - 1) / (turns - turn);
    const float* at = x.rest() + size_t(row) * depth;
    auto run = [&](auto number) {
      constexpr int M = decltype(number)::value;
      if constexpr (M <= kTileRows) row_sums<M, kPairs>(w, stride, count, at, depth, out + row);
    };
    switch (rows) {
      case 1: run(std::integral_constant<int, 1>()); break;
      case 2: run(std::integral_constant<int, 2>()); break;
      case 3: run(std::integral_constant<int, 3>()); break;
      case 4: run(std::integral_constant<int, 4>()); break;
      case 5: run(std::integral_constant<int, 5>()); break;
      default: run(std::integral_constant<int, 6>());
    }
    row += rows;
  }
}

static void rest_sums(const Activations& x, const float* w, size_t stride, int count, float (*out)[kChunk]) {
  if (kHasPairs && x.is_paired) return rest_sums<kHasPairs>(x, w, stride, count, out);
  rest_sums<false>(x, w, stride, count, out);
}

// Weights of a chunk as the panels of x are multiplied: pairs in place, else float32.
static const float* rows_for(const Activations& x, const Matrix& m, int first, int count, size_t& stride, Scratch& scratch) {
  if (!x.is_paired) return rows_of(m, first, count, stride, scratch);
  stride = m.stride / 2;
  return static_cast<const float*>(m.weight) + size_t(first) * stride;
}

// Sums of one token with outputs first .. first + count - 1.
static void put_row(const float* sums, const Matrix& m, const Sink& sink, int token, int first, int count) {
  int o = 0;
  for (; o + W <= count; o += W) sink.put(token, first + o, load(sums + o) + (m.bias ? load(m.bias + first + o) : vf{}));
  for (; o < count; o++) sink.put(token, first + o, sums[o] + (m.bias ? m.bias[first + o] : 0.0f));
}

static void many_chunk(const Activations& x, const Matrix& m, const Sink& sink, int first, Ahead::Share* ahead) {
  int count = m.rows - first < kChunk ? m.rows - first : kChunk;
  size_t stride;
  const float* w = rows_for(x, m, first, count, stride, decoded);
  alignas(64) float sums[kChunk * kPanel];
  const int in_panels = x.in_panels();
  for (int p = 0; p < num_panels(in_panels); p++) {
    sink.fetch(p * kPanel, panel_tokens(in_panels, p), first, count);
    panel_sums(x, p, w, stride, count, sums, ahead);
    turn(sums, count, panel_width(in_panels, p), panel_tokens(in_panels, p), m.bias ? m.bias + first : nullptr,
         [&](int t, int o, auto value) { sink.put(p * kPanel + t, first + o, value); });
  }
  if (x.num_rest() == 0) return;
  float rest[kMostRest][kChunk];
  rest_sums(x, w, stride, count, rest);
  for (int t = 0; t < x.num_rest(); t++) put_row(rest[t], m, sink, in_panels + t, first, count);
}

// --- few rows ------------------------------------------------------------------------------------------------------------

// bf16 weights come two vectors at a time, even places and odd ones; the rows of x are laid out alike (split_rows).
template <class T>
constexpr int kStep = W;
template <>
constexpr int kStep<bf16> = 2 * W;

static inline void load_step(const float* p, vf (&v)[1]) { v[0] = load(p); }
static inline void load_step(const bf16* p, vf (&v)[2]) { load_split(p, v[0], v[1]); }

// One row of weights by M rows of x. Rows are read one after another, each line long before it is needed, so that memory is read
// in order from the first row to the last. One request a turn: two next to each other are no faster than none (measured). A
// multiply-add waits for the one before it of the same sum: a single row of x has a sum for each vector of a line.
template <int M, class T>
static inline void dot(const T* __restrict w, const float* __restrict x, int size, vf (&sums)[M], float (&rest)[M]) {
  constexpr int N = kStep<T> / W;
  constexpr int kLine = 64 / int(sizeof(T));
  constexpr int kSums = M == 1 ? kLine / W : 1;
  vf parts[M][kSums];
#pragma GCC unroll 4
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int i = 0; i < kSums; i++) parts[m][i] = vf{};
  auto step = [&](int at, int first) __attribute__((always_inline)) {
    vf weight[N];
    load_step(w + at, weight);
#pragma GCC unroll 4
    for (int m = 0; m < M; m++)
#pragma GCC unroll 2
      for (int n = 0; n < N; n++) parts[m][(first + n) % kSums] += weight[n] * load(x + size_t(m) * size + at + n * W);
  };
  int k = 0;
  for (; k + kLine <= size; k += kLine) {
    __builtin_prefetch(reinterpret_cast<const char*>(w + k) + kFewAhead, 0, kFewNearness);
#pragma GCC unroll 4
    for (int i = 0; i < kLine; i += kStep<T>) step(k + i, i / W);
  }
  for (; k + kStep<T> <= size; k += kStep<T>) step(k, 0);
#pragma GCC unroll 4
  for (int m = 0; m < M; m++) {
    sums[m] = parts[m][0];
#pragma GCC unroll 8
    for (int i = 1; i < kSums; i++) sums[m] += parts[m][i];
    rest[m] = 0.0f;
    DT_ROLLED
    for (int i = k; i < size; i++) rest[m] += get(w + i) * x[size_t(m) * size + i];
  }
}

// R rows of weights, `apart` numbers from each other, by M rows of x.
template <int R, int M, class T>
static inline void dots_after_another(const T* w, size_t apart, const float* x, int size, vf (&sums)[R][M], float (&rest)[R][M]) {
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) dot<M>(w + r * apart, x, size, sums[r], rest[r]);
}

// The same of rows that are read side by side, a line of each in turn; the processor asks for what follows (kStreams).
template <int R, int M, class T>
static inline void dots_side_by_side(const T* __restrict w, size_t apart, const float* __restrict x, int size, vf (&sums)[R][M],
                                     float (&rest)[R][M]) {
  constexpr int N = kStep<T> / W;
  constexpr int kLine = 64 / int(sizeof(T));
  constexpr int kSums = R * M >= 8 ? 1 : 2;  // enough to hide the latency of a multiply-add
  vf parts[R][M][kSums] = {};
  auto step = [&](int at, int first) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      vf weight[N];
      load_step(w + r * apart + at, weight);
#pragma GCC unroll 4
      for (int m = 0; m < M; m++)
#pragma GCC unroll 2
        for (int n = 0; n < N; n++) parts[r][m][(first + n) % kSums] += weight[n] * load(x + size_t(m) * size + at + n * W);
    }
  };
  int k = 0;
  for (; k + kLine <= size; k += kLine) {
#pragma GCC unroll 4
    for (int i = 0; i < kLine; i += kStep<T>) step(k + i, i / W);
  }
  for (; k + kStep<T> <= size; k += kStep<T>) step(k, 0);
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) {
      sums[r][m] = kSums == 1 ? parts[r][m][0] : parts[r][m][0] + parts[r][m][kSums - 1];
      rest[r][m] = 0.0f;
      DT_ROLLED
      for (int i = k; i < size; i++) rest[r][m] += get(w + r * apart + i) * x[size_t(m) * size + i];
    }
}

// Their sums go to places at, at + at_apart, ... of a token.
template <int R, int M, class T>
DT_CALLED static void dots(const T* w, size_t apart, const float* x, int size, float (*out)[kChunk], int at, int at_apart) {
  vf sums[R][M];
  float rest[R][M];
  if constexpr (kStreams == 1)
    dots_after_another<R, M>(w, apart, x, size, sums, rest);
  else
    dots_side_by_side<R, M>(w, apart, x, size, sums, rest);
#pragma GCC unroll 4
  for (int m = 0; m < M; m++) {
    float totals[R];
    if constexpr (R == 4) {
      sum4(sums[0][m], sums[1][m], sums[2][m], sums[3][m], totals);
    } else {
      for (int r = 0; r < R; r++) totals[r] = sum(sums[r][m]);
    }
    for (int r = 0; r < R; r++) out[m][at + r * at_apart] = totals[r] + rest[r][m];
  }
}

template <int M, class T>
static void dots_of(const T* w, size_t stride, const Turn& turn, const float* x, int size, float (*out)[kChunk]) {
  each_rows<kFewChunk, kStreams == 1 || M <= 2 ? 4 : 2>(turn, [&](auto number, int o, int apart, int at, int at_apart) {
    dots<decltype(number)::value, M>(w + o * stride, apart * stride, x, size, out, at, at_apart);
  });
}

template <class T>
static void few_sums(const Activations& x, const float* rows, const T* w, size_t stride, const Turn& turn, float (*out)[kChunk]) {
  switch (x.num_tokens) {
    case 1: return dots_of<1>(w, stride, turn, rows, x.size, out);
    case 2: return dots_of<2>(w, stride, turn, rows, x.size, out);
    case 3: return dots_of<3>(w, stride, turn, rows, x.size, out);
    default: return dots_of<4>(w, stride, turn, rows, x.size, out);
  }
}

static void few_sums(const Activations& x, const Matrix& m, const Turn& turn, float (*out)[kChunk]) {
  if (m.is_packed() && streams(m)) {
    few_packed_sums(x, m, turn, out);
  } else if (m.is_packed()) {
    each_run<kFewChunk>(turn, [&](int first, int count, int at) {
      size_t stride = 0;
      const float* rows = rows_of(m, first, count, stride, decoded);
      few_sums(x, x.rows, rows, stride, Turn{0, count, count}, reinterpret_cast<float(*)[kChunk]>(&out[0][at]));
    });
  } else if (m.format == Format::kFloat32) {
    few_sums(x, x.rows, static_cast<const float*>(m.weight), m.stride, turn, out);
  } else {
    few_sums(x, x.split, static_cast<const bf16*>(m.weight), m.stride, turn, out);
  }
}

static void few_chunk(const Activations& x, const Matrix& m, const Sink& sink, int begin, int end) {
  each_turn<kFewChunk>(m, begin, end, [&](const Turn& turn) {
    float out[kFewRows][kChunk];
    few_sums(x, m, turn, out);
    each_run<kFewChunk>(turn, [&](int first, int count, int at) {
      for (int t = 0; t < x.num_tokens; t++) put_row(out[t] + at, m, sink, t, first, count);
    });
  });
}

// A row of the rest as its products take it.
static void put_rest(const float* in, int size, bool in_pairs, float* out) {
  if (!in_pairs) {
    memcpy(out, in, size_t(size) * 4);
    return;
  }
  bf16* to = reinterpret_cast<bf16*>(out);
  int k = 0;
  for (; k + W <= size; k += W) store(to + k, load(in + k));
  for (; k < size; k++) to[k] = to_bf16(in[k]);
}

// Each 2 W features as W at even places, then W at odd ones; what is left over stays in order.
static void split_row(const float* in, int size, float* out) {
  int k = 0;
  for (; k + 2 * W <= size; k += 2 * W)
    for (int i = 0; i < W; i++) {
      out[k + i] = in[k + 2 * i];
      out[k + W + i] = in[k + 2 * i + 1];
    }
  for (; k < size; k++) out[k] = in[k];
}

}  // namespace

const float* rows_of(const Matrix& m, int first, int count, size_t& stride, Scratch& scratch) {
  if (m.format == Format::kFloat32) {
    stride = m.stride;
    return static_cast<const float*>(m.weight) + size_t(first) * m.stride;
  }
  stride = (m.cols + W - 1) / W * W + W;  // rows do not start on the same cache set
  float* out = scratch.reserve(size_t(count) * stride);
  if (m.is_packed()) {
    decode_rows(m, first, count, out, stride);
    return out;
  }
  const bf16* in = static_cast<const bf16*>(m.weight) + size_t(first) * m.stride;
  for (int r = 0; r < count; r++) {
    const bf16* from = in + size_t(r) * m.stride;
    float* to = out + r * stride;
    int k = 0;
    for (; k + W <= m.cols; k += W) store(to + k, load(from + k));
    for (; k < m.cols; k++) to[k] = to_float(from[k]);
  }
  return out;
}

int few_rows_at_a_time(const Matrix* matrices, int count) {
  int rows = 0;
  for (int i = 0; i < count; i++) rows += matrices[i].rows;
  size_t row_bytes = matrices[0].row_bytes();
  int most = int(kFewBytes / (row_bytes ? row_bytes : 1)), share = rows / (kFewShares * num_threads());
  int size = most < share ? most : share;
  return size < kFewChunk ? kFewChunk : size / kFewChunk * kFewChunk;
}

size_t packed_floats(int num_tokens, int size) {
  if (num_tokens <= kFewRows) return 2 * size_t(num_tokens) * size;
  if constexpr (amx::kIsBuilt) return amx::packed_floats(num_tokens, size);
  int in_panels = tokens_in_panels(num_tokens);
  return size_t((in_panels + W - 1) / W * W + num_tokens - in_panels) * size;
}

bool takes_pairs(const Matrix& m, int num_tokens) {
  if (!kHasPairs || amx::kIsBuilt || num_tokens <= kFewRows || m.format != Format::kBfloat16) return false;
  return m.cols % 2 == 0 && m.stride % 2 == 0 && reinterpret_cast<uintptr_t>(m.weight) % 4 == 0;
}

bool reads_in_place(const Matrix& m, int num_tokens) {
  return !amx::kIsBuilt && num_tokens > kFewRows && (m.format == Format::kFloat32 || takes_pairs(m, num_tokens));
}

bool packs_norms(int num_tokens) { return !amx::kIsBuilt || num_tokens <= kFewRows; }

// Rows of at most W tokens as columns: features begin .. end - 1 of token i go to out[feature * width + i], or in pairs. factors: what
// the tokens are multiplied by before the norm's weights.
static void pack_lanes(const float* in, size_t stride, int valid, int begin, int end, int width, bool in_pairs, const Norm& norm,
                       vf factors, float* out) {
  auto normed = [&](vf column, int feature) __attribute__((always_inline)) {
    if (!norm.weight) return column;
    float weight = norm.format == Format::kFloat32 ? get(static_cast<const float*>(norm.weight) + feature)
                                                   : get(static_cast<const bf16*>(norm.weight) + feature);
    return column * factors * splat(weight + norm.offset);
  };
  int k = begin;
  for (; k + W <= end; k += W) {
    vf block[W];
    for (int i = 0; i < W; i++) block[i] = i < valid ? load(in + size_t(i) * stride + k) : vf{};
    transpose(block);
    for (int i = 0; i < W; i++) block[i] = normed(block[i], k + i);
    if (in_pairs)
      for (int i = 0; i < W; i += 2) store(out + size_t(k + i) / 2 * width, pairs_of(block[i], block[i + 1]));
    else
      for (int i = 0; i < W; i++) store(out + size_t(k + i) * width, block[i]);
  }
  auto column = [&](int at) {
    vf values;
    for (int i = 0; i < W; i++) values[i] = i < valid ? in[size_t(i) * stride + at] : 0.0f;
    return normed(values, at);
  };
  if (in_pairs)
    for (; k < end; k += 2) store(out + size_t(k) / 2 * width, pairs_of(column(k), column(k + 1)));
  for (; k < end; k++) store(out + size_t(k) * width, column(k));
}

Activations pack(const float* rows, size_t stride, int num_tokens, int size, float* space, bool in_pairs, const Norm& norm) {
  if (num_tokens <= kFewRows) {
    float* split = space + size_t(num_tokens) * size;
    for (int t = 0; t < num_tokens; t++) {
      float* row = space + size_t(t) * size;
      if (norm.weight)
        rms_norm_row(rows + size_t(t) * stride, norm, size, row);
      else
        memcpy(row, rows + size_t(t) * stride, size_t(size) * 4);
      split_row(row, size, split + size_t(t) * size);
    }
    return Activations{num_tokens, size, space, split, nullptr};
  }
  if constexpr (amx::kIsBuilt) return amx::pack(rows, stride, num_tokens, size, space);
  const int in_panels = tokens_in_panels(num_tokens);
  Activations packed{num_tokens, size, nullptr, nullptr, space, in_pairs};
  // A norm is of whole rows, so that one thread takes all features of W tokens.
  const int span = norm.weight ? size : 8 * W, spans = (size + span - 1) / span, chunks = (in_panels + W - 1) / W * spans;
  parallel(chunks + (packed.num_rest() > 0), [&](int chunk, int) {
    if (chunk == chunks) {
      static thread_local Scratch scratch;
      float* normed = scratch.reserve(size);
      for (int t = in_panels; t < num_tokens; t++) {
        const float* row = rows + size_t(t) * stride;
        if (norm.weight) rms_norm_row(row, norm, size, normed);
        put_rest(norm.weight ? normed : row, size, in_pairs, space + packed.rest_offset() + size_t(t - in_panels) * packed.depth());
      }
      return;
    }
    const int first = chunk / spans * W, begin = chunk % spans * span, valid = in_panels - first < W ? in_panels - first : W;
    const int panel = first / kPanel;
    const float* in = rows + size_t(first) * stride;
    vf factors{};
    if (norm.weight)
      for (int i = 0; i < valid; i++) factors[i] = rms_norm_factor(in + size_t(i) * stride, norm.eps, size);
    pack_lanes(in, stride, valid, begin, begin + span < size ? begin + span : size, panel_width(in_panels, panel), in_pairs, norm, factors,
               space + size_t(panel) * kPanel * packed.depth() + first % kPanel);
  });
  return packed;
}

bool takes_ahead(int num_tokens) { return !amx::kIsBuilt && tokens_in_panels(num_tokens) > W; }

size_t ahead_bytes(const Matrix& m, int num_tokens) {
  const size_t tiles = size_t(m.rows / kTile2) * (tokens_in_panels(num_tokens) / kPanel);
  return tiles * (m.cols / 4) * kAheadLines * 64 / num_threads();
}

// What thread number `thread` asks for.
static Ahead::Share* share_of(Ahead* ahead, int thread) {
  return ahead && size_t(thread) < ahead->shares.size() ? &ahead->shares[thread] : nullptr;
}

void matmul(const Activations& x, const Matrix* matrices, const Sink* sinks, int count, Ahead* ahead) {
  bool is_few = x.num_tokens <= kFewRows;
  if constexpr (amx::kIsBuilt)
    if (!is_few) return amx::matmul(x, matrices, sinks, count);
  int size = is_few ? few_rows_at_a_time(matrices, count) : kChunk;
  int total = 0;
  for (int i = 0; i < count; i++) total += (matrices[i].rows + size - 1) / size;
  parallel(total, [&](int chunk, int thread) {
    int which = 0;
    for (int chunks; chunk >= (chunks = (matrices[which].rows + size - 1) / size); which++) chunk -= chunks;
    int first = chunk * size, rows = matrices[which].rows;
    if (is_few)
      few_chunk(x, matrices[which], sinks[which], first, first + size < rows ? first + size : rows);
    else
      many_chunk(x, matrices[which], sinks[which], first, share_of(ahead, thread));
  });
}

// act(gate + bias) * (up + bias) of one token, for `count` outputs.
static void combine(const float* gates, const float* ups, const Matrix& gate, const Matrix& up, Activation kind, int first, int count,
                    float* out) {
  int o = 0;
  auto bias = [&](const Matrix& m) { return m.bias ? load(m.bias + first + o) : vf{}; };
  for (; o + W <= count; o += W) store(out + o, act(kind, load(gates + o) + bias(gate)) * (load(ups + o) + bias(up)));
  auto one_bias = [&](const Matrix& m) { return m.bias ? m.bias[first + o] : 0.0f; };
  for (; o < count; o++) out[o] = act(kind, gates[o] + one_bias(gate)) * (ups[o] + one_bias(up));
}

static void gated_many(const Activations& x, const Matrix& gate, const Matrix& up, Activation kind, int first, int count, float* packed,
                       bool in_pairs, Ahead::Share* ahead) {
  static thread_local Scratch decoded_up;
  size_t gate_stride, up_stride;
  const float* gate_rows = rows_for(x, gate, first, count, gate_stride, decoded);
  const float* up_rows = rows_for(x, up, first, count, up_stride, decoded_up);
  alignas(64) float sums[kChunk * kPanel], ups[kChunk * kPanel];
  const int in_panels = x.in_panels();
  for (int p = 0; p < num_panels(in_panels); p++) {
    int width = panel_width(in_panels, p);
    float* to = packed + size_t(p) * kPanel * gate.rows + size_t(first) * width;
    float* gates = in_pairs ? sums : to;
    panel_sums(x, p, gate_rows, gate_stride, count, gates, ahead);
    panel_sums(x, p, up_rows, up_stride, count, ups, ahead);
    for (int o = 0; o < count; o++) {
      vf gate_bias = bias_of(gate, first + o), up_bias = bias_of(up, first + o);
      for (int lane = 0; lane < width; lane += W) {
        float* at = gates + o * width + lane;
        store(at, act(kind, load(at) + gate_bias) * (load(ups + o * width + lane) + up_bias));
      }
    }
    if (!in_pairs) continue;
    to = packed + (size_t(p) * kPanel * gate.rows + size_t(first) * width) / 2;
    for (int o = 0; o < count; o += 2)
      for (int lane = 0; lane < width; lane += W)
        store(to + o / 2 * width + lane, pairs_of(load(gates + o * width + lane), load(gates + (o + 1) * width + lane)));
  }
  if (x.num_rest() == 0) return;
  const Activations to{x.num_tokens, gate.rows, nullptr, nullptr, packed, in_pairs};
  float(*rest)[kChunk] = reinterpret_cast<float(*)[kChunk]>(sums), (*rest_ups)[kChunk] = reinterpret_cast<float(*)[kChunk]>(ups);
  rest_sums(x, gate_rows, gate_stride, count, rest);
  rest_sums(x, up_rows, up_stride, count, rest_ups);
  for (int t = 0; t < x.num_rest(); t++) {
    combine(rest[t], rest_ups[t], gate, up, kind, first, count, rest[t]);
    float* row = packed + to.rest_offset() + size_t(t) * to.depth();
    put_rest(rest[t], count, in_pairs, row + (in_pairs ? first / 2 : first));
  }
}

static void gated_few(const Activations& x, const Matrix& gate, const Matrix& up, Activation kind, int begin, int end, float* rows) {
  each_turn<kFewChunk>(gate, begin, end, [&](const Turn& turn) {
    float gates[kFewRows][kChunk], ups[kFewRows][kChunk];
    few_sums(x, gate, turn, gates);
    few_sums(x, up, turn, ups);
    each_run<kFewChunk>(turn, [&](int first, int count, int at) {
      for (int t = 0; t < x.num_tokens; t++)
        combine(gates[t] + at, ups[t] + at, gate, up, kind, first, count, rows + size_t(t) * gate.rows + first);
    });
  });
}

Activations gated_matmul(const Activations& x, const Matrix& gate, const Matrix& up, Activation kind, float* space, bool in_pairs,
                         Ahead* ahead) {
  bool is_few = x.num_tokens <= kFewRows;
  if constexpr (amx::kIsBuilt)
    if (!is_few) return amx::gated_matmul(x, gate, up, kind, space);
  const Matrix both[] = {gate, up};
  int size = !is_few ? kChunk : kStreams == 1 ? kFewChunk : few_rows_at_a_time(both, 2);
  parallel((gate.rows + size - 1) / size, [&](int chunk, int thread) {
    int first = chunk * size, count = gate.rows - first < size ? gate.rows - first : size;
    if (is_few)
      gated_few(x, gate, up, kind, first, first + count, space);
    else
      gated_many(x, gate, up, kind, first, count, space, in_pairs, share_of(ahead, thread));
  });
  if (!is_few) return Activations{x.num_tokens, gate.rows, nullptr, nullptr, space, in_pairs};
  float* split = space + size_t(x.num_tokens) * gate.rows;
  for (int t = 0; t < x.num_tokens; t++) split_row(space + size_t(t) * gate.rows, gate.rows, split + size_t(t) * gate.rows);
  return Activations{x.num_tokens, gate.rows, space, split, nullptr};
}

void unpack(const Activations& x, float* rows) {
  if (x.rows) {
    memcpy(rows, x.rows, size_t(x.num_tokens) * x.size * 4);
    return;
  }
  if constexpr (amx::kIsBuilt) return amx::unpack(x, rows);
  const int in_panels = x.in_panels();
  memcpy(rows + size_t(in_panels) * x.size, x.rest(), size_t(x.num_rest()) * x.size * 4);
  parallel(num_panels(in_panels), [&](int p, int) {
    float* to = rows + size_t(p) * kPanel * x.size;
    turn(x.panels + size_t(p) * kPanel * x.size, x.size, panel_width(in_panels, p), panel_tokens(in_panels, p), nullptr,
         [&](int t, int o, auto value) { memcpy(to + size_t(t) * x.size + o, &value, sizeof value); });
  });
}

}  // namespace dt
