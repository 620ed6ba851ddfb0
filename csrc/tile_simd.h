// A tile's sixteen rows in registers: 64 bytes of codes (four columns of each row), sixteen integer sums, sixteen
// floats, each in kParts registers of the instruction set. All of them give the same bits.
#pragma once

#include "unroll.h"

#if defined(__AVX512VNNI__)
#include "tile_avx512.h"
#elif defined(MOESTRO_AVX2)
#include "tile_avx2.h"
#elif defined(__ARM_FEATURE_DOTPROD)
#include "tile_neon.h"
#else
#include "tile_portable.h"
#endif

namespace moestro {
namespace MOESTRO_ISA {

constexpr int kTileRows16 = 16;
constexpr int kChunk = 64;
constexpr int kPartBytes = kChunk / kParts;
constexpr int kPartRows = kTileRows16 / kParts;

struct Codes {
  Bytes part[kParts];
};

template <class F> MOESTRO_INLINE Codes each_part(F f) {
  Codes out;
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) out.part[i] = f(i);
  return out;
}

MOESTRO_INLINE Codes load_codes(const uint8_t *p) {
  return each_part([&](int i) { return load_bytes(p + i * kPartBytes); });
}
MOESTRO_INLINE void store_codes(uint8_t *p, const Codes &v) {
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) store_bytes(p + i * kPartBytes, v.part[i]);
}
MOESTRO_INLINE Codes masked(const Codes &v, uint8_t mask) {
  return each_part([&](int i) { return mask_bytes(v.part[i], mask); });
}
// Bits move between bytes; masks must leave out those that came in.
template <int N> MOESTRO_INLINE Codes up(const Codes &v) {
  return each_part([&](int i) { return shift_up<N>(v.part[i]); });
}
template <int N> MOESTRO_INLINE Codes down(const Codes &v) {
  return each_part([&](int i) { return shift_down<N>(v.part[i]); });
}
// Bits of `one` where the mask has ones, of `zero` elsewhere.
MOESTRO_INLINE Codes chosen(uint8_t mask, const Codes &one, const Codes &zero) {
  return each_part([&](int i) { return select(mask, one.part[i], zero.part[i]); });
}

// Sums of codes times activations. flush() at least every eight quads.
struct TileDot {
  Dot part[kParts];

  MOESTRO_INLINE void clear() {
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) part[i].clear();
  }
  template <bool Signed, class Quad> MOESTRO_INLINE void add(const Codes &codes, const Quad &quad) {
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) {
      if constexpr (Signed) {
        part[i].add_signed(codes.part[i], quad);
      } else {
        part[i].add(codes.part[i], quad);
      }
    }
  }
  MOESTRO_INLINE void flush() {
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) part[i].flush();
  }
};

} // namespace MOESTRO_ISA
} // namespace moestro
