// Eight 32-bit integers beside the eight floats of simd.h, as far as quantising needs them.
#pragma once

#include "simd.h"

namespace moestro {
namespace MOESTRO_ISA {

// Added to a number up to 2^22 in magnitude it rounds to the nearest whole one (halves to even), which then lies in the
// low bits.
constexpr float kRoundBias = 12582912.0f; // 1.5 * 2^23
constexpr int32_t kRoundBits = 0x4b400000;

#ifdef MOESTRO_AVX2

using IntVec = __m256i;

MOESTRO_INLINE IntVec no_ints() { return _mm256_setzero_si256(); }
// Bits of |v|: as integers they are in the order of magnitude, with infinity and NaN at the end.
MOESTRO_INLINE IntVec magnitude_bits(Vec v) {
  return _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff));
}
MOESTRO_INLINE IntVec rounded(Vec biased) {
  return _mm256_sub_epi32(_mm256_castps_si256(biased), _mm256_set1_epi32(kRoundBits));
}
MOESTRO_INLINE IntVec greater(IntVec a, IntVec b) { return _mm256_max_epi32(a, b); }
MOESTRO_INLINE IntVec add(IntVec a, IntVec b) { return _mm256_add_epi32(a, b); }
MOESTRO_INLINE int32_t greatest_of(IntVec v) {
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
MOESTRO_INLINE int32_t sum_of(IntVec v) {
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
// 32 numbers that fit in a byte.
MOESTRO_INLINE void store_as_bytes(int8_t *p, const IntVec *v) {
  const __m256i low = _mm256_packs_epi32(v[0], v[1]), high = _mm256_packs_epi32(v[2], v[3]);
  const __m256i mixed = _mm256_packs_epi16(low, high);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm256_permutevar8x32_epi32(mixed, order));
}
// Sixteen numbers into those at even and those at odd places.
MOESTRO_INLINE void load_pairs(const float *p, Vec &even, Vec &odd) {
  const Vec a = load(p), b = load(p + kLanes);
  const auto in_order = [](Vec v) { return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8)); };
  even = in_order(_mm256_shuffle_ps(a, b, 0x88));
  odd = in_order(_mm256_shuffle_ps(a, b, 0xdd));
}

#else

struct IntVec {
  int32_t lane[kLanes];
};

template <class F> MOESTRO_INLINE IntVec each_int_lane(F f) {
  IntVec out;
  for (int i = 0; i < kLanes; ++i) out.lane[i] = f(i);
  return out;
}

MOESTRO_INLINE IntVec no_ints() {
  return each_int_lane([](int) { return 0; });
}
MOESTRO_INLINE IntVec magnitude_bits(const Vec &v) {
  return each_int_lane([&](int i) { return static_cast<int32_t>(to_bits(v.lane[i]) & 0x7fffffff); });
}
MOESTRO_INLINE IntVec rounded(const Vec &biased) {
  return each_int_lane([&](int i) { return static_cast<int32_t>(to_bits(biased.lane[i])) - kRoundBits; });
}
MOESTRO_INLINE IntVec greater(const IntVec &a, const IntVec &b) {
  return each_int_lane([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
MOESTRO_INLINE IntVec add(const IntVec &a, const IntVec &b) {
  return each_int_lane([&](int i) { return a.lane[i] + b.lane[i]; });
}
MOESTRO_INLINE int32_t greatest_of(const IntVec &v) {
  int32_t greatest = v.lane[0];
  for (int32_t lane : v.lane) greatest = lane > greatest ? lane : greatest;
  return greatest;
}
MOESTRO_INLINE int32_t sum_of(const IntVec &v) {
  int32_t sum = 0;
  for (int32_t lane : v.lane) sum += lane;
  return sum;
}
MOESTRO_INLINE void store_as_bytes(int8_t *p, const IntVec *v) {
  for (int i = 0; i < 4 * kLanes; ++i) p[i] = static_cast<int8_t>(v[i / kLanes].lane[i % kLanes]);
}
MOESTRO_INLINE void load_pairs(const float *p, Vec &even, Vec &odd) {
  even = each_lane([&](int i) { return p[2 * i]; });
  odd = each_lane([&](int i) { return p[2 * i + 1]; });
}

#endif

} // namespace MOESTRO_ISA
} // namespace moestro
