// Sixteen rows at a time, one column after another.
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

// Compilers split these as the instruction set needs; every lane is computed by itself, so bits are the same on all.
typedef float Lanes __attribute__((vector_size(4 * kRows)));

// Nearest whole number (ties to even) of one between -2^22 and 2^22: adding 1.5 * 2^23 leaves no room for a fraction.
MOESTRO_INLINE Lanes whole(const Lanes &x) { return (x + 12582912.0f) - 12582912.0f; }

// From 0 to `most`; 0 for NaN.
MOESTRO_INLINE Lanes clamp_round(const Lanes &x, float most) {
  const Lanes zero{}, top = zero + most;
  const Lanes positive = x > zero ? x : zero;
  return whole(positive < top ? positive : top);
}

// Of whole numbers.
MOESTRO_INLINE Lanes half_down(const Lanes &x) { return whole(x * 0.5f - 0.25f); }
MOESTRO_INLINE Lanes quarter_down(const Lanes &x) { return whole(x * 0.25f - 0.375f); }

// What codes stand for, by the scales of one column's group.
struct Nested {
  Lanes step2, step3, step4, coarse, fine;

  MOESTRO_INLINE Nested(const RoundArgs &args, const Lanes *scale)
      : step2(scale[0] * args.steps[0]), step3(scale[0] * args.steps[1]), step4(scale[0] * args.steps[2]),
        coarse(args.hi * (scale[0] * args.steps[3])), fine(args.lo * (scale[0] * args.steps[3])) {}
  MOESTRO_INLINE Lanes at2(const Lanes &code2) const { return (code2 - 1.5f) * step2; }
  MOESTRO_INLINE Lanes at3(const Lanes &code3) const { return (code3 - 3.5f) * step3; }
  MOESTRO_INLINE Lanes at4(const Lanes &code) const { return (code - 7.5f) * step4; }
  MOESTRO_INLINE Lanes base8(const Lanes &code) const { return (code - 7.5f) * coarse; }
};

struct Signs {
  Lanes step2, sign3, sign4, fine;

  MOESTRO_INLINE Signs(const RoundArgs &args, const Lanes *scale)
      : step2(scale[0] * args.steps[0]), sign3(scale[1]), sign4(scale[2]), fine(scale[3]) {}
  MOESTRO_INLINE Lanes at2(const Lanes &code2) const { return (code2 - 1.5f) * step2; }
  MOESTRO_INLINE Lanes at3(const Lanes &code3) const {
    const Lanes code2 = half_down(code3), bit = code3 - (code2 + code2);
    return at2(code2) + (bit + bit - 1.0f) * sign3;
  }
  MOESTRO_INLINE Lanes at4(const Lanes &code) const {
    const Lanes code3 = half_down(code), bit = code - (code3 + code3);
    return at3(code3) + (bit + bit - 1.0f) * sign4;
  }
  MOESTRO_INLINE Lanes base8(const Lanes &code) const { return at4(code); }
};

struct Choice {
  Lanes code, nibble, value[kLevels];
};

template <class Values>
MOESTRO_INLINE void choose(const RoundArgs &args, const Lanes *target, const Values &values, Choice &choice) {
  const Lanes zero{}, inverse = values.fine > zero ? 1.0f / values.fine : zero;
  const float *p = args.priorities;
  Lanes low[kCodes / 2], cost = zero + INFINITY;
  for (int c = 0; c < kCodes / 2; ++c) {
    const Lanes miss2 = target[0] - values.at2(zero + static_cast<float>(c / 2));
    const Lanes miss3 = target[1] - values.at3(zero + static_cast<float>(c));
    low[c] = p[0] * (miss2 * miss2) + p[1] * (miss3 * miss3);
  }
  choice.code = choice.nibble = zero;
  for (int c = 0; c < kCodes; ++c) {
    const Lanes code = zero + static_cast<float>(c), base = values.base8(code);
    const Lanes nibble = clamp_round((target[3] - base) * inverse + 7.5f, 15.0f);
    const Lanes miss4 = target[2] - values.at4(code), miss8 = target[3] - (base + values.fine * (nibble - 7.5f));
    const Lanes all = low[c / 2] + (p[2] * (miss4 * miss4) + p[3] * (miss8 * miss8));
    const auto better = all < cost;
    cost = better ? all : cost;
    choice.code = better ? code : choice.code;
    choice.nibble = better ? nibble : choice.nibble;
  }
  choice.value[0] = values.at2(quarter_down(choice.code));
  choice.value[1] = values.at3(half_down(choice.code));
  choice.value[2] = values.at4(choice.code);
  choice.value[3] = values.base8(choice.code) + values.fine * (choice.nibble - 7.5f);
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
      for (int64_t k = 0; k < columns; ++k) targets[b * columns + k][r] = row[k];
    }
  }
  Lanes target[kLevels], scale[kLevels]{};
  Choice choice{};
  for (int64_t k = 0; k < columns; ++k) {
    const int64_t group = args.group_of[k];
    for (int b = 0; b < kLevels; ++b) {
      target[b] = targets[b * columns + k];
      if (args.scales[b] == nullptr) continue;
      for (int64_t r = 0; r < kRows; ++r) scale[b][r] = args.scales[b][(first + std::min(r, rows - 1)) * args.groups + group];
    }
    if (args.signs) {
      choose(args, target, Signs(args, scale), choice);
    } else {
      choose(args, target, Nested(args, scale), choice);
    }
    for (int64_t r = 0; r < rows; ++r) {
      args.codes[(first + r) * columns + k] = static_cast<uint8_t>(choice.code[r]);
      args.nibbles[(first + r) * columns + k] = static_cast<uint8_t>(choice.nibble[r]);
    }
    const float *push = args.pushes + k * args.push_stride;
    for (int b = 0; b < args.pushed; ++b) {
      Lanes before{};
      for (int64_t r = 0; r < rows; ++r) before[r] = row_of(args, args.before, b, first + r)[k];
      const Lanes change = choice.value[b] - before;
      for (int64_t r = 0; r < rows; ++r) args.changes[(b * args.rows + first + r) * columns + k] = change[r];
      for (int64_t later = k + 1; later < columns; ++later) targets[b * columns + later] -= change * push[later];
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
    Lanes weight, matters;
    std::memcpy(&weight, weights + k, sizeof weight);
    std::memcpy(&matters, importance + k, sizeof matters);
    const Lanes relative = (weight - middle) * inverse;
    const Lanes code = clamp_round(relative + 7.5f, 15.0f);
    const Lanes nibble = clamp_round((relative * fine - args.hi * (code - 7.5f)) * per_lo + 7.5f, 15.0f);
    const Lanes miss2 = relative - args.steps[0] * (quarter_down(code) - 1.5f);
    const Lanes miss3 = relative - args.steps[1] * (half_down(code) - 3.5f);
    const Lanes miss4 = relative - args.steps[2] * (code - 7.5f);
    const Lanes miss8 = relative - args.steps[3] * (args.hi * (code - 7.5f) + args.lo * (nibble - 7.5f));
    const Lanes low = p[0] * (miss2 * miss2) + p[1] * (miss3 * miss3);
    sum += (low + (p[2] * (miss4 * miss4) + p[3] * (miss8 * miss8))) * matters;
  }
  float total = 0.0f;
  for (int i = 0; i < kRows; ++i) total += sum[i];
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
