// How the codes of a matrix lie in its planes at each level, and how they become one byte per code.
//
// A block is 32 columns, eight quads of four. In the base plane it takes two chunks, in a bit plane one, in a nibble
// plane four, flat 8-bit codes eight. Planes are joined two bits at a time: a masked bit plane lines up with the
// two-bit fields of the base, two of which make a nibble.
#pragma once

#include "packed.h"
#include "tile_simd.h"

namespace moestro {
namespace MOESTRO_ISA {

// whole8: nested8 whose nibbles are the low halves of plain bytes, so that one dot product does.
// Flat codes of two bits lie as those of a base plane: they are nested2.
enum class Form { nested2, nested3, nested4, nested8, whole8, signs3, signs4, signs8, flat8, flat4, flat1 };

constexpr int kBlockColumns = 32;
constexpr int kBlockQuads = 8;

// How many sets of codes a form has; each gets an integer dot product of its own.
constexpr int dots_of(Form form) {
  switch (form) {
  case Form::nested8:
  case Form::signs3: return 2;
  case Form::signs4: return 3;
  case Form::signs8: return 4;
  default: return 1;
  }
}

// `plain`: the two parts of eight nested bits are the halves of a byte.
inline Form form_of(const PackedMatrix &matrix, bool plain) {
  switch (matrix.encoding) {
  case Encoding::flat8: return Form::flat8;
  case Encoding::flat4: return Form::flat4;
  case Encoding::flat2: return Form::nested2;
  case Encoding::flat1: return Form::flat1;
  case Encoding::signs:
    if (matrix.level == 3) return Form::signs3;
    if (matrix.level == 4) return Form::signs4;
    return matrix.level == 8 ? Form::signs8 : Form::nested2; // two bits are the same in both
  default:
    if (matrix.level == 3) return Form::nested3;
    if (matrix.level == 4) return Form::nested4;
    if (matrix.level == 8) return plain ? Form::whole8 : Form::nested8;
    return Form::nested2;
  }
}

constexpr bool is_signs(Form form) { return form == Form::signs3 || form == Form::signs4 || form == Form::signs8; }
// Whether codes have eight bits that are multiplied at once.
constexpr bool is_wide(Form form) { return form == Form::flat8 || form == Form::whole8; }
// Planes of the chain that are read.
constexpr int planes_of(Form form) {
  switch (form) {
  case Form::nested3:
  case Form::signs3: return 2;
  case Form::nested4:
  case Form::signs4: return 3;
  case Form::nested8:
  case Form::whole8:
  case Form::signs8: return 4;
  default: return 1;
  }
}

// Calls f with the run-time form as a type.
template <class F> void with_form(Form form, F f) {
  switch (form) {
#define MOESTRO_CASE(name)                                                                                             \
  case Form::name: return f(std::integral_constant<Form, Form::name>{})
    MOESTRO_CASE(nested2);
    MOESTRO_CASE(nested3);
    MOESTRO_CASE(nested4);
    MOESTRO_CASE(nested8);
    MOESTRO_CASE(whole8);
    MOESTRO_CASE(signs3);
    MOESTRO_CASE(signs4);
    MOESTRO_CASE(signs8);
    MOESTRO_CASE(flat8);
    MOESTRO_CASE(flat4);
    MOESTRO_CASE(flat1);
#undef MOESTRO_CASE
  }
}

// One group of one tile: where its codes begin in each plane.
struct GroupCodes {
  const uint8_t *plane[kPlanes];

  // Those of rows that begin so many bytes into every chunk.
  MOESTRO_INLINE GroupCodes from(int bytes) const {
    GroupCodes codes;
    for (int p = 0; p < kPlanes; ++p) codes.plane[p] = plane[p] + bytes;
    return codes;
  }
};

// Nibbles of a base chunk's four quads: `even` holds quads 0 and 2, `odd` quads 1 and 3.
template <int Dot, int N, class Use>
MOESTRO_INLINE void use_nibbles(const Codes<N> &even, const Codes<N> &odd, uint8_t mask, int quad, Use use) {
  use(Count<Dot>{}, quad + 0, masked(even, mask));
  use(Count<Dot>{}, quad + 1, masked(odd, mask));
  use(Count<Dot>{}, quad + 2, masked(lowered<4>(even), mask));
  use(Count<Dot>{}, quad + 3, masked(lowered<4>(odd), mask));
}

template <int N, class Use> MOESTRO_INLINE void unpack_base(const uint8_t *base, Use use) {
#pragma GCC unroll 2
  for (int c = 0; c < 2; ++c) {
    const Codes<N> fields = load_codes<N>(base + c * kChunk);
    use(Count<0>{}, 4 * c + 0, masked(fields, 3));
    use(Count<0>{}, 4 * c + 1, masked(lowered<2>(fields), 3));
    use(Count<0>{}, 4 * c + 2, masked(lowered<4>(fields), 3));
    use(Count<0>{}, 4 * c + 3, masked(lowered<6>(fields), 3));
  }
}

// 2 * base + bit
template <int N, class Use> MOESTRO_INLINE void unpack_three(const uint8_t *base, const uint8_t *third, Use use) {
  const Codes<N> bits = load_codes<N>(third);
  const Codes<N> fields[2] = {bits, lowered<1>(bits)};
#pragma GCC unroll 2
  for (int c = 0; c < 2; ++c) {
    const Codes<N> high = load_codes<N>(base + c * kChunk);
    const Codes<N> even = chosen(0x66, raised<1>(high), fields[c]);
    const Codes<N> odd = chosen(0x66, lowered<1>(high), lowered<2>(fields[c]));
    use_nibbles<0>(even, odd, 7, 4 * c, use);
  }
}

// 4 * base + 2 * bit + bit, as nibbles: use(c, even, odd) for each base chunk.
template <int N, class Use>
MOESTRO_INLINE void join_four(const uint8_t *base, const uint8_t *third, const uint8_t *fourth, Use use) {
  const Codes<N> bits3 = load_codes<N>(third), bits4 = load_codes<N>(fourth);
  const Codes<N> low[2] = {chosen(0xaa, raised<1>(bits3), bits4), chosen(0xaa, bits3, lowered<1>(bits4))};
#pragma GCC unroll 2
  for (int c = 0; c < 2; ++c) {
    const Codes<N> high = load_codes<N>(base + c * kChunk);
    use(c, chosen(0xcc, raised<2>(high), low[c]), chosen(0xcc, high, lowered<2>(low[c])));
  }
}

// 16 * nibble of the first three planes + nibble of the last.
template <int N, class Use>
MOESTRO_INLINE void unpack_whole(const uint8_t *base, const uint8_t *third, const uint8_t *fourth,
                                 const uint8_t *nibbles, Use use) {
  const auto use_both = [&](int c, const Codes<N> &even, const Codes<N> &odd) __attribute__((always_inline)) {
    const Codes<N> first = load_codes<N>(nibbles + 2 * c * kChunk);
    const Codes<N> second = load_codes<N>(nibbles + (2 * c + 1) * kChunk);
    use(Count<0>{}, 4 * c + 0, wide<false>(chosen(0xf0, raised<4>(even), first)));
    use(Count<0>{}, 4 * c + 1, wide<false>(chosen(0xf0, raised<4>(odd), lowered<4>(first))));
    use(Count<0>{}, 4 * c + 2, wide<false>(chosen(0xf0, even, second)));
    use(Count<0>{}, 4 * c + 3, wide<false>(chosen(0xf0, odd, lowered<4>(second))));
  };
  join_four<N>(base, third, fourth, use_both);
}

template <int Dot, int N, class Use> MOESTRO_INLINE void unpack_bits(const uint8_t *plane, Use use) {
  const Codes<N> bits = load_codes<N>(plane);
  use(Count<Dot>{}, 0, masked(bits, 1));
  use(Count<Dot>{}, 4, masked(lowered<1>(bits), 1));
  use(Count<Dot>{}, 1, masked(lowered<2>(bits), 1));
  use(Count<Dot>{}, 5, masked(lowered<3>(bits), 1));
  use(Count<Dot>{}, 2, masked(lowered<4>(bits), 1));
  use(Count<Dot>{}, 6, masked(lowered<5>(bits), 1));
  use(Count<Dot>{}, 3, masked(lowered<6>(bits), 1));
  use(Count<Dot>{}, 7, masked(lowered<7>(bits), 1));
}

template <int Dot, int N, class Use> MOESTRO_INLINE void unpack_nibbles(const uint8_t *plane, Use use) {
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const Codes<N> pair = load_codes<N>(plane + c * kChunk);
    use(Count<Dot>{}, 2 * c + 0, masked(pair, 15));
    use(Count<Dot>{}, 2 * c + 1, masked(lowered<4>(pair), 15));
  }
}

// Calls use(Count<dot>{}, quad, codes) for every set of codes and every quad of one block, N registers of codes at a
// time.
template <Form F, int N, class Use> MOESTRO_INLINE void unpack_block(const GroupCodes &at, int64_t block, Use use) {
  constexpr bool kSigns = is_signs(F);
  const uint8_t *first = at.plane[0];
  const auto bits_at = [&](int plane) { return at.plane[plane] + block * kChunk; };
  const uint8_t *nibbles = at.plane[3] + 4 * block * kChunk;
  if constexpr (F == Form::flat8) {
#pragma GCC unroll 8
    for (int q = 0; q < kBlockQuads; ++q) {
      use(Count<0>{}, q, wide<true>(load_codes<N>(first + (kBlockQuads * block + q) * kChunk)));
    }
  } else if constexpr (F == Form::flat4) {
    unpack_nibbles<0, N>(first + 4 * block * kChunk, use);
  } else if constexpr (F == Form::flat1) {
    unpack_bits<0, N>(first + block * kChunk, use);
  } else {
    const uint8_t *base = first + 2 * block * kChunk;
    if constexpr (F == Form::nested2 || kSigns) unpack_base<N>(base, use);
    if constexpr (F == Form::nested3) unpack_three<N>(base, bits_at(1), use);
    if constexpr (F == Form::nested4 || F == Form::nested8) {
      join_four<N>(base, bits_at(1), bits_at(2),
                   [&](int c, const Codes<N> &even, const Codes<N> &odd)
                       __attribute__((always_inline)) { use_nibbles<0>(even, odd, 15, 4 * c, use); });
    }
    if constexpr (F == Form::whole8) unpack_whole<N>(base, bits_at(1), bits_at(2), nibbles, use);
    if constexpr (kSigns) unpack_bits<1, N>(bits_at(1), use);
    if constexpr (F == Form::signs4 || F == Form::signs8) unpack_bits<2, N>(bits_at(2), use);
    if constexpr (F == Form::nested8) unpack_nibbles<1, N>(nibbles, use);
    if constexpr (F == Form::signs8) unpack_nibbles<3, N>(nibbles, use);
  }
}

} // namespace MOESTRO_ISA
} // namespace moestro
