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

// Nearest whole number from 0 to `most` (ties to even): adding 1.5 * 2^23 leaves no room for a fraction.
MOESTRO_INLINE float clamp_round(float x, float most) {
  const float clamped = std::min(std::max(x, 0.0f), most);
  return (clamped + 12582912.0f) - 12582912.0f;
}

// What each code stands for at the first three levels, and the step and middle of the nibble at the fourth.
struct Values {
  Lanes at2[4], at3[8], at4[kCodes];
  Lanes fine, base8[kCodes];
};

MOESTRO_INLINE void nested_values(const RoundArgs &args, const Lanes *scale, Values &values) {
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < 4; ++c) values.at2[c].at[r] = (static_cast<float>(c) - 1.5f) * (scale[0].at[r] * args.steps[0]);
    for (int c = 0; c < 8; ++c) values.at3[c].at[r] = (static_cast<float>(c) - 3.5f) * (scale[0].at[r] * args.steps[1]);
    const float step8 = scale[0].at[r] * args.steps[3];
    values.fine.at[r] = args.lo * step8;
    for (int c = 0; c < kCodes; ++c) {
      values.at4[c].at[r] = (static_cast<float>(c) - 7.5f) * (scale[0].at[r] * args.steps[2]);
      values.base8[c].at[r] = (static_cast<float>(c) - 7.5f) * (args.hi * step8);
    }
  }
}

MOESTRO_INLINE void sign_values(const RoundArgs &args, const Lanes *scale, Values &values) {
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < 4; ++c) values.at2[c].at[r] = (static_cast<float>(c) - 1.5f) * (scale[0].at[r] * args.steps[0]);
    for (int c = 0; c < 8; ++c) values.at3[c].at[r] = values.at2[c >> 1].at[r] + (c & 1 ? scale[1].at[r] : -scale[1].at[r]);
    for (int c = 0; c < kCodes; ++c) {
      values.at4[c].at[r] = values.at3[c >> 1].at[r] + (c & 1 ? scale[2].at[r] : -scale[2].at[r]);
      values.base8[c].at[r] = values.at4[c].at[r];
    }
    values.fine.at[r] = scale[3].at[r];
  }
}

MOESTRO_INLINE void choose(const RoundArgs &args, const Lanes *target, const Values &values, Choice &choice) {
  Lanes inverse, cost;
  const float *p = args.priorities;
  for (int r = 0; r < kRows; ++r) {
    inverse.at[r] = values.fine.at[r] > 0.0f ? 1.0f / values.fine.at[r] : 0.0f;
    cost.at[r] = INFINITY;
  }
  for (int c = 0; c < kCodes; ++c) {
    for (int r = 0; r < kRows; ++r) {
      const float nibble = clamp_round((target[3].at[r] - values.base8[c].at[r]) * inverse.at[r] + 7.5f, 15.0f);
      const float value8 = values.base8[c].at[r] + values.fine.at[r] * (nibble - 7.5f);
      const float miss2 = target[0].at[r] - values.at2[c >> 2].at[r], miss3 = target[1].at[r] - values.at3[c >> 1].at[r];
      const float miss4 = target[2].at[r] - values.at4[c].at[r], miss8 = target[3].at[r] - value8;
      const float all = (p[0] * (miss2 * miss2) + p[1] * (miss3 * miss3)) + (p[2] * (miss4 * miss4) + p[3] * (miss8 * miss8));
      const bool better = all < cost.at[r];
      cost.at[r] = better ? all : cost.at[r];
      choice.code.at[r] = better ? static_cast<float>(c) : choice.code.at[r];
      choice.nibble.at[r] = better ? nibble : choice.nibble.at[r];
      choice.value[0].at[r] = better ? values.at2[c >> 2].at[r] : choice.value[0].at[r];
      choice.value[1].at[r] = better ? values.at3[c >> 1].at[r] : choice.value[1].at[r];
      choice.value[2].at[r] = better ? values.at4[c].at[r] : choice.value[2].at[r];
      choice.value[3].at[r] = better ? value8 : choice.value[3].at[r];
    }
  }
}

MOESTRO_INLINE const float *row_of(const RoundArgs &args, const float *values, int level, int64_t row) {
  return values + level * args.target_level_stride + row * args.target_row_stride;
}

// Rows [first, first + rows) of the block; `columns` targets of sixteen rows lie together in scratch.
void round_rows(const RoundArgs &args, int64_t first, int64_t rows, Lanes *targets) {
  const int64_t columns = args.columns;
  for (int b = 0; b < kLevels; ++b) {
    for (int64_t r = 0; r < kRows; ++r) {
      const float *row = row_of(args, args.targets, b, first + std::min(r, rows - 1));
      for (int64_t k = 0; k < columns; ++k) targets[b * columns + k].at[r] = row[k];
    }
  }
  Lanes target[kLevels], scale[kLevels];
  Values values;
  Choice choice{};
  for (int64_t k = 0; k < columns; ++k) {
    const int64_t group = args.group_of[k];
    for (int b = 0; b < kLevels; ++b) {
      target[b] = targets[b * columns + k];
      if (args.scales[b] == nullptr) continue;
      for (int64_t r = 0; r < kRows; ++r) scale[b].at[r] = args.scales[b][(first + std::min(r, rows - 1)) * args.groups + group];
    }
    if (args.signs) {
      sign_values(args, scale, values);
    } else {
      nested_values(args, scale, values);
    }
    choose(args, target, values, choice);
    for (int64_t r = 0; r < rows; ++r) {
      args.codes[(first + r) * columns + k] = static_cast<uint8_t>(choice.code.at[r]);
      args.nibbles[(first + r) * columns + k] = static_cast<uint8_t>(choice.nibble.at[r]);
    }
    if (args.pushes == nullptr) continue;
    const float *push = args.pushes + k * args.push_stride;
    for (int b = 0; b < kLevels; ++b) {
      Lanes error;
      for (int64_t r = 0; r < kRows; ++r) {
        error.at[r] = args.old_values == nullptr
                          ? (target[b].at[r] - choice.value[b].at[r]) / push[k]
                          : choice.value[b].at[r] - row_of(args, args.old_values, b, first + std::min(r, rows - 1))[k];
      }
      for (int64_t r = 0; r < rows; ++r) args.errors[(b * args.rows + first + r) * columns + k] = error.at[r];
      for (int64_t later = k + 1; later < columns; ++later) {
        Lanes &moved = targets[b * columns + later];
        for (int r = 0; r < kRows; ++r) moved.at[r] -= error.at[r] * push[later];
      }
    }
  }
}

void round_task(void *context, int64_t task, char *scratch) {
  const RoundArgs &args = *static_cast<const RoundArgs *>(context);
  const int64_t first = task * kRows;
  round_rows(args, first, std::min<int64_t>(kRows, args.rows - first), reinterpret_cast<Lanes *>(scratch));
}

// Sixteen columns at a time. Errors are counted in scales, so that they are as good for the smallest weights.
float scale_cost(const ScaleCostArgs &args, const float *weights, const float *importance, float scale, float middle) {
  const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  const float fine = args.steps[3] > 0.0f ? 1.0f / args.steps[3] : 0.0f;
  const float per_lo = args.lo > 0.0f ? 1.0f / args.lo : 0.0f;
  const float *p = args.priorities;
  Lanes sum{};
  for (int64_t k = 0; k < args.group; k += kRows) {
    for (int i = 0; i < kRows; ++i) {
      const float relative = (weights[k + i] - middle) * inverse;
      const float code = clamp_round(relative + 7.5f, 15.0f);
      const float code3 = std::floor(code * 0.5f), code2 = std::floor(code * 0.25f);
      const float nibble = clamp_round((relative * fine - args.hi * (code - 7.5f)) * per_lo + 7.5f, 15.0f);
      const float miss2 = relative - args.steps[0] * (code2 - 1.5f), miss3 = relative - args.steps[1] * (code3 - 3.5f);
      const float miss4 = relative - args.steps[2] * (code - 7.5f);
      const float miss8 = relative - args.steps[3] * (args.hi * (code - 7.5f) + args.lo * (nibble - 7.5f));
      const float low = p[0] * (miss2 * miss2) + p[1] * (miss3 * miss3);
      sum.at[i] += (low + (p[2] * (miss4 * miss4) + p[3] * (miss8 * miss8))) * importance[k + i];
    }
  }
  float total = 0.0f;
  for (int i = 0; i < kRows; ++i) total += sum.at[i];
  return total * (scale * scale);
}

void cost_task(void *context, int64_t row, char *) {
  const ScaleCostArgs &args = *static_cast<const ScaleCostArgs *>(context);
  const float *weights = args.weights + row * args.groups * args.group;
  for (int64_t t = 0; t < args.tries; ++t) {
    for (int64_t g = 0; g < args.groups; ++g) {
      const int64_t at = (t * args.rows + row) * args.groups + g;
      args.costs[at] = scale_cost(args, weights + g * args.group, args.importance + g * args.group, args.scales[at],
                                  args.middles[row * args.groups + g]);
    }
  }
}

} // namespace

void scale_costs(const ScaleCostArgs &args) {
  pool().run(args.rows, 0, true, cost_task, const_cast<ScaleCostArgs *>(&args));
}

void round_columns(const RoundArgs &args) {
  const size_t scratch = sizeof(Lanes) * kLevels * static_cast<size_t>(args.columns);
  pool().run((args.rows + kRows - 1) / kRows, scratch, true, round_task, const_cast<RoundArgs *>(&args));
}

} // namespace MOESTRO_ISA
} // namespace moestro
