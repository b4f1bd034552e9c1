// How packed weights are read: 32 inputs of a row at a time, an atom, as bytes or as vectors of float32.
#pragma once
#include "half.h"
#include "matmul.h"

namespace dt {

constexpr int kAtom = 32;           // inputs
constexpr int kPieces = kAtom / W;  // vectors of floats in an atom
constexpr int kSpan = 64;           // atoms whose scales are made ready at a time

// Rows are short, and the processor's own prefetching starts anew with each: what is asked for is some rows below, so many bytes
// away that memory has the time. Measured: 1 and 12 KiB are a fifth slower.
constexpr size_t kAheadBytes = 4096;

typedef uint8_t v16u __attribute__((vector_size(16)));
#if defined(__aarch64__)
// Two registers by name: GCC keeps a vector that is longer than those of the processor in memory.
struct v32u {
  v16u low, high;
  v32u operator|(v32u other) const { return {low | other.low, high | other.high}; }
  v32u operator<<(int by) const { return {low << by, high << by}; }
};
#else
typedef uint8_t v32u __attribute__((vector_size(32)));
#endif

// --- numbers of 16 and 8 bits --------------------------------------------------------------------------------------------

static inline float half_at(const uint8_t* p) {
  uint16_t h;
  memcpy(&h, p, 2);
  return half_to_float(h);
}

// float8_e4m3fn by way of float16, whose exponent has one bit more: its values are 2^8 times those.
static inline float float8_to_float(uint8_t b) {
  if ((b & 0x7f) == 0x7f) return __builtin_nanf("");
  return half_to_float(uint16_t((b & 0x80) << 8 | (b & 0x7f) << 7)) * 256.0f;
}

// The same of W of them, but for the factor of 256.
static inline vf load_float8(const uint8_t* p) {
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__F16C__))
  typedef uint16_t vw __attribute__((vector_size(2 * W)));
#if defined(__AVX512F__)
  vw wide = (vw)_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vw wide = (vw)_mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#endif
  vw size = wide & 0x7f, is_nan = (vw)(size == 0x7f);
  vw bits = (wide & 0x80) << 8 | size << 7 | (is_nan & 0x7fff);
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps((__m256i)bits);
#else
  return (vf)_mm256_cvtph_ps((__m128i)bits);
#endif
#elif defined(__aarch64__)
  uint16x4_t wide = widened(p), size = vand_u16(wide, vdup_n_u16(0x7f)), is_nan = vceq_u16(size, vdup_n_u16(0x7f));
  uint16x4_t sign = vshl_n_u16(vand_u16(wide, vdup_n_u16(0x80)), 8);
  uint16x4_t bits = vorr_u16(vorr_u16(sign, vshl_n_u16(size, 7)), vand_u16(is_nan, vdup_n_u16(0x7fff)));
  return (vf)vcvt_f32_f16(vreinterpret_f16_u16(bits));
#else
  vf out;
  for (int i = 0; i < W; i++) out[i] = float8_to_float(p[i]) * (1.0f / 256);
  return out;
#endif
}

// W bytes as integers. By intrinsics, since GCC 12 widens vectors of bytes in many steps.
static inline vi load_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#elif defined(__aarch64__)
  return (vi)vmovl_u16(widened(p));
#else
  int32_t bits;
  memcpy(&bits, p, 4);
  const __m128i none = _mm_setzero_si128();
  return (vi)_mm_unpacklo_epi16(_mm_unpacklo_epi8(_mm_cvtsi32_si128(bits), none), none);
#endif
}
static inline vi load_ints(const int8_t* p) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#elif defined(__aarch64__)
  return (vi)widened_signed(p);
#else
  int32_t bits;
  memcpy(&bits, p, 4);
  const __m128i twice = _mm_unpacklo_epi8(_mm_cvtsi32_si128(bits), _mm_cvtsi32_si128(bits));
  return (vi)_mm_srai_epi32(_mm_unpacklo_epi16(twice, twice), 24);
#endif
}

// Scale or minimum number `index` of a matrix.
static inline float scale_at(const void* scales, int format, size_t index) {
  if (format == 0) return static_cast<const float*>(scales)[index];
  uint16_t bits = static_cast<const uint16_t*>(scales)[index];
  return format == 1 ? to_float(bf16(bits)) : half_to_float(bits);
}

DT_CALLED static inline void scales_at(const void* scales, int format, size_t first, int count, float* out) {
  int i = 0;
  if (format == 0) {
    memcpy(out, static_cast<const float*>(scales) + first, count * 4);
    return;
  }
#if defined(__AVX512F__)
  if (format == 2)
    for (const uint16_t* from = static_cast<const uint16_t*>(scales) + first; i < count; i += 16) {
      __mmask16 mask = count - i >= 16 ? 0xffff : (1 << (count - i)) - 1;
      __m512 wide = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from + i));
      _mm512_mask_storeu_ps(out + i, mask, wide);
    }
#endif
  auto widen = [&](const auto* from) {
    DT_ROLLED
    for (; i + W <= count; i += W) store(out + i, load(from + i));
  };
  if (format == 2)
    widen(static_cast<const f16*>(scales) + first);
  else
    widen(static_cast<const bf16*>(scales) + first);
  DT_ROLLED
  for (; i < count; i++) out[i] = scale_at(scales, format, first + i);
}

// --- values of an atom ---------------------------------------------------------------------------------------------------

static inline v16u load16(const uint8_t* p) {
  v16u v;
  memcpy(&v, p, 16);
  return v;
}
static inline v32u load32(const uint8_t* p) {
  v32u v;
  memcpy(&v, p, 32);
  return v;
}
static inline v32u join(v16u a, v16u b) {
#if defined(__aarch64__)
  return {a, b};
#else
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25,
                                 26, 27, 28, 29, 30, 31);
#endif
}

// Bytes of four bits each: >> 4 of bytes, by way of 16 bits.
static inline v16u low_nibbles(v16u v) { return v & 15; }
static inline v16u high_nibbles(v16u v) {
  typedef uint16_t v8w __attribute__((vector_size(16)));
  return (v16u)((v8w)v >> 4) & 15;
}
static inline v32u shifted(v32u v, int by, uint8_t mask) {
#if defined(__aarch64__)
  return {(v.low >> by) & mask, (v.high >> by) & mask};
#else
  typedef uint16_t v16w __attribute__((vector_size(32)));
  return (v32u)((v16w)v >> by) & mask;
#endif
}

// 32 bits as bytes of 0 and `one`.
static inline v32u bits_of(uint32_t bits, uint8_t one) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  return (v32u)_mm256_maskz_set1_epi8(bits, char(one));
#elif defined(__aarch64__)
  const v16u which = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  auto half = [&](uint32_t two) {
    v16u bytes = (v16u)vcombine_u8(vdup_n_u8(uint8_t(two)), vdup_n_u8(uint8_t(two >> 8)));
    return (v16u)vtstq_u8((uint8x16_t)bytes, (uint8x16_t)which) & one;
  };
  return {half(bits), half(bits >> 16)};
#else
  typedef uint32_t v8d __attribute__((vector_size(32)));
  v8d all = {bits, bits, bits, bits, bits, bits, bits, bits};
  v32u bytes = (v32u)all;
  bytes = __builtin_shufflevector(bytes, bytes, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 18, 18, 18, 18, 18, 18, 18, 18, 19, 19,
                                  19, 19, 19, 19, 19, 19);
  const v32u which = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  return (v32u)((bytes & which) == which) & one;
#endif
}

// ggml's types, as numbers of Format above kBlocks.
constexpr int kQ4_0 = 2, kQ4_1 = 3, kQ5_0 = 6, kQ5_1 = 7, kQ8_0 = 8, kQ4_K = 12, kQ5_K = 13, kQ6_K = 14;

constexpr int block_bytes(int type) {
  return type == kQ4_0 ? 18 : type == kQ4_1 ? 20 : type == kQ5_0 ? 22 : type == kQ5_1 ? 24 : type == kQ8_0 ? 34
         : type == kQ4_K ? 144 : type == kQ5_K ? 176 : 210;
}
constexpr int block_size(int type) { return type >= kQ4_K ? 256 : 32; }
constexpr int value_offset(int type) { return type == kQ4_0 || type == kQ8_0 ? 2 : type == kQ4_1 ? 4 : type == kQ5_0 ? 6 : 8; }

// Values of GGUF blocks, whatever their scale: 0 .. 63, or signed bytes for Q8_0. In order of inputs.
template <int T>
static inline v32u values(const uint8_t* row, int atom) {
  if constexpr (T >= kQ4_K) {
    const uint8_t* block = row + size_t(atom / 8) * block_bytes(T);
    int j = atom % 8;
    if constexpr (T == kQ6_K) {
      int half = j / 4, quarter = j % 4;
      v32u low = shifted(load32(block + 64 * half + quarter % 2 * 32), quarter / 2 * 4, 15);
      v32u high = shifted(load32(block + 128 + 32 * half), 2 * quarter, 3);
      return low | high << 4;
    } else {
      v32u low = shifted(load32(block + (T == kQ4_K ? 16 : 48) + j / 2 * 32), j % 2 * 4, 15);
      if constexpr (T == kQ4_K) return low;
      return low | shifted(load32(block + 16), j, 1) << 4;
    }
  } else {
    const uint8_t* block = row + size_t(atom) * block_bytes(T);
    if constexpr (T == kQ8_0) return load32(block + 2);
    v16u both = load16(block + value_offset(T));
    v32u low = join(low_nibbles(both), high_nibbles(both));
    if constexpr (T == kQ4_0 || T == kQ4_1) return low;
    uint32_t fifth;
    memcpy(&fifth, block + value_offset(T) - 4, 4);
    return low | bits_of(fifth, 16);
  }
}

// Scales and minima of Q4_K and Q5_K, of eight atoms: six bits each, in the twelve bytes behind the two numbers that multiply them. The
// first four of both are the lower bits of bytes 4 to 11; the others have four bits in bytes 12 to 15, and two at the top of those.
#if defined(__AVX512F__)
static inline vf super_scales(const uint8_t* block) {
  constexpr char kNone = -1;
  const __m128i head = _mm_loadu_si128(reinterpret_cast<const __m128i*>(block));
  const __m128i low_at = _mm_setr_epi8(4, 5, 6, 7, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m128i high_at = _mm_setr_epi8(kNone, kNone, kNone, kNone, 4, 5, 6, 7, kNone, kNone, kNone, kNone, 8, 9, 10, 11);
  const vi down = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4}, bits = {63, 63, 63, 63, 15, 15, 15, 15, 63, 63, 63, 63, 15, 15, 15, 15};
  const __m512i low = _mm512_srlv_epi32(_mm512_cvtepu8_epi32(_mm_shuffle_epi8(head, low_at)), (__m512i)down);
  const __m512i high = _mm512_srli_epi32(_mm512_cvtepu8_epi32(_mm_shuffle_epi8(head, high_at)), 2);
  const __m512i codes = _mm512_or_si512(_mm512_and_si512(low, (__m512i)bits), _mm512_and_si512(high, _mm512_set1_epi32(0x30)));
  const __m512i which = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  return (vf)_mm512_cvtepi32_ps(codes) * (vf)_mm512_permutexvar_ps(which, _mm512_castps128_ps512(_mm_cvtph_ps(head)));
}
static inline void k_scales(const uint8_t* block, float* scales, float* mins) {
  const vf both = super_scales(block);
  _mm256_storeu_ps(scales, _mm512_castps512_ps256((__m512)both));
  _mm256_storeu_ps(mins, _mm512_extractf32x8_ps((__m512)-both, 1));
}
#elif defined(__AVX2__)
static inline void k_scales(const uint8_t* block, float* scales, float* mins) {
  constexpr char kNone = -1;
  const __m128i head = _mm_loadu_si128(reinterpret_cast<const __m128i*>(block));
  const __m128i low = _mm_shuffle_epi8(head, _mm_setr_epi8(4, 5, 6, 7, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15));
  const __m128i high = _mm_shuffle_epi8(head, _mm_setr_epi8(kNone, kNone, kNone, kNone, 4, 5, 6, 7, kNone, kNone, kNone, kNone, 8, 9, 10, 11));
  const __m128i down = _mm_blend_epi16(low, _mm_srli_epi16(low, 4), 0xc0);  // of bytes 12 to 15 the upper four bits
  const __m128i bits = _mm_setr_epi32(0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f);
  const __m128i top = _mm_and_si128(_mm_srli_epi16(high, 2), _mm_set1_epi8(0x30));
  const __m128i codes = _mm_or_si128(_mm_and_si128(down, bits), top);
  const __m128 pair = _mm_cvtph_ps(head);
  store(scales, (vf)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(codes)) * splat(pair[0]));
  store(mins, (vf)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(codes, 8))) * splat(-pair[1]));
}
#else
static inline void k_scales(const uint8_t* block, float* scales, float* mins) {
  float d = half_at(block), least = half_at(block + 2);
  const uint8_t* p = block + 4;
  for (int j = 0; j < 4; j++) {
    scales[j] = d * float(p[j] & 63);
    mins[j] = -(least * float(p[j + 4] & 63));
    scales[j + 4] = d * float((p[j + 8] & 15) | (p[j] >> 6) << 4);
    mins[j + 4] = -(least * float((p[j + 8] >> 4) | (p[j + 4] >> 6) << 4));
  }
}
#endif

// Scale and minimum of each atom, first .. first + count - 1: weight = value * scale + min. Of Q6_K for each half of an atom.
template <int T>
static inline void atom_scales(const uint8_t* row, int first, int count, float* scales, float* mins) {
  if constexpr (T >= kQ4_K) {  // spans begin and end with a block
    DT_ROLLED
    for (int a = 0; a < count; a += 8) {
      const uint8_t* block = row + size_t((first + a) / 8) * block_bytes(T);
      if constexpr (T == kQ6_K) {
        const vf d = splat(half_at(block + 208));
        for (int j = 0; j < 16; j += W) {
          const vf found = d * __builtin_convertvector(load_ints(reinterpret_cast<const int8_t*>(block) + 192 + j), vf);
          store(scales + 2 * a + j, found);
          store(mins + 2 * a + j, found * -32.0f);
        }
      } else {
        k_scales(block, scales + a, mins + a);
      }
    }
  } else {
    const uint8_t* block = row + size_t(first) * block_bytes(T);
    int a = 0;
#if defined(__AVX512F__)
    const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const vi even = lane * 2, odd = lane * 2 + 1;
    for (; a + 16 <= count; a += 16, block += 16 * block_bytes(T)) {  // the first four bytes of 16 blocks: pairs of float16
      __m512i pairs = _mm512_i32gather_epi32((__m512i)(lane * block_bytes(T)), block, 1);
      __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(pairs)), high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(pairs, 1));
      vf scale = (vf)_mm512_permutex2var_ps(low, (__m512i)even, high);
      store(scales + a, scale);
      if constexpr (T == kQ4_0) store(mins + a, scale * -8.0f);
      if constexpr (T == kQ5_0) store(mins + a, scale * -16.0f);
      if constexpr (T == kQ4_1 || T == kQ5_1) store(mins + a, (vf)_mm512_permutex2var_ps(low, (__m512i)odd, high));
      if constexpr (T == kQ8_0) store(mins + a, vf{});
    }
#endif
#if defined(__AVX2__) && !defined(__AVX512F__)
    DT_ROLLED
    for (; a + 8 <= count; a += 8, block += 8 * block_bytes(T)) {  // the same of 8 blocks
      auto four = [](const uint8_t* at) {
        int32_t pairs[4];
        for (int i = 0; i < 4; i++) memcpy(pairs + i, at + i * block_bytes(T), 4);
        return _mm_setr_epi32(pairs[0], pairs[1], pairs[2], pairs[3]);
      };
      const __m128i apart = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
      const __m128i low = _mm_shuffle_epi8(four(block), apart), high = _mm_shuffle_epi8(four(block + 4 * block_bytes(T)), apart);
      vf scale = (vf)_mm256_cvtph_ps(_mm_unpacklo_epi64(low, high));
      store(scales + a, scale);
      if constexpr (T == kQ4_0) store(mins + a, scale * -8.0f);
      if constexpr (T == kQ5_0) store(mins + a, scale * -16.0f);
      if constexpr (T == kQ4_1 || T == kQ5_1) store(mins + a, (vf)_mm256_cvtph_ps(_mm_unpackhi_epi64(low, high)));
      if constexpr (T == kQ8_0) store(mins + a, vf{});
    }
#endif
    DT_ROLLED
    for (; a < count; a++, block += block_bytes(T)) {
#if defined(__F16C__)
      int32_t both;
      memcpy(&both, block, 4);
      __m128 pair = _mm_cvtph_ps(_mm_cvtsi32_si128(both));
      scales[a] = pair[0];
      float second = pair[1];
#else
      scales[a] = half_at(block);
      float second = half_at(block + 2);
#endif
      if constexpr (T == kQ4_0) mins[a] = -8.0f * scales[a];
      if constexpr (T == kQ5_0) mins[a] = -16.0f * scales[a];
      if constexpr (T == kQ4_1 || T == kQ5_1) mins[a] = second;
      if constexpr (T == kQ8_0) mins[a] = 0.0f;
      (void)second;
    }
  }
}

}  // namespace dt
