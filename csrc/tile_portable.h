// The registers of tile_simd.h in plain C++: a "register" is an array with all sixteen rows.
#pragma once

#include "simd.h"

namespace moestro {
namespace MOESTRO_ISA {

constexpr int kParts = 1;
constexpr int kChains = 1;
constexpr int kTokens = 1;
constexpr int kManyDots = 4;
constexpr int parts_at_once(int) { return kParts; }

struct Bytes {
  uint8_t at[64];
};
struct Ints {
  int32_t at[16];
};
struct Reals {
  float at[16];
};
struct Quad {
  int8_t at[4];
};

template <class F> MOESTRO_INLINE Bytes each_byte(F f) {
  Bytes out;
  for (int i = 0; i < 64; ++i) out.at[i] = static_cast<uint8_t>(f(i));
  return out;
}
template <class F> MOESTRO_INLINE Ints each_int(F f) {
  Ints out;
  for (int i = 0; i < 16; ++i) out.at[i] = f(i);
  return out;
}
template <class F> MOESTRO_INLINE Reals each_real(F f) {
  Reals out;
  for (int i = 0; i < 16; ++i) out.at[i] = f(i);
  return out;
}

MOESTRO_INLINE Bytes load_bytes(const uint8_t *p) {
  return each_byte([&](int i) { return p[i]; });
}
MOESTRO_INLINE Bytes mask_bytes(const Bytes &v, uint8_t mask) {
  return each_byte([&](int i) { return v.at[i] & mask; });
}
template <int N> MOESTRO_INLINE Bytes shift_up(const Bytes &v) {
  return each_byte([&](int i) { return v.at[i] << N; });
}
template <int N> MOESTRO_INLINE Bytes shift_down(const Bytes &v) {
  return each_byte([&](int i) { return v.at[i] >> N; });
}
MOESTRO_INLINE Bytes select(uint8_t mask, const Bytes &one, const Bytes &zero) {
  return each_byte([&](int i) { return (one.at[i] & mask) | (zero.at[i] & ~mask); });
}
MOESTRO_INLINE Quad load_quad(const int8_t *p) {
  Quad quad;
  std::memcpy(quad.at, p, sizeof quad.at);
  return quad;
}

MOESTRO_INLINE Bytes flip_signs(const Bytes &v) {
  return each_byte([&](int i) { return v.at[i] ^ 0x80; });
}

constexpr bool kWideSigned = true;

struct Dot {
  Ints sums;

  MOESTRO_INLINE void clear() {
    sums = each_int([](int) { return 0; });
  }
  // Not inlined: it would be so hundreds of times, and this path is for machines without better.
  template <class Code> __attribute__((noinline)) void add_as(const Bytes &codes, const Quad &quad) {
    for (int row = 0; row < 16; ++row) {
      for (int i = 0; i < 4; ++i) sums.at[row] += static_cast<Code>(codes.at[4 * row + i]) * quad.at[i];
    }
  }
  MOESTRO_INLINE void add(const Bytes &codes, const Quad &quad) { add_as<uint8_t>(codes, quad); }
  MOESTRO_INLINE void add_wide(const Bytes &codes, const Quad &quad) { add_as<int8_t>(codes, quad); }
  MOESTRO_INLINE void flush() {}
};

MOESTRO_INLINE Ints add_ints(const Ints &a, const Ints &b) {
  return each_int([&](int i) { return a.at[i] + b.at[i]; });
}
MOESTRO_INLINE Ints mul_ints(const Ints &a, int32_t b) {
  return each_int([&](int i) { return a.at[i] * b; });
}
MOESTRO_INLINE Ints twice_less(const Ints &v, int32_t less) {
  return each_int([&](int i) { return 2 * v.at[i] - less; });
}

MOESTRO_INLINE Reals to_reals(const Ints &v) {
  return each_real([&](int i) { return static_cast<float>(v.at[i]); });
}
MOESTRO_INLINE Reals all_reals(float value) {
  return each_real([&](int) { return value; });
}
template <class W> MOESTRO_INLINE Reals load_reals(const W *p) {
  return each_real([&](int i) { return to_float(p[i]); });
}
MOESTRO_INLINE void store_reals(float *p, const Reals &v) { std::memcpy(p, v.at, sizeof v.at); }
MOESTRO_INLINE Reals fma_reals(const Reals &a, const Reals &b, const Reals &c) {
  return each_real([&](int i) { return std::fma(a.at[i], b.at[i], c.at[i]); });
}
MOESTRO_INLINE Reals add_reals(const Reals &a, const Reals &b) {
  return each_real([&](int i) { return a.at[i] + b.at[i]; });
}
MOESTRO_INLINE Reals mul_reals(const Reals &a, const Reals &b) {
  return each_real([&](int i) { return a.at[i] * b.at[i]; });
}

} // namespace MOESTRO_ISA
} // namespace moestro
