// The registers of tile_simd.h with AVX-512 and its dot-product instructions: a tile's row per 32-bit lane of one
// register.
#pragma once

#include "simd.h"

namespace moestro {
namespace MOESTRO_ISA {

constexpr int kParts = 1;
// One row's sums alone would wait for each other: they are split over this many registers.
constexpr int kChains = 4;
// How many rows of activations are computed together; half as many where they have more sums than kManyDots.
constexpr int kTokens = 8;
constexpr int kManyDots = 1;
constexpr int parts_at_once(int) { return kParts; }

using Bytes = __m512i;
using Ints = __m512i;
using Reals = __m512;

MOESTRO_INLINE Bytes load_bytes(const uint8_t *p) { return _mm512_loadu_si512(p); }
MOESTRO_INLINE Bytes mask_bytes(Bytes v, uint8_t mask) {
  return _mm512_and_si512(v, _mm512_set1_epi8(static_cast<char>(mask)));
}
template <int N> MOESTRO_INLINE Bytes shift_up(Bytes v) { return _mm512_slli_epi16(v, N); }
template <int N> MOESTRO_INLINE Bytes shift_down(Bytes v) { return _mm512_srli_epi16(v, N); }
MOESTRO_INLINE Bytes select(uint8_t mask, Bytes one, Bytes zero) {
  return _mm512_ternarylogic_epi64(_mm512_set1_epi8(static_cast<char>(mask)), one, zero, 0xca);
}
MOESTRO_INLINE Bytes load_quad(const int8_t *p) {
  int32_t quad;
  std::memcpy(&quad, p, sizeof quad);
  return _mm512_set1_epi32(quad);
}

MOESTRO_INLINE Bytes flip_signs(Bytes v) { return _mm512_xor_si512(v, _mm512_set1_epi8(static_cast<char>(0x80))); }

// The dot product's first operand has no sign.
constexpr bool kWideSigned = false;

struct Dot {
  Ints sums;

  MOESTRO_INLINE void clear() { sums = _mm512_setzero_si512(); }
  MOESTRO_INLINE void add(Bytes codes, Bytes quad) { sums = _mm512_dpbusd_epi32(sums, codes, quad); }
  MOESTRO_INLINE void add_wide(Bytes codes, Bytes quad) { add(codes, quad); }
  MOESTRO_INLINE void flush() {}
};

MOESTRO_INLINE Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
MOESTRO_INLINE Ints mul_ints(Ints a, int32_t b) { return _mm512_mullo_epi32(a, _mm512_set1_epi32(b)); }
// 2 * v - less
MOESTRO_INLINE Ints twice_less(Ints v, int32_t less) {
  return _mm512_sub_epi32(_mm512_add_epi32(v, v), _mm512_set1_epi32(less));
}

MOESTRO_INLINE Reals to_reals(Ints v) { return _mm512_cvtepi32_ps(v); }
MOESTRO_INLINE Reals all_reals(float value) { return _mm512_set1_ps(value); }
MOESTRO_INLINE Reals load_reals(const float *p) { return _mm512_loadu_ps(p); }
MOESTRO_INLINE Reals load_reals(const Float16 *p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
}
MOESTRO_INLINE void store_reals(float *p, Reals v) { _mm512_storeu_ps(p, v); }
MOESTRO_INLINE Reals fma_reals(Reals a, Reals b, Reals c) { return _mm512_fmadd_ps(a, b, c); }
MOESTRO_INLINE Reals add_reals(Reals a, Reals b) { return _mm512_add_ps(a, b); }
MOESTRO_INLINE Reals mul_reals(Reals a, Reals b) { return _mm512_mul_ps(a, b); }

} // namespace MOESTRO_ISA
} // namespace moestro
