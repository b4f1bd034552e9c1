#include "rounded.h"

#include "groups.h"
#include "nearest.h"
#include "pool.h"
#include "turns.h"

namespace dt {
namespace {

#if !defined(__aarch64__)
typedef int8_t v32s __attribute__((vector_size(32)));
typedef int32_t v8i __attribute__((vector_size(32)));
typedef float v8f __attribute__((vector_size(32)));

static inline v32s load32(const int8_t* p) {
  v32s v;
  memcpy(&v, p, 32);
  return v;
}

// The first of two numbers four times, then the second.
static inline v8f twice_four(const float* p) {
#if defined(__AVX2__)  // GCC 12 puts the vector together in memory, which is read before it is written as a whole
  const __m256 both = _mm256_castpd_ps(_mm256_broadcast_sd(reinterpret_cast<const double*>(p)));
  return (v8f)_mm256_permutevar8x32_ps(both, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
#else
  return v8f{p[0], p[0], p[0], p[0], p[1], p[1], p[1], p[1]};
#endif
}
#endif

// --- integer dot products: 32 bytes (NEON: 16), summed by fours -----------------------------------------------------------

// VNNI multiplies unsigned by signed bytes. Signed weights are moved up by 128; who uses them takes 128 times the sum of
// the activations off again.
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
constexpr int kMoved = 128;
static inline v8i add_dot(v8i sums, v32u w, v32s x) { return (v8i)_mm256_dpbusd_epi32((__m256i)sums, (__m256i)w, (__m256i)x); }
static inline v8i add_signed_dot(v8i sums, v32u w, v32s x) { return add_dot(sums, w ^ 0x80, x); }
#elif defined(__AVXVNNI__)
constexpr int kMoved = 128;
static inline v8i add_dot(v8i sums, v32u w, v32s x) { return (v8i)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)w, (__m256i)x); }
static inline v8i add_signed_dot(v8i sums, v32u w, v32s x) { return add_dot(sums, w ^ 0x80, x); }
#else
constexpr int kMoved = 0;
#if defined(__AVX2__)
// Pairs are summed in 16 bits, which holds twice 128 * 127: unsigned values are at most 63, of signed ones the sign is moved over.
static inline v8i add_dot(v8i sums, v32u w, v32s x) {
  __m256i pairs = _mm256_maddubs_epi16((__m256i)w, (__m256i)x);
  return sums + (v8i)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
static inline v8i add_signed_dot(v8i sums, v32u w, v32s x) {
  __m256i size = _mm256_abs_epi8((__m256i)w);
  return add_dot(sums, (v32u)size, (v32s)_mm256_sign_epi8((__m256i)x, (__m256i)w));
}
#elif defined(__aarch64__)
// Unsigned values are at most 63, so that signed bytes hold them too.
static inline int32x4_t add_dot(int32x4_t sums, int8x16_t w, int8x16_t x) {
#if defined(__ARM_FEATURE_DOTPROD)
  return vdotq_s32(sums, w, x);
#else
  // Pairs are summed in 16 bits, which holds twice 128 * 127. Which four make a sum does not matter: 16 bytes share a scale.
  return vpadalq_s16(sums, vmlal_high_s8(vmull_s8(vget_low_s8(w), vget_low_s8(x)), w, x));
#endif
}
#else
DT_CALLED static v8i add_signed_dot(v8i sums, v32u w, v32s x) {
  const v32s weights = (v32s)w;
  for (int i = 0; i < 8; i++)
    for (int j = 0; j < 4; j++) sums[i] += int(weights[4 * i + j]) * int(x[4 * i + j]);
  return sums;
}
static inline v8i add_dot(v8i sums, v32u w, v32s x) { return add_signed_dot(sums, w, x); }
#endif
#endif

#if !defined(__aarch64__)
static inline int32_t sum8(v8i v) {
  int32_t total = 0;
  for (int i = 0; i < 8; i++) total += v[i];
  return total;
}
static inline float sum8(v8f v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }
#endif

// W / 2 numbers, each twice.
static inline vf each_twice(const float* p) {
  vf twice;
#if defined(__AVX2__) && !defined(__AVX512F__)
  twice = (vf)_mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
#else
  for (int i = 0; i < W; i++) twice[i] = p[i / 2];
#endif
  return twice;
}

// --- one scale a row -----------------------------------------------------------------------------------------------------

#if defined(__AVX512VNNI__)
constexpr int kBytes = 64;  // of a row in one step
typedef int32_t Sums __attribute__((vector_size(64)));
typedef __m512i Bytes;
static inline Bytes weights_at(const int8_t* p) { return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(char(0x80))); }
static inline Bytes inputs_at(const int8_t* p) { return _mm512_loadu_si512(p); }
static inline Sums dot_step(Sums sums, Bytes w, Bytes x) { return (Sums)_mm512_dpbusd_epi32((__m512i)sums, w, x); }
#elif defined(__aarch64__)
constexpr int kBytes = 16;
typedef vi Sums;
typedef int8x16_t Bytes;
static inline Bytes weights_at(const int8_t* p) { return vld1q_s8(p); }
static inline Bytes inputs_at(const int8_t* p) { return vld1q_s8(p); }
static inline Sums dot_step(Sums sums, Bytes w, Bytes x) { return (Sums)add_dot((int32x4_t)sums, w, x); }
#else
constexpr int kBytes = 32;
typedef v8i Sums;
typedef v32s Bytes;
static inline Bytes weights_at(const int8_t* p) { return load32(p); }
static inline Bytes inputs_at(const int8_t* p) { return load32(p); }
static inline Sums dot_step(Sums sums, Bytes w, Bytes x) { return add_signed_dot(sums, (v32u)w, x); }
#endif

// Sums of four vectors of integers.
static inline void sum4(Sums a, Sums b, Sums c, Sums d, int32_t* out) {
#if defined(__AVX2__)
#if defined(__AVX512VNNI__)
  auto halves = [](Sums v) { return _mm256_add_epi32(_mm512_castsi512_si256((__m512i)v), _mm512_extracti64x4_epi64((__m512i)v, 1)); };
#else
  auto halves = [](Sums v) { return (__m256i)v; };
#endif
  __m256i ab = _mm256_hadd_epi32(halves(a), halves(b)), cd = _mm256_hadd_epi32(halves(c), halves(d));
  __m256i all = _mm256_hadd_epi32(ab, cd);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
#elif defined(__aarch64__)
  auto pairs = [](Sums v, Sums w) { return vpaddq_s32((int32x4_t)v, (int32x4_t)w); };
  vst1q_s32(out, vpaddq_s32(pairs(a, b), pairs(c, d)));
#else
  out[0] = sum8(a);
  out[1] = sum8(b);
  out[2] = sum8(c);
  out[3] = sum8(d);
#endif
}

constexpr int kInts = 32;  // outputs of a turn

// Integer sums of R outputs, `stride` bytes from each other, and M tokens, to places at, at + at_apart, ... of each token.
template <int R, int M>
DT_CALLED static void row_dots(const int8_t* w, size_t stride, const Rounded& x, int first_token, int (*out)[kInts], int at, int at_apart) {
  Sums sums[R][M] = {};
  const int8_t* ints = x.ints + size_t(first_token) * x.stride;
  const int k = x.size / kBytes * kBytes;
  auto step = [&](int r, int at) __attribute__((always_inline)) {
    const int8_t* here = w + r * stride + at;
    if (kStreams == 1) __builtin_prefetch(here + kFewAhead, 0, kFewNearness);
    Bytes weights = weights_at(here);
#pragma GCC unroll 4
    for (int t = 0; t < M; t++) sums[r][t] = dot_step(sums[r][t], weights, inputs_at(ints + size_t(t) * x.stride + at));
  };
  if (kStreams > 1) {
    for (int at = 0; at < k; at += kBytes) {
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) step(r, at);
    }
  } else {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)  // one row after another: see kFewAhead
      for (int at = 0; at < k; at += kBytes) step(r, at);
  }
#pragma GCC unroll 4
  for (int t = 0; t < M; t++) {
    int32_t totals[(R + 3) / 4 * 4];
    if constexpr (R % 4 == 0) {
#pragma GCC unroll 2
      for (int r = 0; r < R; r += 4) sum4(sums[r][t], sums[r + 1][t], sums[r + 2][t], sums[r + 3][t], totals + r);
    } else {
      for (int r = 0; r < R; r++) {
        int32_t four[4];
        sum4(sums[r][t], sums[r][t], sums[r][t], sums[r][t], four);
        totals[r] = four[0];
      }
    }
    for (int r = 0; r < R; r++) {
      totals[r] -= kMoved * x.totals[first_token + t];
      DT_ROLLED
      for (int rest = k; rest < x.size; rest++) totals[r] += int(w[r * stride + rest]) * int(ints[size_t(t) * x.stride + rest]);
      out[t][at + r * at_apart] = totals[r];
    }
  }
}

template <int M>
static void row_sums(const Matrix& m, const Turn& turn, const Rounded& x, int first_token, int (*out)[kInts]) {
  constexpr int R = kRegisters == 32 ? (M == 1 ? 8 : 4) : (M <= 2 ? 4 : 2);
  const int8_t* w = static_cast<const int8_t*>(m.weight);
  each_rows<kInts, R>(turn, [&](auto number, int o, int apart, int at, int at_apart) {
    row_dots<decltype(number)::value, M>(w + size_t(o) * m.stride, size_t(apart) * m.stride, x, first_token, out, at, at_apart);
  });
}

static void scales_of(const Matrix& m, const Turn& turn, float* scales) {
  each_run<kInts>(turn, [&](int first, int count, int at) {
    for (int o = 0; o < count; o++) scales[at + o] = scale_at(m.scales, m.scale_format, first + o);
  });
}

#if defined(__AVX512VNNI__)
// Sums of R outputs and the three digits of one token. What the moved weights add is taken off before anything is rounded.
template <int R>
static inline void digit_dots(const int8_t* w, size_t stride, const Rounded& x, int token, float* out) {
  const int8_t* ints = x.ints + size_t(3 * token) * x.stride;
  int k = x.size / kBytes * kBytes;
  vf whole[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {  // one row after another: see kFewAhead
    Sums sums[3] = {};
    for (int d = 0; d < 3; d++) sums[d][0] = -kMoved * x.totals[3 * token + d];
    for (int at = 0; at < k; at += kBytes) {
      const int8_t* here = w + r * stride + at;
      __builtin_prefetch(here + kFewAhead, 0, kFewNearness);
      Bytes weights = weights_at(here);
#pragma GCC unroll 3
      for (int d = 0; d < 3; d++) sums[d] = dot_step(sums[d], weights, inputs_at(ints + size_t(d) * x.stride + at));
    }
    auto digit = [&](int d) { return __builtin_convertvector(sums[d], vf); };
    whole[r] = digit(0) * 65536.0f + (digit(1) * 256.0f + digit(2));
  }
  if constexpr (R % 4 == 0) {
#pragma GCC unroll 2
    for (int r = 0; r < R; r += 4) dt::sum4(whole[r], whole[r + 1], whole[r + 2], whole[r + 3], out + r);
  } else {
    for (int r = 0; r < R; r++) out[r] = dt::sum(whole[r]);
  }
  for (; k < x.size; k++)
    for (int r = 0; r < R; r++) {
      int digit[3];
      for (int d = 0; d < 3; d++) digit[d] = int(w[r * stride + k]) * int(ints[size_t(d) * x.stride + k]);
      out[r] += float(digit[0]) * 65536.0f + float(digit[1] * 256 + digit[2]);
    }
}

static void digit_sums(const Matrix& m, const Turn& turn, const Rounded& x, int token, int tokens, float (*out)[kInts]) {
  float scales[kInts];
  scales_of(m, turn, scales);
  const int8_t* w = static_cast<const int8_t*>(m.weight);
  for (int t = 0; t < tokens; t++) {
    each_rows<kInts, 8>(turn, [&](auto number, int o, int, int at, int) {
      digit_dots<decltype(number)::value>(w + size_t(o) * m.stride, m.stride, x, token + t, out[t] + at);
    });
    for (int o = 0; o < turn.count; o++) out[t][o] *= x.scales[token + t] * scales[o];
  }
}
#else
static void digit_sums(const Matrix&, const Turn&, const Rounded&, int, int, float (*)[kInts]) {}  // nobody makes digits: kHasDots
#endif

static void row_sums(const Matrix& m, const Turn& turn, const Rounded& x, int token, int tokens, float (*out)[kInts]) {
  if (x.digits == 3) return digit_sums(m, turn, x, token, tokens, out);
  int sums[4][kInts];
  switch (tokens) {
    case 1: row_sums<1>(m, turn, x, token, sums); break;
    case 2: row_sums<2>(m, turn, x, token, sums); break;
    case 3: row_sums<3>(m, turn, x, token, sums); break;
    default: row_sums<4>(m, turn, x, token, sums);
  }
  float scales[kInts];
  scales_of(m, turn, scales);
  for (int t = 0; t < tokens; t++)
    for (int o = 0; o < turn.count; o++) out[t][o] = float(sums[t][o]) * x.scales[token + t] * scales[o];
}

constexpr int kAtoms = 2 * kBytes / kAtom;  // in a step of two weights a byte: kBytes bytes of weights, which are as many even inputs and as many odd ones

// With AVX-512 and VNNI, blocks and groups are multiplied in steps.cpp.
#if !defined(__AVX512VNNI__)

// --- GGUF blocks ---------------------------------------------------------------------------------------------------------

#if defined(__aarch64__)
typedef vf AtomSums;
static inline float total_of(AtomSums v) { return sum(v); }

template <int T>
static inline AtomSums atom_dots(v32u bytes, const int8_t* inputs, const float* scales, float by) {
  const int32x4_t none = vdupq_n_s32(0);
  int32x4_t low = add_dot(none, (int8x16_t)bytes.low, vld1q_s8(inputs));
  if constexpr (T == kQ6_K) {
    int32x4_t high = add_dot(none, (int8x16_t)bytes.high, vld1q_s8(inputs + 16));
    return (vf)vcvtq_f32_s32(low) * (scales[0] * by) + (vf)vcvtq_f32_s32(high) * (scales[1] * by);
  }
  return (vf)vcvtq_f32_s32(add_dot(low, (int8x16_t)bytes.high, vld1q_s8(inputs + 16))) * (scales[0] * by);
}
#else
typedef v8f AtomSums;
static inline float total_of(AtomSums v) { return sum8(v); }

// What an atom adds: its products with the inputs by fours, times the scale of the weights (of Q6_K two) and of the inputs.
template <int T>
static inline AtomSums atom_dots(v32u bytes, const int8_t* inputs, const float* scales, float by) {
  const v8f scale = T == kQ6_K ? twice_four(scales) : v8f{} + scales[0];
  v32s x = load32(inputs);
  v8i dots = T == kQ8_0 ? add_signed_dot(v8i{}, bytes, x) : add_dot(v8i{}, bytes, x);
  return __builtin_convertvector(dots, v8f) * (scale * by);
}
#endif

// What products and minima of R outputs and M tokens sum up to, whatever R is in the same order.
template <int R, int M>
static inline void put_sums(const AtomSums (&sums)[R][M], const vf (&least)[R][M], float (*out)[kInts], int at, int at_apart) {
#pragma GCC unroll 4
  for (int t = 0; t < M; t++) {
    float totals[R];
    if constexpr (sizeof(AtomSums) == sizeof(vf)) {
      auto all = [&](int r) { return (vf)sums[r][t] + least[r][t]; };
      if constexpr (R == 4) {
        dt::sum4(all(0), all(1), all(2), all(3), totals);
      } else {
        for (int r = 0; r < R; r++) totals[r] = sum(all(r));
      }
    } else {
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) totals[r] = total_of(sums[r][t]) + sum(least[r][t]);
    }
    for (int r = 0; r < R; r++) out[t][at + r * at_apart] = totals[r];
  }
}

// Scales and minima of atoms first .. first + count - 1 of so many rows, in one call.
template <int T, int kEach>
DT_CALLED static void rows_scales(const uint8_t* const* rows, int number, int first, int count, float (*scales)[kEach], float (*mins)[kEach]) {
  DT_ROLLED
  for (int r = 0; r < number; r++) atom_scales<T>(rows[r], first, count, scales[r], mins[r]);
}

// Of outputs o, o + apart, ...; their sums go to places at, at + at_apart, ... of a token.
template <int T, int R, int M>
DT_CALLED static void block_dots(const Matrix& m, int o, int apart, const Rounded& x, int token, float (*out)[kInts], int at, int at_apart) {
  constexpr int kScales = T == kQ6_K ? 2 : 1;
  constexpr int kFetch = 64 * block_size(T) / kAtom / block_bytes(T);  // atoms in a line
  const int atoms = m.cols / kAtom;
  const size_t atom_bytes = m.stride / atoms, ahead = (kAheadBytes / m.stride + 1) * m.stride;
  const uint8_t* rows[R];
  AtomSums sums[R][M];
  vf least[R][M];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
    rows[r] = static_cast<const uint8_t*>(m.weight) + size_t(o + r * apart) * m.stride;
#pragma GCC unroll 4
    for (int t = 0; t < M; t++) sums[r][t] = AtomSums{}, least[r][t] = vf{};
  }
  for (int first = 0; first < atoms; first += kSpan) {
    const int count = atoms - first < kSpan ? atoms - first : kSpan, number = count * kScales;
    alignas(64) float scales[R][kSpan * kScales], mins[R][kSpan * kScales];
    const float* steps = x.scales + size_t(token) * atoms + first;
    rows_scales<T>(rows, R, first, count, scales, mins);
    if constexpr (T == kQ8_0) {
#pragma GCC unroll 4
      for (int r = 0; r < R; r++)
        DT_ROLLED
        for (int a = 0; a < count; a++) mins[r][a] = -float(kMoved) * scales[r][a];
    }
    // What the minima add: of each atom the minimum times what its inputs stand for together.
    if (T != kQ8_0 || kMoved != 0) {
#pragma GCC unroll 4
      for (int t = 0; t < M; t++) {
        const float* inputs = x.sums + size_t(token + t) * 3 * atoms + (kScales == 2 ? 2 * first : 2 * atoms + first);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          int i = 0;
          DT_ROLLED
          for (; i + W <= number; i += W) least[r][t] += load(mins[r] + i) * load(inputs + i);
          DT_ROLLED
          for (; i < number; i++) least[r][t][0] += mins[r][i] * inputs[i];
        }
      }
    }
    if constexpr (M == 1) {  // those of the inputs too: once for W atoms, not for each
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        if constexpr (kScales == 2) {  // whole blocks
          DT_ROLLED
          for (int i = 0; i < number; i += W) store(scales[r] + i, load(scales[r] + i) * each_twice(steps + i / 2));
        } else {
          DT_ROLLED
          for (int i = 0; i < number; i++) scales[r][i] *= steps[i];
        }
      }
    }
    for (int a = 0; a < count; a++) {
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        v32u bytes = values<T>(rows[r], first + a);
        if (a % kFetch == 0) __builtin_prefetch(rows[r] + ahead + (first + a) * atom_bytes, 0, 2);
#pragma GCC unroll 4
        for (int t = 0; t < M; t++)
          sums[r][t] += atom_dots<T>(bytes, x.ints + size_t(token + t) * x.stride + size_t(first + a) * kAtom, scales[r] + a * kScales,
                                     M == 1 ? 1.0f : steps[size_t(t) * atoms + a]);
      }
    }
  }
  put_sums(sums, least, out, at, at_apart);
}

template <int T, int M>
static void block_rows(const Matrix& m, const Turn& turn, const Rounded& x, int token, float (*out)[kInts]) {
  each_rows<kInts, M <= 2 ? 4 : 2>(turn, [&](auto number, int o, int apart, int at, int at_apart) {
    block_dots<T, decltype(number)::value, M>(m, o, apart, x, token, out, at, at_apart);
  });
}

template <int T>
static void block_sums(const Matrix& m, const Turn& turn, const Rounded& x, int token, int tokens, float (*out)[kInts]) {
  switch (tokens) {
    case 1: return block_rows<T, 1>(m, turn, x, token, out);
    case 2: return block_rows<T, 2>(m, turn, x, token, out);
    case 3: return block_rows<T, 3>(m, turn, x, token, out);
    default: return block_rows<T, 4>(m, turn, x, token, out);
  }
}

// --- two weights a byte, with scale and minimum of a group ---------------------------------------------------------------

typedef AtomSums Floats;

#if defined(__aarch64__)
static inline Bytes nibbles_at(const uint8_t* p, int) { return (Bytes)vld1q_u8(p); }  // a step is one atom
static inline Sums nibble_dots(Bytes w, const int8_t* x) {
  int32x4_t sums = add_dot(vdupq_n_s32(0), vandq_s8(w, vdupq_n_s8(15)), vld1q_s8(x));
  return (Sums)add_dot(sums, (int8x16_t)vshrq_n_u8((uint8x16_t)w, 4), vld1q_s8(x + kBytes));
}
static inline Floats spread(const float* p) { return splat(*p); }
#else
static inline Bytes nibbles_at(const uint8_t* p, int bytes) {
  if (bytes >= kBytes) return load32(reinterpret_cast<const int8_t*>(p));
  v32s v = {};  // half a step: rows are whole atoms
  memcpy(&v, p, kAtom / 2);
  return v;
}
static inline Sums nibble_dots(Bytes w, const int8_t* x) {
  v8i sums = add_dot(v8i{}, (v32u)w & 15, load32(x));
  return add_dot(sums, shifted((v32u)w, 4, 15), load32(x + kBytes));
}
static inline Floats spread(const float* p) { return twice_four(p); }
#endif

template <int R, int M>
DT_CALLED static void nibble_rows(const Matrix& m, const Groups& groups, int o, int apart, const Rounded& x, int token, float (*out)[kInts],
                               int at, int at_apart) {
  const size_t ahead = (kAheadBytes / m.stride + 1) * m.stride;
  const int atoms = m.cols / kAtom;
  const uint8_t* rows[R];
  for (int r = 0; r < R; r++) rows[r] = static_cast<const uint8_t*>(m.weight) + size_t(o + r * apart) * m.stride;
  Floats sums[R][M];
  vf least[R][M];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int t = 0; t < M; t++) sums[r][t] = Floats{}, least[r][t] = vf{};
  for (int first = 0; first < atoms; first += kSpan) {
    const int count = atoms - first < kSpan ? atoms - first : kSpan;
    alignas(64) float scales[R][kSpan], mins[R][kSpan];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      group_scales(m, groups, m.scales, o + r * apart, first, count, scales[r]);
      group_mins(m, groups, o + r * apart, first, count, scales[r], mins[r]);
      if constexpr (M == 1) {  // of the inputs too: once for W atoms, not for each step
        const float* steps = x.scales + size_t(token) * x.scale_stride + first;
        DT_ROLLED
        for (int i = 0; i < count; i += W) store(scales[r] + i, load(scales[r] + i) * load(steps + i));
      }
    }
    for (int a = 0; a < count; a += kAtoms) {
      const int begin = (first + a) * (kAtom / 2), bytes = m.cols / 2 - begin;
      Floats steps[M];
      if constexpr (M > 1) {
#pragma GCC unroll 4
        for (int t = 0; t < M; t++) steps[t] = spread(x.scales + size_t(token + t) * x.scale_stride + first + a);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        const Bytes w = nibbles_at(rows[r] + begin, bytes);
        __builtin_prefetch(rows[r] + ahead + begin, 0, 2);
        const Floats scale = spread(scales[r] + a);
#pragma GCC unroll 4
        for (int t = 0; t < M; t++) {
          const Sums dots = nibble_dots(w, x.ints + size_t(token + t) * x.stride + 2 * begin);
          const Floats both = M > 1 ? scale * steps[t] : scale;
          sums[r][t] += __builtin_convertvector(dots, Floats) * both;
        }
      }
    }
    // What the minima add: of each atom the minimum times what its inputs stand for together.
#pragma GCC unroll 4
    for (int t = 0; t < M; t++) {
      const float* inputs = x.sums + size_t(token + t) * x.scale_stride + first;
#pragma GCC unroll 4
      for (int r = 0; r < R; r++)
        DT_ROLLED
        for (int i = 0; i < count; i += W) least[r][t] += load(mins[r] + i) * load(inputs + i);
    }
  }
  put_sums(sums, least, out, at, at_apart);
}

template <int M>
static void nibble_rows(const Matrix& m, const Turn& turn, const Rounded& x, int token, float (*out)[kInts]) {
  const Groups groups(m);
  each_rows<kInts, kRegisters == 32 || M == 1 ? 4 : 2>(turn, [&](auto number, int o, int apart, int at, int at_apart) {
    nibble_rows<decltype(number)::value, M>(m, groups, o, apart, x, token, out, at, at_apart);
  });
}

static void nibble_sums(const Matrix& m, const Turn& turn, const Rounded& x, int token, int tokens, float (*out)[kInts]) {
  switch (tokens) {
    case 1: return nibble_rows<1>(m, turn, x, token, out);
    case 2: return nibble_rows<2>(m, turn, x, token, out);
    case 3: return nibble_rows<3>(m, turn, x, token, out);
    default: return nibble_rows<4>(m, turn, x, token, out);
  }
}

#endif

static auto sums_of(const Matrix& m) -> void (*)(const Matrix&, const Turn&, const Rounded&, int, int, float (*)[kInts]) {
  switch (int(m.format)) {
#if !defined(__AVX512VNNI__)
    case int(Format::kInt4): return nibble_sums;
    case int(Format::kBlocks) + kQ4_0: return block_sums<kQ4_0>;
    case int(Format::kBlocks) + kQ4_1: return block_sums<kQ4_1>;
    case int(Format::kBlocks) + kQ5_0: return block_sums<kQ5_0>;
    case int(Format::kBlocks) + kQ5_1: return block_sums<kQ5_1>;
    case int(Format::kBlocks) + kQ8_0: return block_sums<kQ8_0>;
    case int(Format::kBlocks) + kQ4_K: return block_sums<kQ4_K>;
    case int(Format::kBlocks) + kQ5_K: return block_sums<kQ5_K>;
    case int(Format::kBlocks) + kQ6_K: return block_sums<kQ6_K>;
#endif
    default: return row_sums;
  }
}

static void some_outputs(const Rounded& x, const Matrix& m, const Sink& sink, const Turn& turn) {
  auto run = sums_of(m);
  for (int token = 0; token < x.num_tokens; token += 4) {
    alignas(64) float out[4][kInts];
    const int tokens = x.num_tokens - token < 4 ? x.num_tokens - token : 4;
    run(m, turn, x, token, tokens, out);
    each_run<kInts>(turn, [&](int first, int count, int at) {
      for (int t = 0; t < tokens; t++) {
        const float* sums = out[t] + at;
        int o = 0;
        for (; o + W <= count; o += W) sink.put(token + t, first + o, m.bias ? load(sums + o) + load(m.bias + first + o) : load(sums + o));
        for (; o < count; o++) sink.put(token + t, first + o, m.bias ? sums[o] + m.bias[first + o] : sums[o]);
      }
    });
  }
}

static void chunk_of(const Rounded& x, const Matrix& m, const Sink& sink, int begin, int end) {
  each_turn<kInts>(m, begin, end, [&](const Turn& turn) { some_outputs(x, m, sink, turn); });
}

// --- rounding ------------------------------------------------------------------------------------------------------------

static void ints_of(const float* x, int size, float scale, int8_t* out) {
  const bool is_zero = scale == 0.0f;
  int k = 0;
  for (; k + W <= size; k += W) {
    typedef int8_t vs __attribute__((vector_size(W)));
    vf value = is_zero ? vf{} : nearest(load(x + k) / splat(scale));
    vs bytes = __builtin_convertvector(__builtin_convertvector(value, vi), vs);
    memcpy(out + k, &bytes, W);
  }
  for (; k < size; k++) out[k] = is_zero ? 0 : int8_t(int(nearest(splat(x[k] / scale))[0]));
}

static int32_t total_of(const int8_t* ints, int size) {
  int32_t total = 0;
  int k = 0;
#if defined(__aarch64__)
  int32x4_t sums = vdupq_n_s32(0);
  for (; k + 16 <= size; k += 16) sums = add_dot(sums, vdupq_n_s8(1), vld1q_s8(ints + k));
  total = vaddvq_s32(sums);
#else
  v8i sums = {};
  for (; k + 32 <= size; k += 32) sums = add_dot(sums, v32u{} + 1, load32(ints + k));
  if (k > 0) total = sum8(sums);
#endif
  for (; k < size; k++) total += ints[k];
  return total;
}

}  // namespace

float round_block(const float* x, int8_t* ints, int32_t& total) {
  const float scale = largest_of(x, kAtom) / 127.0f;
  ints_of(x, kAtom, scale, ints);
  total = total_of(ints, kAtom);
  return scale;
}

static int padded(int size) { return (size + 127) / 128 * 128; }
static size_t whole_steps(size_t blocks) { return (blocks + 15) / 16 * 16; }  // of vectors, and of kAtoms
static size_t blocks_of(int size) { return (size + kAtom - 1) / kAtom; }

size_t rounded_floats(int num_tokens, int size) {
  size_t digits = num_tokens <= kFewRows ? 3 : 1;
  size_t each = digits * (padded(size) / 4 + 1) + 4 * whole_steps(blocks_of(size)) + 1;
  return (size_t(num_tokens) * each + 64 + 15) / 16 * 16;
}

Rounded digit_rows(const float* rows, size_t stride, int num_tokens, int size, float* space) {
  int8_t* ints = reinterpret_cast<int8_t*>(space);
  float* scales = space + size_t(3 * num_tokens) * padded(size) / 4;
  int32_t* totals = reinterpret_cast<int32_t*>(scales + num_tokens);
#if defined(__AVX512VNNI__)
  for (int t = 0; t < num_tokens; t++) {
    const float* row = rows + size_t(t) * stride;
    scales[t] = largest_of(row, size) / 8355000.0f;
    const __m512 by = _mm512_set1_ps(scales[t] == 0.0f ? 1.0f : scales[t]);
    int8_t* out[3];
    for (int d = 0; d < 3; d++) out[d] = ints + size_t(3 * t + d) * padded(size);
    for (int k = 0; k < size; k += W) {
      const __mmask16 mask = size - k >= W ? 0xffff : (1 << (size - k)) - 1;
      vi q = (vi)_mm512_cvtps_epi32(_mm512_div_ps(_mm512_maskz_loadu_ps(mask, row + k), by));
      vi low = ((q + 128) & 255) - 128;
      q = (q - low) >> 8;
      vi middle = ((q + 128) & 255) - 128;
      q = (q - middle) >> 8;
      const vi parts[] = {q, middle, low};
      for (int d = 0; d < 3; d++)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out[d] + k), _mm512_cvtepi32_epi8((__m512i)parts[d]));
    }
    for (int d = 0; d < 3; d++) totals[3 * t + d] = total_of(out[d], size / kBytes * kBytes);
  }
#else
  (void)rows, (void)stride;
#endif
  return Rounded{num_tokens, size, padded(size), false, 3, ints, scales, nullptr, totals};
}

// One row with a scale for each 32 inputs, evens and odds of each step apart.
static void round_nibbles(const float* row, int size, int8_t* out, float* scales, float* sums) {
  const size_t blocks = blocks_of(size);
  for (size_t b = 0; b < whole_steps(blocks); b++) {
    int8_t ints[kAtom];
    scales[b] = sums[b] = 0;
    int8_t* to = out + b / kAtoms * (2 * kBytes) + b % kAtoms * (kAtom / 2);
    if (b < blocks) {
      scales[b] = largest_of(row + b * kAtom, kAtom) / 127.0f;
      ints_of(row + b * kAtom, kAtom, scales[b], ints);
      sums[b] = scales[b] * float(total_of(ints, kAtom));
    } else if (b >= (blocks + kAtoms - 1) / kAtoms * kAtoms) {
      continue;
    } else {
      memset(ints, 0, kAtom);
    }
    for (int i = 0; i < kAtom / 2; i++) {
      to[i] = ints[2 * i];
      to[kBytes + i] = ints[2 * i + 1];
    }
  }
}

Rounded round_rows(const float* rows, size_t stride, int num_tokens, int size, Rounding rounding, float* space) {
  const bool has_blocks = rounding == Rounding::kBlocks, has_nibbles = rounding == Rounding::kNibbles;
  const size_t blocks = blocks_of(size), steps = whole_steps(blocks);
  int8_t* ints = reinterpret_cast<int8_t*>(space);
  float* scales = space + size_t(num_tokens) * padded(size) / 4;
  float* sums = scales + size_t(num_tokens) * (has_nibbles ? steps : has_blocks ? blocks : 1);
  int32_t* totals = reinterpret_cast<int32_t*>(sums + (has_blocks ? size_t(num_tokens) * 3 * blocks : 0));
  int run = 8192 / (size > 0 ? size : 1);
  if (run < 1) run = 1;
  parallel((num_tokens + run - 1) / run, [&](int chunk, int) {
    int end = (chunk + 1) * run < num_tokens ? (chunk + 1) * run : num_tokens;
    for (int t = chunk * run; t < end; t++) {
      const float* row = rows + size_t(t) * stride;
      int8_t* out = ints + size_t(t) * padded(size);
      if (has_nibbles) {
        round_nibbles(row, size, out, scales + t * steps, sums + t * steps);
        continue;
      }
      if (!has_blocks) {
        scales[t] = largest_of(row, size) / 127.0f;
        ints_of(row, size, scales[t], out);
        totals[t] = total_of(out, size / kBytes * kBytes);
        continue;
      }
      for (size_t b = 0; b < blocks; b++) {
        float scale = largest_of(row + b * kAtom, kAtom) / 127.0f;
        scales[t * blocks + b] = scale;
        ints_of(row + b * kAtom, kAtom, scale, out + b * kAtom);
        float* at = sums + t * 3 * blocks;
        for (int half = 0; half < 2; half++) at[2 * b + half] = scale * float(total_of(out + b * kAtom + half * 16, 16));
        at[2 * blocks + b] = at[2 * b] + at[2 * b + 1];
      }
    }
  });
  return Rounded{num_tokens, size, padded(size), has_blocks, 1, ints, scales, sums, totals, steps};
}

void round_to_blocks(float* rows, int num_tokens, int size) {
  parallel(num_tokens, [&](int t, int) {
    for (int b = 0; b < size; b += kAtom) {
      float* at = rows + size_t(t) * size + b;
      const float scale = largest_of(at, kAtom) / 127.0f;
      for (int i = 0; i < kAtom; i += W) store(at + i, scale == 0.0f ? vf{} : nearest(load(at + i) / splat(scale)) * splat(scale));
    }
  });
}

// Four significant bits, below 2^-6 as many as are left above 2^-9: adding and taking off 1.5 * 2^23 units of the last place.
static inline vf nearest_float8(vf x) {
  vu exponent = (vu)x & 0x7f800000u;
  vf least = vmax((vf)exponent, splat(0.015625f));  // 2^-6
  vf magic = least * splat(1572864.0f);             // 1.5 * 2^23 * 2^-3
  return (x + magic) - magic;
}

void round_to_float8(float* rows, int num_tokens, int size, float scale) {
  int run = 8192 / (size > 0 ? size : 1);
  if (run < 1) run = 1;
  parallel((num_tokens + run - 1) / run, [&](int chunk, int) {
    int end = (chunk + 1) * run < num_tokens ? (chunk + 1) * run : num_tokens;
    for (int t = chunk * run; t < end; t++) {
      float* row = rows + size_t(t) * size;
      const float by = scale != 0.0f ? scale : largest_of(row, size) / 448.0f;
      if (by == 0.0f) continue;
      auto rounded = [&](vf x) {
        vf cut = vmax(vmin(x / splat(by), splat(448.0f)), splat(-448.0f));
        return select(x == x, nearest_float8(cut) * splat(by), x);
      };
      int k = 0;
      for (; k + W <= size; k += W) store(row + k, rounded(load(row + k)));
      for (; k < size; k++) row[k] = rounded(splat(row[k]))[0];
    }
  });
}

void matmul(const Rounded& x, const Matrix* matrices, const Sink* sinks, int count) {
  int size = few_rows_at_a_time(matrices, count), total = 0;
  for (int i = 0; i < count; i++) total += (matrices[i].rows + size - 1) / size;
  parallel(total, [&](int chunk, int) {
    int which = 0;
    for (int chunks; chunk >= (chunks = (matrices[which].rows + size - 1) / size); which++) chunk -= chunks;
    int first = chunk * size, rows = matrices[which].rows;
    chunk_of(x, matrices[which], sinks[which], first, first + size < rows ? first + size : rows);
  });
}

}  // namespace dt
