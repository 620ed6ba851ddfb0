// The registers of tile_simd.h with AVX2: eight rows of a tile per register.
#pragma once

#include "simd.h"

namespace moestro {
namespace MOESTRO_ISA {

constexpr int kParts = 2;
constexpr int kChains = 1;
constexpr int kTokens = 4;
constexpr int kManyDots = 1;
// How many of a tile's parts are multiplied together: with more rows of activations, sums of one fill the registers.
constexpr int parts_at_once(int tokens) { return tokens > 2 ? 1 : kParts; }

using Bytes = __m256i;
using Ints = __m256i;
using Reals = __m256;

MOESTRO_INLINE Bytes load_bytes(const uint8_t *p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)); }
MOESTRO_INLINE Bytes mask_bytes(Bytes v, uint8_t mask) {
  return _mm256_and_si256(v, _mm256_set1_epi8(static_cast<char>(mask)));
}
template <int N> MOESTRO_INLINE Bytes shift_up(Bytes v) { return _mm256_slli_epi16(v, N); }
template <int N> MOESTRO_INLINE Bytes shift_down(Bytes v) { return _mm256_srli_epi16(v, N); }
MOESTRO_INLINE Bytes select(uint8_t mask, Bytes one, Bytes zero) {
  const Bytes chosen = _mm256_set1_epi8(static_cast<char>(mask));
  return _mm256_or_si256(_mm256_and_si256(chosen, one), _mm256_andnot_si256(chosen, zero));
}
MOESTRO_INLINE Bytes load_quad(const int8_t *p) {
  int32_t quad;
  std::memcpy(&quad, p, sizeof quad);
  return _mm256_set1_epi32(quad);
}

MOESTRO_INLINE Bytes flip_signs(Bytes v) { return _mm256_xor_si256(v, _mm256_set1_epi8(static_cast<char>(0x80))); }

constexpr bool kWideSigned = true;

// Keeps additions in their order: GCC gathers all products first, for which there are too few registers.
MOESTRO_INLINE Ints in_order(Ints sum) {
  asm("" : "+x"(sum));
  return sum;
}

// Codes up to 15: a pair's products are at most 2 * 15 * 127, so eight of them fit in 16 bits before a flush. Wide
// codes: a pair's are at most 2 * 128 * 127, which just fits, and go into 32 bits at once; the sign moves to the
// activations because the first operand has none.
struct Dot {
  Ints sums, pairs;

  MOESTRO_INLINE void clear() { sums = pairs = _mm256_setzero_si256(); }
  MOESTRO_INLINE void add(Bytes codes, Bytes quad) {
    pairs = in_order(_mm256_add_epi16(pairs, _mm256_maddubs_epi16(codes, quad)));
  }
  MOESTRO_INLINE void add_wide(Bytes codes, Bytes quad) {
    const Ints products = _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(quad, codes));
    sums = in_order(_mm256_add_epi32(sums, _mm256_madd_epi16(products, _mm256_set1_epi16(1))));
  }
  MOESTRO_INLINE void flush() {
    sums = _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    pairs = _mm256_setzero_si256();
  }
};

MOESTRO_INLINE Ints add_ints(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
MOESTRO_INLINE Ints mul_ints(Ints a, int32_t b) { return _mm256_mullo_epi32(a, _mm256_set1_epi32(b)); }
MOESTRO_INLINE Ints twice_less(Ints v, int32_t less) {
  return _mm256_sub_epi32(_mm256_add_epi32(v, v), _mm256_set1_epi32(less));
}

MOESTRO_INLINE Reals to_reals(Ints v) { return _mm256_cvtepi32_ps(v); }
MOESTRO_INLINE Reals all_reals(float value) { return broadcast(value); }
MOESTRO_INLINE Reals load_reals(const float *p) { return load(p); }
MOESTRO_INLINE Reals load_reals(const Float16 *p) { return load(p); }
MOESTRO_INLINE void store_reals(float *p, Reals v) { store(p, v); }
MOESTRO_INLINE Reals fma_reals(Reals a, Reals b, Reals c) { return fma(a, b, c); }
MOESTRO_INLINE Reals add_reals(Reals a, Reals b) { return add(a, b); }
MOESTRO_INLINE Reals mul_reals(Reals a, Reals b) { return mul(a, b); }

} // namespace MOESTRO_ISA
} // namespace moestro
