#include "steps.h"

#include "packed.h"

#if defined(__AVX512VNNI__)

#include <type_traits>

#include "groups.h"
#include "pool.h"

namespace dt {
namespace {

constexpr int kStep = 128;               // inputs
constexpr int kStepAtoms = kStep / kAtom;
constexpr int kRun = W / kStepAtoms;     // steps whose scales fill a vector
constexpr int kBlock = 64;               // bytes of a vector
constexpr int kOutputs = 32;             // at a time
constexpr int kMostTokens = 4;           // that meet a vector of weights while it is in a register

static inline __m512i load_bytes64(const void* p) { return _mm512_loadu_si512(p); }
static inline __m512i dot(__m512i sums, __m512i weights, const char* x) { return _mm512_dpbusd_epi32(sums, weights, load_bytes64(x)); }
static inline vf floats(__m512i v) { return (vf)_mm512_cvtepi32_ps(v); }
static inline vf spread(__m512i from, vf numbers) { return (vf)_mm512_permutexvar_ps(from, (__m512)numbers); }
static inline vf halves(__m512i words) { return (vf)_mm512_cvtph_ps(_mm512_castsi512_si256(words)); }

// Bytes begin .. begin + 63 of those that are left of a row, zeros behind its end.
template <bool kWhole>
static inline __m512i row_bytes(const uint8_t* row, int begin, int left) {
  if (kWhole) return load_bytes64(row + begin);
  const int count = left - begin;
  const __mmask64 mask = count >= kBlock ? ~__mmask64(0) : count <= 0 ? 0 : (__mmask64(1) << count) - 1;
  return _mm512_maskz_loadu_epi8(mask, row + begin);
}

// --- formats -------------------------------------------------------------------------------------------------------------
//
// The two vectors of a step's weights, each a byte, and which of its inputs they are:
//   kPairs    the even ones, and the odd ones
//   kHalves   the first 16 of each atom, and the last 16
//   kInOrder  two atoms, and the two behind them
//   kCrossed  atoms 0 and 2, and atoms 1 and 3
// In the first two, sums of four products of both vectors have the same scale, and are made as one.

enum class Order { kPairs, kHalves, kInOrder, kCrossed };

constexpr Order order_of(int format) {
  return format == int(Format::kInt4)                                              ? Order::kPairs
         : format == int(Format::kBlocks) + kQ8_0 || format == int(Format::kBlocks) + kQ6_K ? Order::kInOrder
         : format == int(Format::kBlocks) + kQ4_K || format == int(Format::kBlocks) + kQ5_K ? Order::kCrossed
                                                                                   : Order::kHalves;
}
constexpr bool is_joint(Order order) { return order == Order::kPairs || order == Order::kHalves; }

// The code that stands for zero where a format has no minima: weight = scale * (code - centre).
constexpr int centre_of(int format) {
  switch (format - int(Format::kBlocks)) {
    case kQ4_0: return 8;
    case kQ5_0: return 16;
    case kQ6_K: return 32;
    case kQ8_0: return 128;  // of its signed codes, moved up
    default: return 0;
  }
}
constexpr bool has_supers(int format) { return format >= int(Format::kBlocks) + kQ4_K; }
// Of these all scales and minima of a block are a vector, and are multiplied with those of its inputs at a time.
constexpr bool has_mins_of_supers(int format) { return has_supers(format) && centre_of(format) == 0; }

// Codes of Q8_0 are so large that sums of all three digits may need more than 32 bits: two sums then, of the upper two and the last.
constexpr bool has_two_sums(int format, int digits) { return digits == 3 && format == int(Format::kBlocks) + kQ8_0; }

// Where things are in a record, in bytes. Of joint sums a record is four steps, so that W atoms' scales are multiplied at a time:
//   int8 [4, digits, 128], float [16] scales, float [16] what an atom's inputs sum up to, int32 [4, 16] offsets if any.
// Else it is one step; where a block has minima, its scales and sums come behind the last record, and not in it:
//   int8 [digits, 128], float [2, 16] scales, each as often as it has sums, int32 [2 or 4, 16] offsets if any.
struct Layout {
  size_t step, scales, sums, offsets, size;
  constexpr Layout(int format, int digits) : step(size_t(digits) * kStep), scales(0), sums(0), offsets(0), size(0) {
    const bool joint = is_joint(order_of(format)), moves = centre_of(format) != 0;
    scales = joint ? kRun * step : step;
    sums = scales + kBlock;
    offsets = scales + 2 * kBlock;
    if (has_mins_of_supers(format)) scales = sums = offsets = step;
    size = offsets + (!moves ? 0 : joint ? kRun : has_two_sums(format, digits) ? 4 : 2) * kBlock;
  }
};

constexpr int steps_of(int size) { return (size + kStep - 1) / kStep; }
constexpr int records_of(int format, int size) { return is_joint(order_of(format)) ? (steps_of(size) + kRun - 1) / kRun : steps_of(size); }
// Floats behind the last record: of blocks of 256 inputs, eight scales and eight sums.
constexpr int numbers_behind(int format, int size) { return has_mins_of_supers(format) ? size / 256 * W : 0; }

// --- sums of a step ------------------------------------------------------------------------------------------------------

// Of D digits: ((first * 256) + second) * 256 + third, exact as long as it fits 32 bits. 64 bytes of weights, or twice 64.
template <int D>
static inline __m512i digit_sums(__m512i first, __m512i second, const char* x) {
  __m512i sums = dot(dot(_mm512_setzero_si512(), first, x), second, x + kBlock);
#pragma GCC unroll 2
  for (int d = 1; d < D; d++) sums = dot(dot(_mm512_slli_epi32(sums, 8), first, x + d * kStep), second, x + d * kStep + kBlock);
  return sums;
}
template <int D>
static inline __m512i digit_sums(__m512i weights, const char* x) {
  __m512i sums = dot(_mm512_setzero_si512(), weights, x);
#pragma GCC unroll 2
  for (int d = 1; d < D; d++) sums = dot(_mm512_slli_epi32(sums, 8), weights, x + d * kStep);
  return sums;
}

// Adds what joint sums of step `i` of a run are with its scales.
template <int kFormat, int D>
static inline void add_joint(vf& sum, __m512i first, __m512i second, vf scale, const char* record, int i) {
  constexpr Layout layout(kFormat, D);
  __m512i sums = digit_sums<D>(first, second, record + i * layout.step);
  if constexpr (centre_of(kFormat) != 0) sums = _mm512_add_epi32(sums, load_bytes64(record + layout.offsets + i * kBlock));
  sum += floats(sums) * scale;
}
// The same of vector number kHalf of a step. scale: that of the inputs in it already if has_mins_of_supers.
template <int kFormat, int D, int kHalf>
static inline void add_half(vf& sum, __m512i weights, vf scale, const char* record) {
  constexpr Layout layout(kFormat, D);
  const char* x = record + kHalf * kBlock;
  const char* offsets = record + layout.offsets + kHalf * (has_two_sums(kFormat, D) ? 2 : 1) * kBlock;
  vf by = scale;
  if constexpr (!has_mins_of_supers(kFormat)) by *= load(reinterpret_cast<const float*>(record + layout.scales + kHalf * kBlock));
  if constexpr (has_two_sums(kFormat, D)) {
    __m512i upper = dot(load_bytes64(offsets), weights, x), last = dot(load_bytes64(offsets + kBlock), weights, x + 2 * kStep);
    upper = dot(_mm512_slli_epi32(upper, 8), weights, x + kStep);
    sum += (floats(upper) * 256.0f + floats(last)) * by;
  } else {
    __m512i sums = digit_sums<D>(weights, x);
    if constexpr (centre_of(kFormat) != 0) sums = _mm512_add_epi32(sums, load_bytes64(offsets));
    sum += floats(sums) * by;
  }
}

// --- a row of weights ----------------------------------------------------------------------------------------------------

// Into the first cache, and so less far than rows of larger numbers ask for: what is asked for into the second has to be waited for
// once more, which there is no time for between so few instructions (measured). On Zen 5, as there, 4 KiB and the first cache alone.
#if defined(DT_FETCH_FIRST)
constexpr int kAhead = kFewAhead, kNearness = kFewNearness;
#else
constexpr int kAhead = 2304, kNearness = 3;
#endif
static inline void ask_for(const uint8_t* here) { __builtin_prefetch(here + kAhead, 0, kNearness); }

// The 8 words of codes of each of four blocks.
static inline __m512i code_words(int word, int each) {
  alignas(64) int16_t at[32];
  for (int i = 0; i < 32; i++) at[i] = int16_t(word + i / 8 * each + i % 8);
  return _mm512_load_si512(at);
}
// The first words of four blocks, in turn, and behind 16 of them the second ones.
static inline __m512i first_words(int word, int each) {
  alignas(64) int16_t at[32];
  for (int i = 0; i < 32; i++) at[i] = int16_t(word + i % 4 * each + i / 16);
  return _mm512_load_si512(at);
}
// Numbers 4 i .. 4 i + 3, each four times.
static inline __m512i four_of(int i) {
  const vi lane = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
  return (__m512i)(lane + 4 * i);
}

// Four blocks of Q4_0, Q4_1, Q5_0 or Q5_1. Most is in the first 64 of their bytes, the rest in another vector, `kSecond` behind.
template <int T>
struct FourBlocks {
  static constexpr int kWords = block_bytes(T) / 2, kCodes = value_offset(T) / 2;
  static constexpr int kSecond = T == kQ4_0 ? 8 : T == kQ4_1 ? 16 : T == kQ5_0 ? 24 : 32;
  static constexpr bool kHasMins = T == kQ4_1 || T == kQ5_1, kHasFifth = T == kQ5_0 || T == kQ5_1;
  static constexpr int kBehind = kHasFifth ? 2 : 3;  // the first block whose codes are in the second vector
  __m512i codes = code_words(kCodes, kWords), codes_behind = code_words(kCodes - kSecond / 2, kWords);
  __m512i heads = first_words(0, kWords), heads_behind = first_words(-kSecond / 2, kWords);

  static uint64_t fifth_bits(const uint8_t* row, int left, int half) {
    uint64_t bits = 0;
    for (int b = 0; b < 4; b++) {
      uint16_t word = 0;
      if (left >= (b + 1) * block_bytes(T)) memcpy(&word, row + b * block_bytes(T) + value_offset(T) - 4 + 2 * half, 2);
      bits |= uint64_t(word) << 16 * b;
    }
    return bits;
  }

  // Scales of the blocks, and second numbers where they have one, into place i of a run. left: bytes of the row from here on.
  template <bool kWhole>
  __m512i add_heads(__m512i found, const uint8_t* row, int left, int i) const {
    const __mmask32 at = 0x000f000fu << 4 * i, last = 0x00080008u << 4 * i;
    found = _mm512_mask_permutexvar_epi16(found, at, heads, row_bytes<kWhole>(row, 0, left));
    if constexpr (kHasFifth) found = _mm512_mask_permutexvar_epi16(found, last, heads_behind, row_bytes<kWhole>(row, kSecond, left));
    return found;
  }

  // Codes of the blocks' first and last 16 inputs.
  template <bool kWhole>
  void read(const uint8_t* row, int left, __m512i& low, __m512i& high) const {
    const __m512i begin = row_bytes<kWhole>(row, 0, left), behind = row_bytes<kWhole>(row, kSecond, left);
    const __m512i both = _mm512_mask_permutexvar_epi16(_mm512_permutexvar_epi16(codes, begin), ~__mmask32(0) << 8 * kBehind, codes_behind, behind);
    const __m512i nibble = _mm512_set1_epi8(15), fifth = _mm512_set1_epi8(16);
    low = _mm512_and_si512(both, nibble);
    high = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
    if constexpr (kHasFifth) {
      low = _mm512_mask_add_epi8(low, fifth_bits(row, left, 0), low, fifth);
      high = _mm512_mask_add_epi8(high, fifth_bits(row, left, 1), high, fifth);
    }
  }
};

template <int T, int D, int M>
struct BlockRow {
  static constexpr int kFormat = int(Format::kBlocks) + T, kBytes = 4 * block_bytes(T);
  static constexpr Layout kLayout{kFormat, D};
  FourBlocks<T> blocks;
  explicit BlockRow(const Matrix&) {}

  // Some steps of a run, of which the last may reach behind the row's end.
  template <bool kWhole>
  void add_run(const uint8_t* row, int left, int steps, const char* const (&records)[M], vf (&sums)[M]) const {
    __m512i heads = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int i = 0; i < steps; i++) heads = blocks.template add_heads<kWhole>(heads, row + i * kBytes, left - i * kBytes, i);
    vf scales[M];
#pragma GCC unroll 4
    for (int t = 0; t < M; t++) scales[t] = halves(heads) * load(reinterpret_cast<const float*>(records[t] + kLayout.scales));
    if constexpr (FourBlocks<T>::kHasMins) {
      const vf mins = halves(_mm512_castsi256_si512(_mm512_extracti64x4_epi64(heads, 1)));
#pragma GCC unroll 4
      for (int t = 0; t < M; t++) sums[t] += mins * load(reinterpret_cast<const float*>(records[t] + kLayout.sums));
    }
    ask_for(row);
#pragma GCC unroll 4
    for (int i = 0; i < steps; i++) {
      __m512i low, high;
      ask_for(row + kBlock + i * kBytes);
      blocks.template read<kWhole>(row + i * kBytes, left - i * kBytes, low, high);
#pragma GCC unroll 4
      for (int t = 0; t < M; t++) add_joint<kFormat, D>(sums[t], low, high, spread(four_of(i), scales[t]), records[t], i);
    }
  }

  void run(const Matrix& m, int o, const Steps& x, const char* const (&tokens)[M], vf (&out)[M]) const {
    const uint8_t* row = static_cast<const uint8_t*>(m.weight) + size_t(o) * m.stride;
    int left = m.cols / kAtom * block_bytes(T), steps = x.steps;
    vf sums[M] = {};
    const char* records[M];
#pragma GCC unroll 4
    for (int t = 0; t < M; t++) records[t] = tokens[t];
    for (; left >= kRun * kBytes; left -= kRun * kBytes, row += kRun * kBytes, steps -= kRun) {
      add_run<true>(row, left, kRun, records, sums);
#pragma GCC unroll 4
      for (int t = 0; t < M; t++) records[t] += kLayout.size;
    }
    if (steps > 0) add_run<false>(row, left, steps, records, sums);
#pragma GCC unroll 4
    for (int t = 0; t < M; t++) out[t] = sums[t];
  }
};

// Q8_0: blocks of a float16 scale and 32 signed codes.
template <int D, int M>
struct ByteRow {
  static constexpr int kFormat = int(Format::kBlocks) + kQ8_0, kBytes = 34;
  static constexpr size_t kRecord = Layout(kFormat, D).size;
  __m512i scales;
  explicit ByteRow(const Matrix&) {
    alignas(64) int16_t at[32];
    for (int i = 0; i < 32; i++) at[i] = int16_t(i % 16 / 8 * (kBytes / 2));
    scales = _mm512_load_si512(at);
  }

  // Two blocks, of which the second may lie behind the row's end.
  template <int kHalf, bool kWhole>
  void half(const uint8_t* at, bool has_second, const char* const (&records)[M], vf (&sums)[M]) const {
    const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 2));
    __m512i codes = _mm512_castsi256_si512(first), words;
    if (kWhole || has_second) {
      codes = _mm512_inserti64x4(codes, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + kBytes + 2)), 1);
      words = load_bytes64(at);
    } else {
      words = _mm512_maskz_loadu_epi8((__mmask64(1) << kBytes) - 1, at);
    }
    const __m512i moved = _mm512_xor_si512(codes, _mm512_set1_epi8(char(0x80)));
    const vf scale = halves(_mm512_permutexvar_epi16(scales, words));
#pragma GCC unroll 4
    for (int t = 0; t < M; t++) add_half<kFormat, D, kHalf>(sums[t], moved, scale, records[t]);
  }

  void run(const Matrix& m, int o, const Steps& x, const char* const (&tokens)[M], vf (&out)[M]) const {
    const uint8_t* row = static_cast<const uint8_t*>(m.weight) + size_t(o) * m.stride;
    const int whole = m.cols / kStep, left = m.cols % kStep / kAtom;
    vf sums[M] = {};
    const char* records[M];
#pragma GCC unroll 4
    for (int t = 0; t < M; t++) records[t] = tokens[t];
    for (int s = 0; s < whole; s++, row += 4 * kBytes) {
      ask_for(row);
      half<0, true>(row, true, records, sums);
      ask_for(row + 2 * kBytes);
      half<1, true>(row + 2 * kBytes, true, records, sums);
#pragma GCC unroll 4
      for (int t = 0; t < M; t++) records[t] += kRecord;
    }
    ask_for(row);
    if (left > 0) half<0, false>(row, left > 1, records, sums);
    if (left > 2) half<1, false>(row + 2 * kBytes, false, records, sums);
#pragma GCC unroll 4
    for (int t = 0; t < M; t++) out[t] = sums[t];
  }
};

// Scales of Q6_K, of sixteen inputs each.
static inline vf half_scales(const uint8_t* block) {
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(block + 192));
  return floats(_mm512_cvtepi8_epi32(codes)) * splat(half_at(block + 208));
}

// Q4_K, Q5_K and Q6_K: blocks of 256 inputs.
template <int T, int D, int M>
struct SuperRow {
  static constexpr int kFormat = int(Format::kBlocks) + T;
  static constexpr size_t kRecord = Layout(kFormat, D).size;
  __m512i from[2][2];  // scales of step, half: each as often as it has sums
  explicit SuperRow(const Matrix&) {
    for (int s = 0; s < 2; s++)
      for (int h = 0; h < 2; h++) {
        alignas(64) int32_t at[16];
        for (int i = 0; i < 16; i++) at[i] = T == kQ6_K ? 8 * s + 4 * h + i / 4 : 4 * s + h + i / 8 * 2;
        from[s][h] = _mm512_load_si512(at);
      }
  }

  // Codes of step S of a block, in two vectors.
  template <int S>
  static void read(const uint8_t* block, __m512i& first, __m512i& second) {
    const __m512i nibble = _mm512_set1_epi8(15);
    const __m512i both = load_bytes64(block + (T == kQ4_K ? 16 : T == kQ5_K ? 48 : 0) + S * kBlock);
    first = _mm512_and_si512(both, nibble);
    second = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
    if constexpr (T == kQ4_K) return;
    const uint8_t* high = block + (T == kQ5_K ? 16 : 128 + 32 * S);
    const __m512i bits = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(high)));
    auto by = [](int low, int high) __attribute__((always_inline)) { return _mm512_inserti64x4(_mm512_set1_epi16(low), _mm256_set1_epi16(high), 1); };
    if constexpr (T == kQ5_K) {  // one bit for each atom: 0 and 2, 1 and 3 of the step
      const __m512i fifth = _mm512_set1_epi8(16);
      const __m512i shifted = S == 0 ? _mm512_sllv_epi16(bits, by(4, 2)) : _mm512_srlv_epi16(bits, by(0, 2));
      const __m512i other = S == 0 ? _mm512_sllv_epi16(bits, by(3, 1)) : _mm512_srlv_epi16(bits, by(1, 3));
      first = _mm512_ternarylogic_epi32(first, shifted, fifth, 0xf8);
      second = _mm512_ternarylogic_epi32(second, other, fifth, 0xf8);
    } else {  // two bits for each: 0 and 1, 2 and 3
      const __m512i upper = _mm512_set1_epi8(0x30);
      first = _mm512_ternarylogic_epi32(first, _mm512_sllv_epi16(bits, by(4, 2)), upper, 0xf8);
      second = _mm512_ternarylogic_epi32(second, _mm512_srlv_epi16(bits, by(0, 2)), upper, 0xf8);
    }
  }

  template <int S>
  void step(const uint8_t* block, const vf (&scales)[M], const char* const (&records)[M], vf (&sums)[M], vf (&others)[M]) const {
    __m512i first, second;
    read<S>(block, first, second);
#pragma GCC unroll 4
    for (int t = 0; t < M; t++) {
      add_half<kFormat, D, 0>(sums[t], first, spread(from[S][0], scales[t]), records[t] + S * kRecord);
      add_half<kFormat, D, 1>(others[t], second, spread(from[S][1], scales[t]), records[t] + S * kRecord);
    }
  }

  void run(const Matrix& m, int o, const Steps& x, const char* const (&tokens)[M], vf (&out)[M]) const {
    const uint8_t* block = static_cast<const uint8_t*>(m.weight) + size_t(o) * m.stride;
    vf sums[M] = {}, others[M] = {};
    const char* records[M];
#pragma GCC unroll 4
    for (int t = 0; t < M; t++) records[t] = tokens[t];
    for (int b = 0; b < x.steps / 2; b++, block += block_bytes(T)) {
      ask_for(block);
      const vf of_block = T == kQ6_K ? half_scales(block) : super_scales(block);
      vf scales[M];
#pragma GCC unroll 4
      for (int t = 0; t < M; t++) {
        scales[t] = of_block;
        if constexpr (has_mins_of_supers(kFormat)) {
          scales[t] *= load(reinterpret_cast<const float*>(tokens[t] + x.steps * kRecord) + W * b);
          sums[t] = (vf)_mm512_mask_add_ps((__m512)sums[t], 0xff00, (__m512)sums[t], (__m512)scales[t]);
        }
      }
      step<0>(block, scales, records, sums, others);
      ask_for(block + kBlock);
      step<1>(block, scales, records, sums, others);
      ask_for(block + 2 * kBlock);
#pragma GCC unroll 4
      for (int t = 0; t < M; t++) records[t] += 2 * kRecord;
    }
#pragma GCC unroll 4
    for (int t = 0; t < M; t++) out[t] = sums[t] + others[t];
  }
};

// Two weights a byte, with scales and minima of groups, which lie elsewhere.
template <int D, int M>
struct NibbleRow {
  static constexpr int kFormat = int(Format::kInt4);
  static constexpr Layout kLayout{kFormat, D};
  Groups groups;
  bool is_quick;  // scales and minima are read into a vector, without a detour over memory
  explicit NibbleRow(const Matrix& m) : groups(m), is_quick(groups.shift >= 0 && m.scale_format == 2 && !m.has_zeros) {}

  // Numbers of up to W atoms.
  vf numbers(const void* from, size_t row, int first, int count) const {
    const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const int left = count >> groups.shift, most = W >> groups.shift;
    const __mmask16 mask = (1u << (left < most ? left : most)) - 1;
    const __m512 found = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(from) + row + (first >> groups.shift)));
    return groups.shift == 0 ? (vf)found : (vf)_mm512_permutexvar_ps((__m512i)(lane >> groups.shift), found);
  }

  template <bool kWhole>
  void add_run(const uint8_t* row, int left, int steps, vf scale, vf mins, const char* const (&records)[M], vf (&sums)[M]) const {
    const __m512i nibble = _mm512_set1_epi8(15);
    vf scales[M];
#pragma GCC unroll 4
    for (int t = 0; t < M; t++) {
      scales[t] = scale * load(reinterpret_cast<const float*>(records[t] + kLayout.scales));
      sums[t] += mins * load(reinterpret_cast<const float*>(records[t] + kLayout.sums));
    }
#pragma GCC unroll 4
    for (int i = 0; i < steps; i++) {
      ask_for(row + i * kBlock);
      const __m512i both = row_bytes<kWhole>(row, i * kBlock, left);
      const __m512i low = _mm512_and_si512(both, nibble), high = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
#pragma GCC unroll 4
      for (int t = 0; t < M; t++) add_joint<kFormat, D>(sums[t], low, high, spread(four_of(i), scales[t]), records[t], i);
    }
  }

  void run(const Matrix& m, int o, const Steps& x, const char* const (&tokens)[M], vf (&out)[M]) const {
    const uint8_t* row = static_cast<const uint8_t*>(m.weight) + size_t(o) * m.stride;
    const int atoms = m.cols / kAtom;
    alignas(64) float scales[kSpan], mins[kSpan];
    vf sums[M] = {};
    const char* records[M];
#pragma GCC unroll 4
    for (int t = 0; t < M; t++) records[t] = tokens[t];
    for (int a = 0; a < atoms; a += W, row += kRun * kBlock) {
      const int left = atoms - a;
      vf scale, least;
      if (is_quick) {
        scale = numbers(m.scales, size_t(o) * groups.count, a, left);
        least = numbers(m.mins, size_t(o) * groups.count, a, left);
      } else {
        if (a % kSpan == 0) {
          group_scales(m, groups, m.scales, o, a, left < kSpan ? left : kSpan, scales);
          group_mins(m, groups, o, a, left < kSpan ? left : kSpan, scales, mins);
        }
        scale = load(scales + a % kSpan);
        least = load(mins + a % kSpan);
      }
      if (left >= W)
        add_run<true>(row, 0, kRun, scale, least, records, sums);
      else
        add_run<false>(row, left * (kAtom / 2), (left + kStepAtoms - 1) / kStepAtoms, scale, least, records, sums);
#pragma GCC unroll 4
      for (int t = 0; t < M; t++) records[t] += kLayout.size;
    }
#pragma GCC unroll 4
    for (int t = 0; t < M; t++) out[t] = sums[t];
  }
};

// --- some rows -----------------------------------------------------------------------------------------------------------

// Rows first .. first + count - 1, one after another, so that memory is read in order, by up to M tokens.
template <class Row, int M>
static void rows_by(const Matrix& m, int first, int count, const Steps& x, int token, int number, float (*out)[kOutputs]) {
  const Row row(m);
  const char* tokens[M];
  for (int t = 0; t < M; t++) tokens[t] = x.data + size_t(token + (t < number ? t : 0)) * x.token_bytes;
  vf sums[4][M] = {};
  for (int r = 0; r < count; r++) {
    row.run(m, first + r, x, tokens, sums[r % 4]);
    if (r % 4 != 3 && r != count - 1) continue;
    for (int t = 0; t < number; t++) {
      float four[4];
      sum4(sums[0][t], sums[1][t], sums[2][t], sums[3][t], four);
      for (int i = 0; i <= r % 4; i++) out[t][r - r % 4 + i] = four[i];
    }
  }
}

template <template <int, int> class Row, int D>
static void rows_of(const Matrix& m, int first, int count, const Steps& x, int token, int number, float (*out)[kOutputs]) {
  if (number == 1) return rows_by<Row<D, 1>, 1>(m, first, count, x, token, number, out);
  if (number == 2) return rows_by<Row<D, 2>, 2>(m, first, count, x, token, number, out);
  return rows_by<Row<D, 4>, 4>(m, first, count, x, token, number, out);
}

template <int T>
struct Of {
  template <int D, int M>
  using Blocks = BlockRow<T, D, M>;
  template <int D, int M>
  using Supers = SuperRow<T, D, M>;
};

using Sums = void (*)(const Matrix&, int, int, const Steps&, int, int, float (*)[kOutputs]);

template <int D>
static Sums sums_with(int format) {
  switch (format) {
    case int(Format::kInt4): return rows_of<NibbleRow, D>;
    case int(Format::kBlocks) + kQ4_0: return rows_of<Of<kQ4_0>::Blocks, D>;
    case int(Format::kBlocks) + kQ4_1: return rows_of<Of<kQ4_1>::Blocks, D>;
    case int(Format::kBlocks) + kQ5_0: return rows_of<Of<kQ5_0>::Blocks, D>;
    case int(Format::kBlocks) + kQ5_1: return rows_of<Of<kQ5_1>::Blocks, D>;
    case int(Format::kBlocks) + kQ8_0: return rows_of<ByteRow, D>;
    case int(Format::kBlocks) + kQ4_K: return rows_of<Of<kQ4_K>::Supers, D>;
    case int(Format::kBlocks) + kQ5_K: return rows_of<Of<kQ5_K>::Supers, D>;
    default: return rows_of<Of<kQ6_K>::Supers, D>;
  }
}

static void some_outputs(const Steps& x, const Matrix& m, const Sink& sink, Sums run, int first, int count) {
  for (int token = 0; token < x.num_tokens; token += kMostTokens) {
    alignas(64) float out[kMostTokens][kOutputs];
    const int number = x.num_tokens - token < kMostTokens ? x.num_tokens - token : kMostTokens;
    run(m, first, count, x, token, number, out);
    for (int t = 0; t < number; t++) {
      int o = 0;
      for (; o + W <= count; o += W) sink.put(token + t, first + o, m.bias ? load(out[t] + o) + load(m.bias + first + o) : load(out[t] + o));
      for (; o < count; o++) sink.put(token + t, first + o, m.bias ? out[t][o] + m.bias[first + o] : out[t][o]);
    }
  }
}

// --- activations ---------------------------------------------------------------------------------------------------------

// A step's bytes of one digit, from the order of inputs into the format's.
static inline void put_in_order(Order order, const int8_t* in, char* out) {
  const __m512i first = load_bytes64(in), second = load_bytes64(in + kBlock);
  __m512i a = first, b = second;
  if (order == Order::kHalves) {
    a = _mm512_permutex2var_epi64(first, _mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13), second);
    b = _mm512_permutex2var_epi64(first, _mm512_setr_epi64(2, 3, 6, 7, 10, 11, 14, 15), second);
  } else if (order == Order::kCrossed) {
    a = _mm512_permutex2var_epi64(first, _mm512_setr_epi64(0, 1, 2, 3, 8, 9, 10, 11), second);
    b = _mm512_permutex2var_epi64(first, _mm512_setr_epi64(4, 5, 6, 7, 12, 13, 14, 15), second);
  } else if (order == Order::kPairs) {
    const __m512i low = _mm512_set1_epi16(255), whole = _mm512_setr_epi64(0, 1, 2, 3, 8, 9, 10, 11);
    auto bytes = [&](__m512i one, __m512i other) {
      return _mm512_permutex2var_epi64(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(one)), whole,
                                       _mm512_castsi256_si512(_mm512_cvtepi16_epi8(other)));
    };
    a = bytes(_mm512_and_si512(first, low), _mm512_and_si512(second, low));
    b = bytes(_mm512_srli_epi16(first, 8), _mm512_srli_epi16(second, 8));
  }
  _mm512_storeu_si512(out, a);
  _mm512_storeu_si512(out + kBlock, b);
}

// 32 inputs rounded to D digits, in the order of inputs. Returns the scale; `total`: what the integers sum up to.
template <int D>
static inline float round_atom(const float* x, int8_t* out, int32_t& total) {
  const __m512 low = _mm512_loadu_ps(x), high = _mm512_loadu_ps(x + W);
  const bool is_nan = _mm512_cmp_ps_mask(low, high, _CMP_UNORD_Q) != 0;
  const float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
  const float scale = is_nan ? __builtin_nanf("") : largest / (D == 1 ? 127.0f : 8355000.0f);
  const __m512 by = _mm512_set1_ps(scale == 0.0f ? 1.0f : scale);
  vi q[2] = {(vi)_mm512_cvtps_epi32(_mm512_div_ps(low, by)), (vi)_mm512_cvtps_epi32(_mm512_div_ps(high, by))};
  total = _mm512_reduce_add_epi32(_mm512_add_epi32((__m512i)q[0], (__m512i)q[1]));
#pragma GCC unroll 3
  for (int d = D - 1; d >= 0; d--)
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + d * kStep + h * W), _mm512_cvtepi32_epi8((__m512i)q[h]));
      q[h] = (q[h] + 128) >> 8;
    }
  return scale;
}

// What -centre adds to the sums of a step, or of its vector number `half`.
static inline vi offset_of(const char* ints, int begin, int end, int first_digit, int last_digit, int centre) {
  vi sums = {};
  for (int d = first_digit; d < last_digit; d++) {
    __m512i of_digit = _mm512_setzero_si512();
    for (int h = begin; h < end; h++) of_digit = dot(of_digit, _mm512_set1_epi8(1), ints + d * kStep + h * kBlock);
    sums = sums * 256 + (vi)of_digit;
  }
  return sums * -centre;
}

// The integers of a step are at `ints`; `out`: where its record keeps the offsets.
static void put_offsets(int format, int digits, const char* ints, char* out) {
  const int centre = centre_of(format);
  auto put = [&](int begin, int end, int first, int last) {
    _mm512_storeu_si512(out, (__m512i)offset_of(ints, begin, end, first, last, centre));
    out += kBlock;
  };
  if (is_joint(order_of(format))) return put(0, 2, 0, digits);
  const int upper = has_two_sums(format, digits) ? 1 : digits;  // what the second digit lacks is left to the third
  for (int h = 0; h < 2; h++) {
    put(h, h + 1, 0, upper);
    if (upper < digits) put(h, h + 1, upper, digits);
  }
}

template <int D>
static void put_row(const float* row, int size, int format, char* out) {
  const Order order = order_of(format);
  const Layout layout(format, D);
  const bool joint = is_joint(order);
  const int atoms = size / kAtom, steps = steps_of(size), records = records_of(format, size);
  float* behind = reinterpret_cast<float*>(out + records * layout.size);
  memset(behind, 0, size_t(numbers_behind(format, size)) * 4);
  for (int s = 0; s < (joint ? records * kRun : steps); s++) {
    const int place = joint ? s % kRun : 0;
    char* record = out + (joint ? s / kRun : s) * layout.size;
    char* to = record + place * layout.step;
    alignas(64) int8_t ints[D * kStep] = {};
    float scales[kStepAtoms] = {}, sums[kStepAtoms] = {};
    for (int i = 0; i < kStepAtoms && s * kStepAtoms + i < atoms; i++) {
      int32_t total;
      scales[i] = round_atom<D>(row + (s * kStepAtoms + i) * kAtom, ints + i * kAtom, total);
      sums[i] = scales[i] * float(total);
      if (!has_mins_of_supers(format)) continue;
      float* at = behind + s / 2 * W + s % 2 * kStepAtoms + i;
      at[0] = scales[i];
      at[W / 2] = -sums[i];  // minima are taken off there
    }
    for (int d = 0; d < D; d++) put_in_order(order, ints + d * kStep, to + d * kStep);
    if (centre_of(format) != 0) put_offsets(format, D, to, record + layout.offsets + place * kBlock);
    float* spread = reinterpret_cast<float*>(record + layout.scales);
    if (joint) {
      memcpy(spread + place * kStepAtoms, scales, sizeof scales);
      memcpy(record + layout.sums + place * sizeof sums, sums, sizeof sums);
    } else if (!has_mins_of_supers(format)) {
      for (int i = 0; i < 2 * W; i++) spread[i] = scales[order == Order::kInOrder ? i / 8 : i % W / 8 * 2 + i / W];
    }
  }
}

}  // namespace

bool takes_steps(const Matrix& m) { return (m.format == Format::kInt4 || m.format >= Format::kBlocks) && streams(m); }

size_t step_floats(int num_tokens, int size) {
  const size_t runs = (steps_of(size) + kRun - 1) / kRun, most = kRun * (3 * kStep + 6 * kBlock);
  return size_t(num_tokens) * (runs * most / 4 + size / 256 * W);
}

Steps step_rows(const float* rows, size_t stride, int num_tokens, int size, int digits, Format format, float* space) {
  const size_t records = records_of(int(format), size) * Layout(int(format), digits).size;
  Steps out{num_tokens, digits, steps_of(size), format, records + size_t(numbers_behind(int(format), size)) * 4, reinterpret_cast<const char*>(space)};
  parallel(num_tokens, [&](int t, int) {
    (digits == 1 ? put_row<1> : put_row<3>)(rows + size_t(t) * stride, size, int(format), reinterpret_cast<char*>(space) + t * out.token_bytes);
  });
  return out;
}

void matmul(const Steps& x, const Matrix* matrices, const Sink* sinks, int count) {
  const int size = few_rows_at_a_time(matrices, count);
  const Sums run = x.digits == 1 ? sums_with<1>(int(x.format)) : sums_with<3>(int(x.format));
  int total = 0;
  for (int i = 0; i < count; i++) total += (matrices[i].rows + size - 1) / size;
  parallel(total, [&](int chunk, int) {
    int which = 0;
    for (int chunks; chunk >= (chunks = (matrices[which].rows + size - 1) / size); which++) chunk -= chunks;
    const Matrix& m = matrices[which];
    const int begin = chunk * size, end = begin + size < m.rows ? begin + size : m.rows;
    for (int first = begin; first < end; first += kOutputs)
      some_outputs(x, m, sinks[which], run, first, end - first < kOutputs ? end - first : kOutputs);
  });
}

}  // namespace dt

#else

namespace dt {

bool takes_steps(const Matrix&) { return false; }
size_t step_floats(int, int) { return 0; }
Steps step_rows(const float*, size_t, int, int, int, Format, float*) { return {}; }
void matmul(const Steps&, const Matrix*, const Sink*, int) {}

}  // namespace dt

#endif
