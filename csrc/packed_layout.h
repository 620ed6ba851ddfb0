// Where a matrix's groups and their constants lie in its planes, and how a group's exact sums join a row's result.
#pragma once

#include "packed_forms.h"
#include "packed_tasks.h"

namespace moestro {
namespace MOESTRO_ISA {

struct Header {
  float unit, kh;
  int32_t high, low; // of eight nested bits
};

// Steps from tile to tile and from group to group in each plane, in bytes. Chains of signs have scales of their own in
// the higher planes, at the start of each tile.
struct Layout {
  Header header;
  int64_t groups;
  const uint8_t *tiles[kPlanes];
  int64_t tile_bytes[kPlanes], group_bytes[kPlanes], scale_bytes[kPlanes];
};

constexpr int64_t kRowBytes = kTile * int64_t{sizeof(uint16_t)}; // one fp16 number for each row of a tile

inline Layout layout_of(const PackedMatrix &matrix) {
  Layout layout{};
  const int64_t groups = groups_of(matrix), group = matrix.group;
  const bool flat = flat_bits(matrix.encoding) != 0;
  const bool signs = matrix.encoding == Encoding::signs;
  const int64_t base_bits = flat ? flat_bits(matrix.encoding) : 2;
  const int64_t bits[kPlanes] = {base_bits, 1, 1, 4};
  float constants[7];
  std::memcpy(constants, matrix.regions[0], sizeof constants);
  const int place = flat || signs || matrix.level == 2 ? 1 : (matrix.level == 8 ? 4 : matrix.level - 1);
  layout.header = {constants[0], constants[place], static_cast<int32_t>(constants[5]),
                   static_cast<int32_t>(constants[6])};
  layout.groups = groups;
  for (int p = 0; p < kPlanes; ++p) {
    if (matrix.regions[p] == nullptr) continue;
    const int64_t codes = kTile * group * bits[p] / 8;
    layout.tiles[p] = matrix.regions[p] + (p == 0 ? kHeader : 0);
    layout.group_bytes[p] = codes + (p == 0 ? 2 * kRowBytes : 0);
    layout.scale_bytes[p] = p == 0 ? 2 * kRowBytes : (signs ? rounded_up(groups * kRowBytes, 64) : 0);
    layout.tile_bytes[p] = p == 0 ? groups * layout.group_bytes[p] : layout.scale_bytes[p] + groups * codes;
  }
  return layout;
}

// One group of one tile.
struct Group {
  GroupCodes codes;
  const uint8_t *scales[kPlanes];
};

MOESTRO_INLINE Group group_at(const Layout &layout, int64_t tile, int64_t g) {
  Group group;
  for (int p = 0; p < kPlanes; ++p) {
    const uint8_t *start = layout.tiles[p] + tile * layout.tile_bytes[p];
    group.codes.plane[p] = start + layout.scale_bytes[p] + g * layout.group_bytes[p];
    group.scales[p] = start + g * (p == 0 ? layout.group_bytes[p] : kRowBytes);
  }
  return group;
}

// A group's constants, kPartRows rows of them.
struct GroupReals {
  Reals scale[kPlanes], middle;
};

template <Form F> MOESTRO_INLINE GroupReals reals_at(const Group &group, int part) {
  const auto load_at = [&](const uint8_t *p) {
    return load_reals(reinterpret_cast<const Float16 *>(p) + part * kPartRows);
  };
  GroupReals reals;
  reals.scale[0] = load_at(group.scales[0]);
  reals.middle = load_at(group.scales[0] + kRowBytes);
  if constexpr (is_signs(F)) {
    for (int p = 1; p < dots_of(F); ++p) reals.scale[p] = load_at(group.scales[p]);
  }
  return reals;
}

// 2 * sum((code - centre) * a), exactly, from the sums of one part of a tile.
template <Form F> MOESTRO_INLINE Ints centred(const Header &header, const Ints *dots, int32_t codes) {
  if constexpr (F == Form::nested8) {
    const Ints sum = add_ints(mul_ints(dots[0], header.high), mul_ints(dots[1], header.low));
    return twice_less(sum, 15 * (header.high + header.low) * codes);
  }
  if constexpr (is_wide(F)) return twice_less(dots[0], kWideCentre * codes);
  if constexpr (F == Form::nested3) return twice_less(dots[0], 7 * codes);
  if constexpr (F == Form::nested4 || F == Form::flat4) return twice_less(dots[0], 15 * codes);
  if constexpr (F == Form::flat1) return twice_less(dots[0], codes);
  return twice_less(dots[0], 3 * codes);
}

// Adds a group to the sums of one row of activations.
template <Form F>
MOESTRO_INLINE Reals add_group(Reals acc, const Header &header, const Ints *dots, const GroupReals &reals,
                               const GroupScale &x) {
  const auto add_step = [&](Ints sum, float factor, Reals scale) {
    acc = fma_reals(scale, mul_reals(to_reals(sum), all_reals(factor)), acc);
  };
  add_step(centred<F>(header, dots, x.codes), x.scale * header.kh, reals.scale[0]);
  acc = fma_reals(reals.middle, all_reals(x.sum), acc);
  if constexpr (is_signs(F)) {
    add_step(twice_less(dots[1], x.codes), x.scale, reals.scale[1]);
    if constexpr (dots_of(F) > 2) add_step(twice_less(dots[2], x.codes), x.scale, reals.scale[2]);
    if constexpr (dots_of(F) > 3) add_step(twice_less(dots[3], 15 * x.codes), x.scale * 0.5f, reals.scale[3]);
  }
  return acc;
}

} // namespace MOESTRO_ISA
} // namespace moestro
