// The registers of tile_simd.h with NEON and its dot-product instructions: four rows of a tile per register.
#pragma once

#include <arm_neon.h>

#include "simd.h"

namespace moestro {
namespace MOESTRO_ISA {

constexpr int kParts = 4;
constexpr int kChains = 1;
constexpr int kTokens = 4;
constexpr int kManyDots = 1;
constexpr int parts_at_once(int) { return kParts; }

using Bytes = uint8x16_t;
using Ints = int32x4_t;
using Reals = float32x4_t;

MOESTRO_INLINE Bytes load_bytes(const uint8_t *p) { return vld1q_u8(p); }
MOESTRO_INLINE Bytes mask_bytes(Bytes v, uint8_t mask) { return vandq_u8(v, vdupq_n_u8(mask)); }
template <int N> MOESTRO_INLINE Bytes shift_up(Bytes v) { return vshlq_n_u8(v, N); }
template <int N> MOESTRO_INLINE Bytes shift_down(Bytes v) { return vshrq_n_u8(v, N); }
MOESTRO_INLINE Bytes select(uint8_t mask, Bytes one, Bytes zero) { return vbslq_u8(vdupq_n_u8(mask), one, zero); }
MOESTRO_INLINE int8x16_t load_quad(const int8_t *p) {
  int32_t quad;
  std::memcpy(&quad, p, sizeof quad);
  return vreinterpretq_s8_s32(vdupq_n_s32(quad));
}

MOESTRO_INLINE Bytes flip_signs(Bytes v) { return veorq_u8(v, vdupq_n_u8(0x80)); }

constexpr bool kWideSigned = true;

struct Dot {
  Ints sums;

  MOESTRO_INLINE void clear() { sums = vdupq_n_s32(0); }
  MOESTRO_INLINE void add_wide(Bytes codes, int8x16_t quad) {
    sums = vdotq_s32(sums, vreinterpretq_s8_u8(codes), quad);
  }
  MOESTRO_INLINE void add(Bytes codes, int8x16_t quad) { add_wide(codes, quad); } // codes up to 15 have no sign either
  MOESTRO_INLINE void flush() {}
};

MOESTRO_INLINE Ints add_ints(Ints a, Ints b) { return vaddq_s32(a, b); }
MOESTRO_INLINE Ints mul_ints(Ints a, int32_t b) { return vmulq_n_s32(a, b); }
MOESTRO_INLINE Ints twice_less(Ints v, int32_t less) { return vsubq_s32(vaddq_s32(v, v), vdupq_n_s32(less)); }

MOESTRO_INLINE Reals to_reals(Ints v) { return vcvtq_f32_s32(v); }
MOESTRO_INLINE Reals all_reals(float value) { return vdupq_n_f32(value); }
MOESTRO_INLINE Reals load_reals(const float *p) { return vld1q_f32(p); }
MOESTRO_INLINE Reals load_reals(const Float16 *p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t *>(p))));
}
MOESTRO_INLINE void store_reals(float *p, Reals v) { vst1q_f32(p, v); }
MOESTRO_INLINE Reals fma_reals(Reals a, Reals b, Reals c) { return vfmaq_f32(c, a, b); }
MOESTRO_INLINE Reals add_reals(Reals a, Reals b) { return vaddq_f32(a, b); }
MOESTRO_INLINE Reals mul_reals(Reals a, Reals b) { return vmulq_f32(a, b); }

} // namespace MOESTRO_ISA
} // namespace moestro
