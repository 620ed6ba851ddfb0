// A tile's sixteen rows in registers: 64 bytes of codes (four columns of each row), sixteen integer sums, sixteen
// floats, each in kParts registers of the instruction set. All of them give the same bits.
#pragma once

#include "packed_tasks.h"
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

constexpr int kChunk = 64;
constexpr int kPartBytes = kChunk / kParts;
constexpr int kPartRows = kTile / kParts;

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
MOESTRO_INLINE Codes masked(const Codes &v, uint8_t mask) {
  return each_part([&](int i) { return mask_bytes(v.part[i], mask); });
}
// Bits move between bytes; masks must leave out those that came in.
template <int N> MOESTRO_INLINE Codes raised(const Codes &v) {
  return each_part([&](int i) { return shift_up<N>(v.part[i]); });
}
template <int N> MOESTRO_INLINE Codes lowered(const Codes &v) {
  return each_part([&](int i) { return shift_down<N>(v.part[i]); });
}
// Bits of `one` where the mask has ones, of `zero` elsewhere.
MOESTRO_INLINE Codes chosen(uint8_t mask, const Codes &one, const Codes &zero) {
  return each_part([&](int i) { return select(mask, one.part[i], zero.part[i]); });
}

// Codes of eight bits as this instruction set multiplies them, from how they are stored: code c as c or as c - 128. The
// sum of c - 127.5 times activations, doubled, is 2 * sums - kWideCentre * sum(a).
constexpr int32_t kWideCentre = kWideSigned ? -1 : 255;

template <bool Signed> MOESTRO_INLINE Codes wide(const Codes &v) {
  if constexpr (Signed == kWideSigned) return v;
  return each_part([&](int i) { return flip_signs(v.part[i]); });
}

// Sums of activations times codes up to 15, or wide ones. flush() at least every eight quads.
struct TileDot {
  Dot part[kParts];

  MOESTRO_INLINE void clear() {
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) part[i].clear();
  }
  template <bool Wide, class Quad> MOESTRO_INLINE void add(const Codes &codes, const Quad &quad) {
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) {
      if constexpr (Wide) {
        part[i].add_wide(codes.part[i], quad);
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
