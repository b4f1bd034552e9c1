// Scales and minima of groups of inputs, as one number for each atom.
#pragma once
#include "formats.h"

namespace dt {

// How a matrix is grouped, if it is; worked out once, since for short rows the divisions would take as long as the products.
struct Groups {
  int each;   // atoms of a group
  int count;  // groups of a row
  int shift;  // each is 1 << shift, at most W; otherwise -1
  explicit Groups(const Matrix& m) : each(m.group / kAtom), count(m.group ? m.cols / m.group : 0), shift(-1) {
    if (each > 0 && each <= W && (each & (each - 1)) == 0) shift = __builtin_ctz(each);
  }
  int of_atom(int atom) const { return shift >= 0 ? atom >> shift : atom / each; }
};

#if defined(__AVX2__) && !defined(__AVX512F__)
// Scales number index .. index + W - 1 of a matrix that has `total`; zeros behind those.
static inline vf next_scales(const void* from, int format, size_t index, size_t total) {
  if (total - index < W) {
    float last[W] = {};
    scales_at(from, format, index, int(total - index), last);
    return load(last);
  }
  if (format == 0) return load(static_cast<const float*>(from) + index);
  return format == 1 ? load(static_cast<const bf16*>(from) + index) : load(static_cast<const f16*>(from) + index);
}
#endif

// Scales and minima of atoms first .. first + count - 1, which is a whole span or the rest of a row. Behind them come zeros.
static inline void group_scales(const Matrix& m, const Groups& groups, const void* from, int o, int first, int count, float* out) {
  const int each = groups.each, begin = groups.of_atom(first);
  const size_t row = size_t(o) * groups.count;
#if defined(__AVX512F__)
  if (groups.shift >= 0 && m.scale_format == 2) {  // spans begin with a group
    const uint16_t* halves = static_cast<const uint16_t*>(from) + row + begin;
    const int shift = groups.shift, most = W >> shift;
    const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int a = 0; a < count; a += W, halves += most) {
      const int left = (count - a) >> shift;
      const __m512 found = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16((1 << (left < most ? left : most)) - 1, halves));
      store(out + a, (vf)_mm512_permutexvar_ps((__m512i)(lane >> shift), found));
    }
    return;
  }
#elif defined(__AVX2__)
  if (groups.shift > 0) {  // spans begin with a group
    const int shift = groups.shift;
    const __m256i from_lane = (__m256i)(vi{0, 1, 2, 3, 4, 5, 6, 7} >> shift);
    const size_t total = size_t(m.rows) * groups.count;
    for (int a = 0; a < count; a += W) {
      const vf found = next_scales(from, m.scale_format, row + begin + (a >> shift), total);
      store(out + a, (vf)_mm256_permutevar8x32_ps((__m256)found, from_lane));
    }
    for (int a = count; a % W != 0; a++) out[a] = 0;
    return;
  }
#endif
  if (each == 1) {
    scales_at(from, m.scale_format, row + first, count, out);
  } else {
    float of_groups[kSpan + W];
    scales_at(from, m.scale_format, row + begin, groups.of_atom(first + count - 1) - begin + 1, of_groups);
    int left = each - first % each;
    for (int a = 0, g = 0; a < count; a++) {
      out[a] = of_groups[g];
      if (--left == 0) left = each, g++;
    }
  }
  for (int a = count; a % W != 0; a++) out[a] = 0;
}

// The same of minima; scales: of these atoms.
static inline void group_mins(const Matrix& m, const Groups& groups, int o, int first, int count, const float* scales, float* out) {
  if (!m.has_zeros) return group_scales(m, groups, m.mins, o, first, count, out);
  const int each = groups.each;
  const uint8_t* zeros = static_cast<const uint8_t*>(m.mins) + size_t(o) * groups.count + groups.of_atom(first);
#if defined(__AVX512F__)
  if (groups.shift >= 0) {
    const int shift = groups.shift, most = W >> shift;
    const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int a = 0; a < count; a += W, zeros += most) {
      const int left = (count - a) >> shift;
      const __m512i found = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8((1 << (left < most ? left : most)) - 1, zeros));
      store(out + a, (vf)_mm512_cvtepi32_ps(_mm512_permutexvar_epi32((__m512i)(lane >> shift), found)) * load(scales + a) * -1.0f);
    }
    return;
  }
#elif defined(__AVX2__)
  if (groups.shift >= 0) {
    const int shift = groups.shift;
    const __m256i from_lane = (__m256i)(vi{0, 1, 2, 3, 4, 5, 6, 7} >> shift);
    const uint8_t* end = static_cast<const uint8_t*>(m.mins) + size_t(m.rows) * groups.count;
    for (int a = 0; a < count; a += W, zeros += W >> shift) {
      uint8_t last[W] = {};
      if (end - zeros < W) memcpy(last, zeros, end - zeros);
      const __m256i found = _mm256_permutevar8x32_epi32((__m256i)load_bytes(end - zeros < W ? last : zeros), from_lane);
      store(out + a, (vf)_mm256_cvtepi32_ps(found) * load(scales + a) * -1.0f);
    }
    return;
  }
#endif
  int left = each - first % each;
  for (int a = 0; a < count; a++) {
    out[a] = -float(*zeros) * scales[a];
    if (--left == 0) left = each, zeros++;
  }
  for (int a = count; a % W != 0; a++) out[a] = 0;
}

}  // namespace dt
