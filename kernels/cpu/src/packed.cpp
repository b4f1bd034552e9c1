#include "packed.h"

#include "chunk.h"
#include "groups.h"

namespace dt {
namespace {

// Vectors of an atom's bytes.
static inline void pieces(v32u bytes, vi (&out)[kPieces]) {
#if defined(__aarch64__)
  auto four = [&](uint16x8_t eight, vi* to) {
    to[0] = (vi)vmovl_u16(vget_low_u16(eight));
    to[1] = (vi)vmovl_high_u16(eight);
  };
  four(vmovl_u8(vget_low_u8((uint8x16_t)bytes.low)), out);
  four(vmovl_high_u8((uint8x16_t)bytes.low), out + 2);
  four(vmovl_u8(vget_low_u8((uint8x16_t)bytes.high)), out + 4);
  four(vmovl_high_u8((uint8x16_t)bytes.high), out + 6);
#else
  alignas(32) uint8_t room[kAtom];
  memcpy(room, &bytes, kAtom);
#pragma GCC unroll 8
  for (int n = 0; n < kPieces; n++) out[n] = load_bytes(room + n * W);
#endif
}

static inline vf low_code(vi bytes) { return __builtin_convertvector(bytes & 15, vf); }
static inline vf high_code(vi bytes) { return __builtin_convertvector((vi)((vu)bytes >> 4), vf); }

// Weights of four bits with one scale and one minimum. AVX-512 looks them up: the upper bits of an index are ignored.
struct Nibbles {
#if defined(__AVX512F__)
  __m512 table;
  Nibbles(float scale, float min) {
    const vf numbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    table = (__m512)(numbers * splat(scale) + splat(min));
  }
  vf low(vi bytes) const { return (vf)_mm512_permutexvar_ps((__m512i)bytes, table); }
  vf high(vi bytes) const { return low((vi)((vu)bytes >> 4)); }
#else
  vf scale, min;
  Nibbles(float scale, float min) : scale(splat(scale)), min(splat(min)) {}
  vf low(vi bytes) const { return low_code(bytes) * scale + min; }
  vf high(vi bytes) const { return high_code(bytes) * scale + min; }
#endif
};

// A weight is its code times a scale, plus a minimum. Where widening a code takes more operations than looking its weight up, sums are of codes,
// and scales and minima are multiplied once an atom: kSumsCodes.
constexpr bool kSumsCodes = W == 8;

// Where a row's weights and the scales of its present span are.
struct Row {
  const uint8_t* values;
  const uint8_t* high;
  const float *scales, *mins;
};

// --- formats: weights(row, atom, at, v) gives the weights of an atom, `at` of its span, and codes(row, atom, v) its codes --

// kFetch: atoms in a line of 64 bytes.

struct Int4 {  // in the order of split activations: W even inputs, W odd ones
  static constexpr int kFetch = 4;
  static constexpr bool kIsSplit = true, kHasCodes = true, kHasMins = true;
  static constexpr int kScales = 1;
  static inline void codes(const Row& row, int atom, vf (&v)[kPieces]) {
    const uint8_t* bytes = row.values + atom * (kAtom / 2);
#pragma GCC unroll 8
    for (int n = 0; n < kPieces; n += 2) {
      vi both = load_bytes(bytes + n / 2 * W);
      v[n] = low_code(both);
      v[n + 1] = high_code(both);
    }
  }
  static inline void weights(const Row& row, int atom, int at, vf (&v)[kPieces]) {
    const Nibbles nibbles(row.scales[at], row.mins[at]);
    const uint8_t* bytes = row.values + atom * (kAtom / 2);
#pragma GCC unroll 8
    for (int n = 0; n < kPieces; n += 2) {
      vi both = load_bytes(bytes + n / 2 * W);
      v[n] = nibbles.low(both);
      v[n + 1] = nibbles.high(both);
    }
  }
};

struct Int3 {
  static constexpr int kFetch = 8;
  static constexpr bool kIsSplit = false, kHasCodes = false, kHasMins = true;
  static constexpr int kScales = 1;
  static inline void weights(const Row& row, int atom, int at, vf (&v)[kPieces]) {
    uint32_t third;
    memcpy(&third, row.high + atom * 4, 4);
    vi fours[kPieces];
    pieces(bits_of(third, 4), fours);
    vf scale = splat(row.scales[at]), min = splat(row.mins[at]);
    vi masks;
    vf factors;
    for (int i = 0; i < W; i++) {
      masks[i] = 3 << i % 4 * 2;
      factors[i] = 1.0f / float(1 << i % 4 * 2);
    }
    const uint8_t* low = row.values + atom * 8;
#pragma GCC unroll 8
    for (int n = 0; n < kPieces; n++) {
      vi four;  // each byte four times
      for (int i = 0; i < W; i++) four[i] = low[n * (W / 4) + i / 4];
      vf value = __builtin_convertvector(four & masks, vf) * factors + __builtin_convertvector(fours[n], vf);
      v[n] = value * scale + min;
    }
  }
};

template <int T>
struct Blocks {
  static constexpr int kFetch = 64 * block_size(T) / kAtom / block_bytes(T);
  static constexpr bool kIsSplit = false, kHasCodes = true, kHasMins = T != kQ8_0;
  static constexpr int kScales = T == kQ6_K ? 2 : 1;  // of an atom
  static inline void codes(const Row& row, int atom, vf (&v)[kPieces]) {
    if constexpr (T == kQ4_0 || T == kQ4_1) {
      const uint8_t* bytes = row.values + size_t(atom) * block_bytes(T) + value_offset(T);
#pragma GCC unroll 8
      for (int n = 0; n < kPieces / 2; n++) {
        vi both = load_bytes(bytes + n * W);
        v[n] = low_code(both);
        v[n + kPieces / 2] = high_code(both);
      }
    } else if constexpr (T == kQ4_K) {
      const uint8_t* bytes = row.values + size_t(atom / 8) * block_bytes(T) + 16 + atom % 8 / 2 * 32;
#pragma GCC unroll 8
      for (int n = 0; n < kPieces; n++) {
        vi both = load_bytes(bytes + n * W);
        v[n] = atom % 2 ? high_code(both) : low_code(both);
      }
    } else if constexpr (T == kQ8_0) {
      const int8_t* bytes = reinterpret_cast<const int8_t*>(row.values + size_t(atom) * block_bytes(T) + 2);
#pragma GCC unroll 8
      for (int n = 0; n < kPieces; n++) v[n] = __builtin_convertvector(load_ints(bytes + n * W), vf);
    } else {
      vi found[kPieces];
      pieces(values<T>(row.values, atom), found);
#pragma GCC unroll 8
      for (int n = 0; n < kPieces; n++) v[n] = __builtin_convertvector(found[n], vf);
    }
  }
  static inline void weights(const Row& row, int atom, int at, vf (&v)[kPieces]) {
    if constexpr (T == kQ4_0 || T == kQ4_1) {
      const Nibbles nibbles(row.scales[at], row.mins[at]);
      const uint8_t* bytes = row.values + size_t(atom) * block_bytes(T) + value_offset(T);
#pragma GCC unroll 8
      for (int n = 0; n < kPieces / 2; n++) {
        vi both = load_bytes(bytes + n * W);
        v[n] = nibbles.low(both);
        v[n + kPieces / 2] = nibbles.high(both);
      }
    } else if constexpr (T == kQ4_K) {
      const Nibbles nibbles(row.scales[at], row.mins[at]);
      const uint8_t* bytes = row.values + size_t(atom / 8) * block_bytes(T) + 16 + atom % 8 / 2 * 32;
#pragma GCC unroll 8
      for (int n = 0; n < kPieces; n++) {
        vi both = load_bytes(bytes + n * W);
        v[n] = atom % 2 ? nibbles.high(both) : nibbles.low(both);
      }
    } else if constexpr (T == kQ8_0) {
      const uint8_t* bytes = row.values + size_t(atom) * block_bytes(T) + 2;
      vf scale = splat(row.scales[at]);
#pragma GCC unroll 8
      for (int n = 0; n < kPieces; n++)
        v[n] = __builtin_convertvector(load_ints(reinterpret_cast<const int8_t*>(bytes) + n * W), vf) * scale;
    } else {
      vi found[kPieces];
      pieces(values<T>(row.values, atom), found);
#pragma GCC unroll 8
      for (int n = 0; n < kPieces; n++) {
        int which = at * kScales + (kScales == 2 ? n * W / 16 : 0);
        v[n] = __builtin_convertvector(found[n], vf) * splat(row.scales[which]) + splat(row.mins[which]);
      }
    }
  }
};

// Scales and minima of atoms first .. first + count - 1 of an output.
template <class F>
static inline void span_scales(F, const Matrix& m, const Groups& groups, int o, const uint8_t*, int first, int count, float* scales,
                               float* mins) {
  group_scales(m, groups, m.scales, o, first, count, scales);
  group_mins(m, groups, o, first, count, scales, mins);
}
template <int T>
static inline void span_scales(Blocks<T>, const Matrix&, const Groups&, int, const uint8_t* row, int first, int count, float* scales,
                               float* mins) {
  atom_scales<T>(row, first, count, scales, mins);
}

// The same of so many outputs o, o + apart, ..., in one call.
template <class F>
DT_CALLED static void rows_scales(const Matrix& m, const Groups& groups, int o, int apart, const Row* rows, int number, int first, int count,
                                  float (*scales)[kSpan * F::kScales], float (*mins)[kSpan * F::kScales]) {
  DT_ROLLED
  for (int r = 0; r < number; r++) span_scales(F(), m, groups, o + r * apart, rows[r].values, first, count, scales[r], mins[r]);
}

static inline Row row_of(const Matrix& m, int o) {
  Row row{};
  row.values = static_cast<const uint8_t*>(m.weight) + size_t(o) * m.stride;
  if (m.format == Format::kInt3) row.high = static_cast<const uint8_t*>(m.high) + size_t(o) * (m.cols / 8);
  return row;
}

// --- few tokens ----------------------------------------------------------------------------------------------------------

// What the inputs that share a minimum sum up to, of each token.
template <class F>
static const float* sums_of_inputs(const float* x, int tokens, int size) {
  static thread_local Scratch scratch;
  constexpr int kInputs = kAtom / F::kScales;
  const int count = size / kInputs, stride = (count + W - 1) / W * W;
  float* out = scratch.reserve(size_t(tokens) * stride);
  for (int t = 0; t < tokens; t++)
    for (int i = 0; i < stride; i++) {
      vf total{};
      if (i < count)
        for (int n = 0; n < kInputs; n += W) total += load(x + size_t(t) * size + i * kInputs + n);
      out[size_t(t) * stride + i] = i < count ? sum(total) : 0.0f;
    }
  return out;
}

// What an atom's codes add to a sum: their products with the inputs, times the scale, or of each half times its own.
template <class F>
static inline void add_codes(vf& sum, const vf (&codes)[kPieces], const float* x, const float* scales) {
  constexpr int kEach = kPieces / F::kScales;
#pragma GCC unroll 2
  for (int s = 0; s < F::kScales; s++) {
    vf part = codes[s * kEach] * load(x + s * kEach * W);
#pragma GCC unroll 8
    for (int n = 1; n < kEach; n++) part += codes[s * kEach + n] * load(x + (s * kEach + n) * W);
    sum += part * splat(scales[s]);
  }
}

// Of outputs o, o + apart, ...; their sums go to places at, at + at_apart, ... of a token. input_sums: where codes are summed.
template <class F, int R, int M>
DT_CALLED static void atom_dots(const Matrix& m, const Groups& groups, int o, int apart, const float* x, const float* input_sums,
                             float (*out)[kChunk], int at, int at_apart) {
  constexpr bool kByCodes = kSumsCodes && F::kHasCodes;
  vf sums[R][M];
  Row rows[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
    rows[r] = row_of(m, o + r * apart);
#pragma GCC unroll 4
    for (int t = 0; t < M; t++) sums[r][t] = vf{};
  }
  const int atoms = m.cols / kAtom;
  const size_t size = m.cols, atom_bytes = m.stride / atoms, sum_stride = size_t(atoms * F::kScales + W - 1) / W * W;
  // Rows are short: what is asked for is some rows below, so many bytes away that memory has the time.
  const size_t ahead = (kAheadBytes / m.stride + 1) * m.stride;
  for (int first = 0; first < atoms; first += kSpan) {
    alignas(64) float scales[R][kSpan * F::kScales], mins[R][kSpan * F::kScales];
    const int count = atoms - first < kSpan ? atoms - first : kSpan;
    if constexpr (R > 1 && M == 1) {  // without a call: with one, a step of one stream took 1.06 of the time where rows are short
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) span_scales(F(), m, groups, o + r * apart, rows[r].values, first, count, scales[r], mins[r]);
    } else {
      rows_scales<F>(m, groups, o, apart, rows, R, first, count, scales, mins);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      rows[r].scales = scales[r];
      rows[r].mins = mins[r];
      if constexpr (kByCodes && F::kHasMins) {
        const int number = count * F::kScales;
        DT_ROLLED
        for (int i = number; i % W != 0; i++) mins[r][i] = 0;
#pragma GCC unroll 4
        for (int t = 0; t < M; t++)
          DT_ROLLED
          for (int i = 0; i < number; i += W) sums[r][t] += load(mins[r] + i) * load(input_sums + t * sum_stride + first * F::kScales + i);
      }
    }
    for (int a = 0; a < count; a++) {
      const float* at_x = x + size_t(first + a) * kAtom;
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        vf v[kPieces];
        if constexpr (kByCodes)
          F::codes(rows[r], first + a, v);
        else
          F::weights(rows[r], first + a, a, v);
        if (a % F::kFetch == 0) __builtin_prefetch(rows[r].values + ahead + (first + a) * atom_bytes, 0, 2);
#pragma GCC unroll 4
        for (int t = 0; t < M; t++) {
          if constexpr (kByCodes) {
            add_codes<F>(sums[r][t], v, at_x + t * size, scales[r] + a * F::kScales);
          } else {
#pragma GCC unroll 8
            for (int n = 0; n < kPieces; n++) sums[r][t] += v[n] * load(at_x + t * size + n * W);
          }
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < M; t++) {
    if constexpr (R == 4) {
      float totals[4];
      sum4(sums[0][t], sums[1][t], sums[2][t], sums[3][t], totals);
      for (int r = 0; r < 4; r++) out[t][at + r * at_apart] = totals[r];
    } else {
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) out[t][at + r * at_apart] = sum(sums[r][t]);
    }
  }
}

template <class F, int M>
static void atom_rows(const Matrix& m, const Turn& turn, const float* x, float (*out)[kChunk]) {
  const Groups groups(m);
  const float* input_sums = kSumsCodes && F::kHasCodes && F::kHasMins ? sums_of_inputs<F>(x, M, m.cols) : nullptr;
  each_rows<kFewChunk, 4>(turn, [&](auto number, int o, int apart, int at, int at_apart) {
    atom_dots<F, decltype(number)::value, M>(m, groups, o, apart, x, input_sums, out, at, at_apart);
  });
}

template <class F>
static void atom_sums(const Activations& x, const Matrix& m, const Turn& turn, float (*out)[kChunk]) {
  const float* rows = F::kIsSplit ? x.split : x.rows;
  switch (x.num_tokens) {
    case 1: return atom_rows<F, 1>(m, turn, rows, out);
    case 2: return atom_rows<F, 2>(m, turn, rows, out);
    case 3: return atom_rows<F, 3>(m, turn, rows, out);
    default: return atom_rows<F, 4>(m, turn, rows, out);
  }
}

// --- one byte a weight, one scale a row ----------------------------------------------------------------------------------

struct Float8 {
  uint8_t bits;
};
static inline vf load_weights(const int8_t* p) { return __builtin_convertvector(load_ints(p), vf); }
static inline vf load_weights(const Float8* p) { return load_float8(reinterpret_cast<const uint8_t*>(p)); }
static inline float weight_of(int8_t w) { return w; }
static inline float weight_of(Float8 w) { return float8_to_float(w.bits) * (1.0f / 256); }
template <class T>
constexpr float kFactor = sizeof(T) == 1 && __is_class(T) ? 256.0f : 1.0f;

// Of R rows, `stride` bytes from each other.
template <class T, int R, int M>
DT_CALLED static void byte_dots(const T* w, size_t stride, const float* x, int size, float (*out)[kChunk], int at, int at_apart) {
  vf sums[R][M] = {};
  int k = 0;
  auto step = [&](int i) __attribute__((always_inline)) {
    vf row[M];
#pragma GCC unroll 4
    for (int t = 0; t < M; t++) row[t] = load(x + size_t(t) * size + i);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      vf weight = load_weights(w + r * stride + i);
#pragma GCC unroll 4
      for (int t = 0; t < M; t++) sums[r][t] += weight * row[t];
    }
  };
  for (; k + 64 <= size; k += 64) {
    if (kStreams == 1) {
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) __builtin_prefetch(w + (R + r) * stride + k, 0, 2);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 64; i += W) step(k + i);
  }
  for (; k + W <= size; k += W) step(k);
#pragma GCC unroll 4
  for (int t = 0; t < M; t++) {
    float totals[R];
    if constexpr (R % 4 == 0) {
#pragma GCC unroll 2
      for (int r = 0; r < R; r += 4) sum4(sums[r][t], sums[r + 1][t], sums[r + 2][t], sums[r + 3][t], totals + r);
    } else {
      for (int r = 0; r < R; r++) totals[r] = sum(sums[r][t]);
    }
    for (int r = 0; r < R; r++) {
      DT_ROLLED
      for (int rest = k; rest < size; rest++) totals[r] += weight_of(w[r * stride + rest]) * x[size_t(t) * size + rest];
      out[t][at + r * at_apart] = totals[r];
    }
  }
}

template <class T, int M>
static void byte_rows(const Matrix& m, const Turn& turn, const float* x, float (*out)[kChunk]) {
  constexpr int R = kRegisters == 32 ? (M == 1 ? 8 : 4) : (M <= 2 ? 4 : 2);
  const T* w = static_cast<const T*>(m.weight);
  each_rows<kFewChunk, R>(turn, [&](auto number, int o, int apart, int at, int at_apart) {
    byte_dots<T, decltype(number)::value, M>(w + size_t(o) * m.stride, size_t(apart) * m.stride, x, m.cols, out, at, at_apart);
  });
}

template <class T>
static void byte_sums(const Activations& x, const Matrix& m, const Turn& turn, float (*out)[kChunk]) {
  switch (x.num_tokens) {
    case 1: byte_rows<T, 1>(m, turn, x.rows, out); break;
    case 2: byte_rows<T, 2>(m, turn, x.rows, out); break;
    case 3: byte_rows<T, 3>(m, turn, x.rows, out); break;
    default: byte_rows<T, 4>(m, turn, x.rows, out);
  }
  float scales[kChunk];
  each_run<kFewChunk>(turn, [&](int first, int count, int at) {
    for (int o = 0; o < count; o++) scales[at + o] = scale_at(m.scales, m.scale_format, first + o) * kFactor<T>;
  });
  for (int t = 0; t < x.num_tokens; t++)
    for (int o = 0; o < turn.count; o++) out[t][o] *= scales[o];
}

// --- as float32 rows -----------------------------------------------------------------------------------------------------

template <class T>
static void decode_bytes(const Matrix& m, int o, float* out) {
  const T* w = static_cast<const T*>(m.weight) + size_t(o) * m.stride;
  const float scale = scale_at(m.scales, m.scale_format, o) * kFactor<T>;
  int k = 0;
  for (; k + W <= m.cols; k += W) store(out + k, load_weights(w + k) * scale);
  for (; k < m.cols; k++) out[k] = weight_of(w[k]) * scale;
}

// Two vectors of floats as one row of pairs.
static inline void store_pairs(float* out, vf even, vf odd) {
#if defined(__AVX512F__)
  store(out, __builtin_shufflevector(even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
  store(out + W, __builtin_shufflevector(even, odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
#elif defined(__AVX2__)
  store(out, __builtin_shufflevector(even, odd, 0, 8, 1, 9, 2, 10, 3, 11));
  store(out + W, __builtin_shufflevector(even, odd, 4, 12, 5, 13, 6, 14, 7, 15));
#else
  store(out, __builtin_shufflevector(even, odd, 0, 4, 1, 5));
  store(out + W, __builtin_shufflevector(even, odd, 2, 6, 3, 7));
#endif
}

template <class F>
static void decode_atoms(const Matrix& m, int o, float* out) {
  Row row = row_of(m, o);
  const Groups groups(m);
  const int atoms = m.cols / kAtom;
  for (int first = 0; first < atoms; first += kSpan) {
    alignas(64) float scales[1][kSpan * F::kScales], mins[1][kSpan * F::kScales];
    const int count = atoms - first < kSpan ? atoms - first : kSpan;
    rows_scales<F>(m, groups, o, 0, &row, 1, first, count, scales, mins);
    row.scales = scales[0];
    row.mins = mins[0];
    for (int a = 0; a < count; a++, out += kAtom) {
      vf v[kPieces];
      F::weights(row, first + a, a, v);
#pragma GCC unroll 8
      for (int n = 0; n < kPieces; n += F::kIsSplit ? 2 : 1) {
        if constexpr (F::kIsSplit)
          store_pairs(out + n * W, v[n], v[n + 1]);
        else
          store(out + n * W, v[n]);
      }
    }
  }
}

// Groups that are no whole atoms.
static void decode_plainly(const Matrix& m, int o, float* out) {
  const Row row = row_of(m, o);
  const size_t groups = size_t(o) * (m.cols / m.group);
  for (int k = 0; k < m.cols; k++) {
    int value = m.format == Format::kInt4 ? row.values[k / 2] >> k % 2 * 4 & 15
                                          : (row.values[k / 4] >> k % 4 * 2 & 3) | (row.high[k / 8] >> k % 8 & 1) << 2;
    size_t at = groups + k / m.group;
    const float scale = scale_at(m.scales, m.scale_format, at);
    const float min = m.has_zeros ? -float(static_cast<const uint8_t*>(m.mins)[at]) * scale : scale_at(m.mins, m.scale_format, at);
    out[k] = float(value) * scale + min;
  }
}

}  // namespace

bool streams(const Matrix& m) { return (m.format != Format::kInt4 && m.format != Format::kInt3) || m.group % kAtom == 0; }

void few_packed_sums(const Activations& x, const Matrix& m, const Turn& turn, float (*out)[kChunk]) {
  switch (int(m.format)) {
    case int(Format::kInt8): return byte_sums<int8_t>(x, m, turn, out);
    case int(Format::kFloat8): return byte_sums<Float8>(x, m, turn, out);
#if !defined(__AVX512VNNI__)  // where those below are multiplied in steps.cpp
    case int(Format::kInt4): return atom_sums<Int4>(x, m, turn, out);
    case int(Format::kBlocks) + kQ4_0: return atom_sums<Blocks<kQ4_0>>(x, m, turn, out);
    case int(Format::kBlocks) + kQ4_1: return atom_sums<Blocks<kQ4_1>>(x, m, turn, out);
    case int(Format::kBlocks) + kQ5_0: return atom_sums<Blocks<kQ5_0>>(x, m, turn, out);
    case int(Format::kBlocks) + kQ5_1: return atom_sums<Blocks<kQ5_1>>(x, m, turn, out);
    case int(Format::kBlocks) + kQ8_0: return atom_sums<Blocks<kQ8_0>>(x, m, turn, out);
    case int(Format::kBlocks) + kQ4_K: return atom_sums<Blocks<kQ4_K>>(x, m, turn, out);
    case int(Format::kBlocks) + kQ5_K: return atom_sums<Blocks<kQ5_K>>(x, m, turn, out);
    case int(Format::kBlocks) + kQ6_K: return atom_sums<Blocks<kQ6_K>>(x, m, turn, out);
#endif
    default: return atom_sums<Int3>(x, m, turn, out);
  }
}

static auto decoder_of(const Matrix& m) -> void (*)(const Matrix&, int, float*) {
  if (!streams(m)) return decode_plainly;
  switch (int(m.format)) {
    case int(Format::kInt8): return decode_bytes<int8_t>;
    case int(Format::kFloat8): return decode_bytes<Float8>;
    case int(Format::kInt4): return decode_atoms<Int4>;
    case int(Format::kInt3): return decode_atoms<Int3>;
    case int(Format::kBlocks) + kQ4_0: return decode_atoms<Blocks<kQ4_0>>;
    case int(Format::kBlocks) + kQ4_1: return decode_atoms<Blocks<kQ4_1>>;
    case int(Format::kBlocks) + kQ5_0: return decode_atoms<Blocks<kQ5_0>>;
    case int(Format::kBlocks) + kQ5_1: return decode_atoms<Blocks<kQ5_1>>;
    case int(Format::kBlocks) + kQ8_0: return decode_atoms<Blocks<kQ8_0>>;
    case int(Format::kBlocks) + kQ4_K: return decode_atoms<Blocks<kQ4_K>>;
    case int(Format::kBlocks) + kQ5_K: return decode_atoms<Blocks<kQ5_K>>;
    default: return decode_atoms<Blocks<kQ6_K>>;
  }
}

void decode_rows(const Matrix& m, int first, int count, float* out, size_t stride) {
  auto decode = decoder_of(m);
  for (int r = 0; r < count; r++) decode(m, first + r, out + r * stride);
}

}  // namespace dt
