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

// Codes of N registers: those of a whole tile, or of some of its rows.
template <int N> struct Codes {
  Bytes part[N];
};

template <int N, class F> MOESTRO_INLINE Codes<N> each_part(F f) {
  Codes<N> out;
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) out.part[i] = f(i);
  return out;
}

template <int N> MOESTRO_INLINE Codes<N> load_codes(const uint8_t *p) {
  return each_part<N>([&](int i) { return load_bytes(p + i * kPartBytes); });
}
template <int N> MOESTRO_INLINE Codes<N> masked(const Codes<N> &v, uint8_t mask) {
  return each_part<N>([&](int i) { return mask_bytes(v.part[i], mask); });
}
// Bits move between bytes; masks must leave out those that came in.
template <int Bits, int N> MOESTRO_INLINE Codes<N> raised(const Codes<N> &v) {
  return each_part<N>([&](int i) { return shift_up<Bits>(v.part[i]); });
}
template <int Bits, int N> MOESTRO_INLINE Codes<N> lowered(const Codes<N> &v) {
  return each_part<N>([&](int i) { return shift_down<Bits>(v.part[i]); });
}
// Bits of `one` where the mask has ones, of `zero` elsewhere.
template <int N> MOESTRO_INLINE Codes<N> chosen(uint8_t mask, const Codes<N> &one, const Codes<N> &zero) {
  return each_part<N>([&](int i) { return select(mask, one.part[i], zero.part[i]); });
}

// Codes of eight bits as this instruction set multiplies them, from how they are stored: code c as c or as c - 128. The
// sum of c - 127.5 times activations, doubled, is 2 * sums - kWideCentre * sum(a).
constexpr int32_t kWideCentre = kWideSigned ? -1 : 255;

template <bool Signed, int N> MOESTRO_INLINE Codes<N> wide(const Codes<N> &v) {
  if constexpr (Signed == kWideSigned) return v;
  return each_part<N>([&](int i) { return flip_signs(v.part[i]); });
}

// Sums of activations times codes up to 15, or wide ones. flush() at least every eight quads.
template <int N> struct TileDot {
  Dot part[N];

  MOESTRO_INLINE void clear() {
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) part[i].clear();
  }
  template <bool Wide, class Quad> MOESTRO_INLINE void add(const Codes<N> &codes, const Quad &quad) {
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
      if constexpr (Wide) {
        part[i].add_wide(codes.part[i], quad);
      } else {
        part[i].add(codes.part[i], quad);
      }
    }
  }
  MOESTRO_INLINE void flush() {
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) part[i].flush();
  }
};

} // namespace MOESTRO_ISA
} // namespace moestro
