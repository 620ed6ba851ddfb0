// Eight rows at a time, one column after another.
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

constexpr int kRows = 8;
constexpr int kCodes = 16;
constexpr int kPieces = 2;

// What AVX2 has in one register: compilers split these well where registers are smaller, and badly where these are
// larger (16 lanes were built one by one in memory). Every lane is computed by itself, so bits are the same on all.
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

  MOESTRO_INLINE Nested(const CodeRule &rule, const Lanes *scale)
      : step2(scale[0] * rule.steps[0]), step3(scale[0] * rule.steps[1]), step4(scale[0] * rule.steps[2]),
        coarse(rule.hi * (scale[0] * rule.steps[3])), fine(rule.lo * (scale[0] * rule.steps[3])) {}
  MOESTRO_INLINE Lanes at2(const Lanes &code2) const { return (code2 - 1.5f) * step2; }
  MOESTRO_INLINE Lanes at3(const Lanes &code3) const { return (code3 - 3.5f) * step3; }
  MOESTRO_INLINE Lanes at4(const Lanes &code) const { return (code - 7.5f) * step4; }
  MOESTRO_INLINE Lanes base8(const Lanes &code) const { return (code - 7.5f) * coarse; }
};

struct Signs {
  Lanes step2, sign3, sign4, fine;

  MOESTRO_INLINE Signs(const CodeRule &rule, const Lanes *scale)
      : step2(scale[0] * rule.steps[0]), sign3(scale[1]), sign4(scale[2]), fine(scale[3]) {}
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
MOESTRO_INLINE void choose(const CodeRule &rule, const Lanes *target, const Values &values, Choice &choice) {
  const Lanes zero{}, inverse = values.fine > zero ? 1.0f / values.fine : zero;
  const float *p = rule.priorities;
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

// The best code of one column for rows from `first` on; the last of the 8 is taken again where there are fewer.
MOESTRO_INLINE void choose_column(const CodeRule &rule, int64_t group, int64_t first, int64_t rows, const Lanes *target,
                                  Choice &choice) {
  Lanes scale[kLevels]{};
  for (int b = 0; b < kLevels; ++b) {
    if (rule.scales[b] == nullptr) continue;
    for (int64_t r = 0; r < kRows; ++r) {
      scale[b][r] = rule.scales[b][(first + std::min(r, rows - 1)) * rule.groups + group];
    }
  }
  if (rule.signs) {
    choose(rule, target, Signs(rule, scale), choice);
  } else {
    choose(rule, target, Nested(rule, scale), choice);
  }
}

// Lanes of `columns` columns from rows that follow each other at `stride`.
MOESTRO_INLINE void gather(const float *values, int64_t stride, int64_t rows, int64_t columns, Lanes *lanes) {
  for (int64_t r = 0; r < kRows; ++r) {
    const float *row = values + std::min(r, rows - 1) * stride;
    for (int64_t k = 0; k < columns; ++k) lanes[k][r] = row[k];
  }
}

MOESTRO_INLINE void scatter(const Lanes *lanes, int64_t stride, int64_t rows, int64_t columns, float *values) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < columns; ++k) values[r * stride + k] = lanes[k][r];
  }
}

MOESTRO_INLINE void put_codes(const Choice &choice, int64_t stride, int64_t rows, uint8_t *codes, uint8_t *nibbles) {
  for (int64_t r = 0; r < rows; ++r) {
    codes[r * stride] = static_cast<uint8_t>(choice.code[r]);
    nibbles[r * stride] = static_cast<uint8_t>(choice.nibble[r]);
  }
}

MOESTRO_INLINE bool is_zero(const Lanes &lanes) {
  const Lanes zero{};
  return std::memcmp(&lanes, &zero, sizeof lanes) == 0;
}

// Rows [first, first + rows) of the block; `columns` targets of these rows lie together in scratch.
void round_rows(const RoundArgs &args, int64_t first, int64_t rows, Lanes *targets) {
  const int64_t columns = args.columns, row_stride = args.target_row_stride;
  const auto row_of = [&](const float *values, int level, int64_t row) {
    return values + level * args.target_level_stride + row * row_stride;
  };
  for (int b = 0; b < kLevels; ++b) {
    gather(row_of(args.targets, b, first), row_stride, rows, columns, targets + b * columns);
  }
  Lanes target[kLevels];
  Choice choice{};
  for (int64_t k = 0; k < columns; ++k) {
    for (int b = 0; b < kLevels; ++b) target[b] = targets[b * columns + k];
    choose_column(args.rule, args.group_of[k], first, rows, target, choice);
    put_codes(choice, columns, rows, args.codes + first * columns + k, args.nibbles + first * columns + k);
    const float *push = args.pushes + k * args.push_stride;
    for (int b = 0; b < args.pushed; ++b) {
      Lanes before;
      gather(row_of(args.before, b, first) + k, row_stride, rows, 1, &before);
      const Lanes change = choice.value[b] - before;
      scatter(&change, columns, rows, 1, args.changes + (b * args.rows + first) * columns + k);
      for (int64_t later = k + 1; later < columns; ++later) targets[b * columns + later] -= change * push[later];
    }
  }
}

// Rows [first, first + rows). Few codes change, so what a change does to the other columns is looked at only then.
void descend_rows(const DescentArgs &args, int64_t first, int64_t rows, Lanes *scratch) {
  const int64_t columns = args.columns, start = first * columns;
  Lanes *values = scratch, *downhill = scratch + args.pushed * columns;
  for (int b = 0; b < args.pushed; ++b) {
    gather(args.values + b * args.values_stride + start, columns, rows, columns, values + b * columns);
    gather(args.downhill + b * args.downhill_stride + start, columns, rows, columns, downhill + b * columns);
  }
  Lanes target[kLevels]{};
  Choice choice{};
  for (int64_t k = 0; k < columns; ++k) {
    const float *curvature = args.hessian + k * columns;
    for (int b = 0; b < args.pushed; ++b) {
      target[b] = values[b * columns + k] + downhill[b * columns + k] / curvature[k];
    }
    for (int b = args.pushed; b < kLevels; ++b) {
      gather(args.aims + b * args.aims_stride + start + k, columns, rows, 1, target + b);
    }
    choose_column(args.rule, args.group_of[k], first, rows, target, choice);
    put_codes(choice, columns, rows, args.codes + start + k, args.nibbles + start + k);
    for (int b = 0; b < args.pushed; ++b) {
      const Lanes change = choice.value[b] - values[b * columns + k];
      if (is_zero(change)) continue;
      values[b * columns + k] = choice.value[b];
      Lanes *row = downhill + b * columns;
      for (int64_t other = 0; other < columns; ++other) row[other] -= change * curvature[other];
    }
  }
  for (int b = 0; b < args.pushed; ++b) {
    scatter(values + b * columns, columns, rows, columns, args.values + b * args.values_stride + start);
    scatter(downhill + b * columns, columns, rows, columns, args.downhill + b * args.downhill_stride + start);
  }
}

template <class Args, void (*work)(const Args &, int64_t, int64_t, Lanes *)>
void eight_rows(void *context, int64_t task, char *scratch) {
  const Args &args = *static_cast<const Args *>(context);
  const int64_t first = task * kRows;
  work(args, first, std::min<int64_t>(kRows, args.rows - first), reinterpret_cast<Lanes *>(scratch));
}

// Sixteen columns at a time, in pieces of eight with sums of their own. Errors are counted in scales, so that they are
// as good for the smallest weights.
float scale_cost(const ScaleCostArgs &args, const float *weights, const float *importance, float scale, float middle) {
  const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  const float fine = args.steps[3] > 0.0f ? 1.0f / args.steps[3] : 0.0f;
  const float per_lo = args.lo > 0.0f ? 1.0f / args.lo : 0.0f;
  const float *p = args.priorities;
  Lanes sums[kPieces]{};
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
    sums[k / kRows % kPieces] += (low + (p[2] * (miss4 * miss4) + p[3] * (miss8 * miss8))) * matters;
  }
  float total = 0.0f;
  for (const Lanes &sum : sums) {
    for (int i = 0; i < kRows; ++i) total += sum[i];
  }
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
  run_here(args.rows, 0, cost_task, const_cast<ScaleCostArgs *>(&args));
}

void round_columns(const RoundArgs &args) {
  const size_t scratch = sizeof(Lanes) * kLevels * static_cast<size_t>(args.columns);
  run_here((args.rows + kRows - 1) / kRows, scratch, eight_rows<RoundArgs, round_rows>, const_cast<RoundArgs *>(&args));
}

void descend(const DescentArgs &args) {
  const size_t scratch = sizeof(Lanes) * 2 * static_cast<size_t>(args.pushed) * static_cast<size_t>(args.columns);
  run_here((args.rows + kRows - 1) / kRows, scratch, eight_rows<DescentArgs, descend_rows>,
           const_cast<DescentArgs *>(&args));
}

} // namespace MOESTRO_ISA
} // namespace moestro
