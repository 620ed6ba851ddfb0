// Sixteen rows at a time, one column after another; loops over lanes are left to the compiler.
#include "rounding.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels.h"
#include "simd.h"
#include "thread_pool.h"

namespace moestro {
namespace MOESTRO_ISA {
namespace {

constexpr int kRows = 16;
constexpr int kCodes = 16;

struct Lanes {
  float at[kRows];
};

struct Choice {
  Lanes code, nibble, value[kLevels];
};

MOESTRO_INLINE float clamp_round(float x, float most) { return std::min(std::max(std::nearbyint(x), 0.0f), most); }

// Squared distance of a level's target from each of its 2^bits values.
template <int Bits> MOESTRO_INLINE void distances(const Lanes &target, const Lanes &step, Lanes *out) {
  constexpr int count = 1 << Bits;
  for (int c = 0; c < count; ++c) {
    const float position = static_cast<float>(c) - 0.5f * (count - 1);
    for (int r = 0; r < kRows; ++r) {
      const float miss = target.at[r] - position * step.at[r];
      out[c].at[r] = miss * miss;
    }
  }
}

MOESTRO_INLINE void choose_nested(const RoundArgs &args, const Lanes *target, const Lanes &scale, Choice &choice) {
  Lanes step[kLevels], inverse, d2[4], d3[8], d4[16], cost;
  for (int b = 0; b < kLevels; ++b) {
    for (int r = 0; r < kRows; ++r) step[b].at[r] = scale.at[r] * args.steps[b];
  }
  for (int r = 0; r < kRows; ++r) inverse.at[r] = step[3].at[r] > 0.0f ? 1.0f / step[3].at[r] : 0.0f;
  distances<2>(target[0], step[0], d2);
  distances<3>(target[1], step[1], d3);
  distances<4>(target[2], step[2], d4);
  const float *p = args.priorities;
  for (int r = 0; r < kRows; ++r) cost.at[r] = INFINITY;
  for (int c = 0; c < kCodes; ++c) {
    const float base = args.hi * (static_cast<float>(c) - 7.5f);
    for (int r = 0; r < kRows; ++r) {
      const float wanted = target[3].at[r] * inverse.at[r] - base;
      const float nibble = clamp_round(wanted / args.lo + 7.5f, 15.0f);
      const float miss = target[3].at[r] - step[3].at[r] * (base + args.lo * (nibble - 7.5f));
      const float all = p[0] * d2[c >> 2].at[r] + p[1] * d3[c >> 1].at[r] + p[2] * d4[c].at[r] + p[3] * (miss * miss);
      const bool better = all < cost.at[r];
      cost.at[r] = better ? all : cost.at[r];
      choice.code.at[r] = better ? static_cast<float>(c) : choice.code.at[r];
      choice.nibble.at[r] = better ? nibble : choice.nibble.at[r];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    const float c4 = choice.code.at[r], c3 = std::floor(c4 * 0.5f), c2 = std::floor(c4 * 0.25f);
    choice.value[0].at[r] = (c2 - 1.5f) * step[0].at[r];
    choice.value[1].at[r] = (c3 - 3.5f) * step[1].at[r];
    choice.value[2].at[r] = (c4 - 7.5f) * step[2].at[r];
    choice.value[3].at[r] = step[3].at[r] * (args.hi * (c4 - 7.5f) + args.lo * (choice.nibble.at[r] - 7.5f));
  }
}

MOESTRO_INLINE void choose_signs(const RoundArgs &args, const Lanes *target, const Lanes *scale, Choice &choice) {
  for (int r = 0; r < kRows; ++r) {
    const float step = scale[0].at[r] * args.steps[0];
    const float c2 = clamp_round((step > 0.0f ? target[0].at[r] / step : 0.0f) + 1.5f, 3.0f);
    const float v2 = (c2 - 1.5f) * step;
    const bool up3 = target[1].at[r] >= v2;
    const float v3 = up3 ? v2 + scale[1].at[r] : v2 - scale[1].at[r];
    const bool up4 = target[2].at[r] >= v3;
    const float v4 = up4 ? v3 + scale[2].at[r] : v3 - scale[2].at[r];
    const float fine = scale[3].at[r];
    const float nibble = clamp_round((fine > 0.0f ? (target[3].at[r] - v4) / fine : 0.0f) + 7.5f, 15.0f);
    choice.code.at[r] = c2 * 4.0f + (up3 ? 2.0f : 0.0f) + (up4 ? 1.0f : 0.0f);
    choice.nibble.at[r] = nibble;
    choice.value[0].at[r] = v2;
    choice.value[1].at[r] = v3;
    choice.value[2].at[r] = v4;
    choice.value[3].at[r] = v4 + fine * (nibble - 7.5f);
  }
}

// Rows [first, first + rows) of the block; `columns` targets of sixteen rows lie together in scratch.
void round_rows(const RoundArgs &args, int64_t first, int64_t rows, Lanes *targets) {
  const int64_t columns = args.columns;
  for (int b = 0; b < kLevels; ++b) {
    for (int64_t r = 0; r < kRows; ++r) {
      const float *row = args.targets + b * args.target_level_stride + (first + std::min(r, rows - 1)) * args.target_row_stride;
      for (int64_t k = 0; k < columns; ++k) targets[b * columns + k].at[r] = row[k];
    }
  }
  Lanes target[kLevels], scale[kLevels];
  Choice choice;
  for (int64_t k = 0; k < columns; ++k) {
    const int64_t group = args.group_of[k];
    for (int b = 0; b < kLevels; ++b) {
      target[b] = targets[b * columns + k];
      if (args.scales[b] == nullptr) continue;
      for (int64_t r = 0; r < kRows; ++r) scale[b].at[r] = args.scales[b][(first + std::min(r, rows - 1)) * args.groups + group];
    }
    if (args.signs) {
      choose_signs(args, target, scale, choice);
    } else {
      choose_nested(args, target, scale[0], choice);
    }
    for (int64_t r = 0; r < rows; ++r) {
      args.codes[(first + r) * columns + k] = static_cast<uint8_t>(choice.code.at[r]);
      args.nibbles[(first + r) * columns + k] = static_cast<uint8_t>(choice.nibble.at[r]);
    }
    if (args.root == nullptr) continue;
    const float *root = args.root + k * args.root_stride;
    for (int b = 0; b < kLevels; ++b) {
      Lanes error;
      for (int r = 0; r < kRows; ++r) error.at[r] = (target[b].at[r] - choice.value[b].at[r]) / root[k];
      for (int64_t r = 0; r < rows; ++r) args.errors[(b * args.rows + first + r) * columns + k] = error.at[r];
      for (int64_t later = k + 1; later < columns; ++later) {
        Lanes &moved = targets[b * columns + later];
        for (int r = 0; r < kRows; ++r) moved.at[r] -= error.at[r] * root[later];
      }
    }
  }
}

void round_task(void *context, int64_t task, char *scratch) {
  const RoundArgs &args = *static_cast<const RoundArgs *>(context);
  const int64_t first = task * kRows;
  round_rows(args, first, std::min<int64_t>(kRows, args.rows - first), reinterpret_cast<Lanes *>(scratch));
}

} // namespace

void round_columns(const RoundArgs &args) {
  const size_t scratch = sizeof(Lanes) * kLevels * static_cast<size_t>(args.columns);
  pool().run((args.rows + kRows - 1) / kRows, scratch, true, round_task, const_cast<RoundArgs *>(&args));
}

} // namespace MOESTRO_ISA
} // namespace moestro
