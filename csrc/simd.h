// Eight fp32 lanes, the unit in which every kernel counts. Two versions with the same bits: AVX2 (also used by the
// AVX-512 build, which has more registers) and portable C++ (std::fma is correctly rounded everywhere; a compiler for a
// processor that has the instruction turns the loops into it).
//
// Included by sources that are compiled once per instruction set: everything lives in namespace MOESTRO_ISA.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define MOESTRO_AVX2 1
#endif

#define MOESTRO_INLINE inline __attribute__((always_inline))

namespace moestro {
namespace MOESTRO_ISA {

constexpr int kLanes = 8;

// 16-bit weights as they lie in memory; the type names the format.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

MOESTRO_INLINE float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
MOESTRO_INLINE uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

MOESTRO_INLINE float to_float(float value) { return value; }
MOESTRO_INLINE float to_float(BFloat16 value) { return from_bits(static_cast<uint32_t>(value.bits) << 16); }
MOESTRO_INLINE float to_float(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t magnitude = value.bits & 0x7fff;
  if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // Shifted into place the exponent is 112 too small; the product also turns half's denormals into normal numbers.
  const float shifted = from_bits(magnitude << 13) * from_bits(uint32_t{127 + 112} << 23);
  return from_bits(sign | to_bits(shifted));
}

#ifdef MOESTRO_AVX2

using Vec = __m256;

MOESTRO_INLINE Vec zero() { return _mm256_setzero_ps(); }
MOESTRO_INLINE Vec broadcast(float value) { return _mm256_set1_ps(value); }
MOESTRO_INLINE Vec load(const float *p) { return _mm256_loadu_ps(p); }
MOESTRO_INLINE Vec load(const BFloat16 *p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
MOESTRO_INLINE Vec load(const Float16 *p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
MOESTRO_INLINE void store(float *p, Vec v) { _mm256_storeu_ps(p, v); }
MOESTRO_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
MOESTRO_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
MOESTRO_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
MOESTRO_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
MOESTRO_INLINE Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
// When either is NaN these return the second, as the instructions do.
MOESTRO_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
MOESTRO_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
// Per lane: |a| < limit ? x : y (y where a is NaN).
MOESTRO_INLINE Vec if_below(Vec a, float limit, Vec x, Vec y) {
  const Vec magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a);
  return _mm256_blendv_ps(y, x, _mm256_cmp_ps(magnitude, _mm256_set1_ps(limit), _CMP_LT_OQ));
}
// 2^n, where `biased` is n + 1.5 * 2^23 (the sum leaves n in the low bits) and n is from -126 to 127.
MOESTRO_INLINE Vec power_of_two(Vec biased) {
  const __m256i exponent = _mm256_add_epi32(_mm256_castps_si256(biased), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
// ((l0+l4)+(l2+l6)) + ((l1+l5)+(l3+l7)): the one order in which lanes are summed.
MOESTRO_INLINE float sum_lanes(Vec v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
// The same for four vectors at once.
MOESTRO_INLINE void sum_lanes4(const Vec *v, float *out) {
  __m128 four[4];
  for (int i = 0; i < 4; ++i) four[i] = _mm_add_ps(_mm256_castps256_ps128(v[i]), _mm256_extractf128_ps(v[i], 1));
  const __m128 ab = _mm_add_ps(_mm_unpacklo_ps(four[0], four[1]), _mm_unpackhi_ps(four[0], four[1]));
  const __m128 cd = _mm_add_ps(_mm_unpacklo_ps(four[2], four[3]), _mm_unpackhi_ps(four[2], four[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab)));
}

#else

struct Vec {
  float lane[kLanes];
};

template <class F> MOESTRO_INLINE Vec each_lane(F f) {
  Vec out;
  for (int i = 0; i < kLanes; ++i) out.lane[i] = f(i);
  return out;
}

MOESTRO_INLINE Vec broadcast(float value) {
  return each_lane([&](int) { return value; });
}
MOESTRO_INLINE Vec zero() { return broadcast(0.0f); }
template <class W> MOESTRO_INLINE Vec load(const W *p) {
  return each_lane([&](int i) { return to_float(p[i]); });
}
MOESTRO_INLINE void store(float *p, const Vec &v) { std::memcpy(p, v.lane, sizeof v.lane); }
MOESTRO_INLINE Vec fma(const Vec &a, const Vec &b, const Vec &c) {
  return each_lane([&](int i) { return std::fma(a.lane[i], b.lane[i], c.lane[i]); });
}
MOESTRO_INLINE Vec add(const Vec &a, const Vec &b) {
  return each_lane([&](int i) { return a.lane[i] + b.lane[i]; });
}
MOESTRO_INLINE Vec sub(const Vec &a, const Vec &b) {
  return each_lane([&](int i) { return a.lane[i] - b.lane[i]; });
}
MOESTRO_INLINE Vec mul(const Vec &a, const Vec &b) {
  return each_lane([&](int i) { return a.lane[i] * b.lane[i]; });
}
MOESTRO_INLINE Vec div(const Vec &a, const Vec &b) {
  return each_lane([&](int i) { return a.lane[i] / b.lane[i]; });
}
MOESTRO_INLINE Vec max(const Vec &a, const Vec &b) {
  return each_lane([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
MOESTRO_INLINE Vec min(const Vec &a, const Vec &b) {
  return each_lane([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
MOESTRO_INLINE Vec if_below(const Vec &a, float limit, const Vec &x, const Vec &y) {
  return each_lane([&](int i) { return std::fabs(a.lane[i]) < limit ? x.lane[i] : y.lane[i]; });
}
MOESTRO_INLINE Vec power_of_two(const Vec &biased) {
  return each_lane([&](int i) { return from_bits((to_bits(biased.lane[i]) + 127) << 23); });
}
MOESTRO_INLINE float sum_lanes(const Vec &v) {
  const float *l = v.lane;
  return ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7]));
}
MOESTRO_INLINE void sum_lanes4(const Vec *v, float *out) {
  for (int i = 0; i < 4; ++i) out[i] = sum_lanes(v[i]);
}

#endif

// The first n < 8 lanes from memory, the rest zero. A sum over k treats k as filled up to a multiple of 8 with zeros.
template <class W> MOESTRO_INLINE Vec load_some(const W *p, int64_t n) {
  W filled[kLanes] = {};
  std::memcpy(filled, p, static_cast<size_t>(n) * sizeof(W));
  return load(filled);
}
MOESTRO_INLINE void store_some(float *p, Vec v, int64_t n) {
  float all[kLanes];
  store(all, v);
  std::memcpy(p, all, static_cast<size_t>(n) * sizeof(float));
}

template <int N> MOESTRO_INLINE void sum_lanes_of(const Vec *v, float *out) {
  int i = 0;
  for (; i + 4 <= N; i += 4) sum_lanes4(v + i, out + i);
  for (; i < N; ++i) out[i] = sum_lanes(v[i]);
}

} // namespace MOESTRO_ISA
} // namespace moestro
