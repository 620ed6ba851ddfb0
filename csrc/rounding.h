// Rounding of weights to codes that are good at several levels at once (see moestro/quant/rounding.py).
#pragma once

#include <cstdint>

namespace moestro {

constexpr int kLevels = 4; // 2, 3, 4 and 8 bits

// What codes stand for, and how much an error matters at each level.
struct CodeRule {
  const float *scales[kLevels]; // [rows, groups]; nested codes use the first, sign planes one for each plane
  int64_t groups;
  float steps[kLevels];      // of the levels, in scales
  float priorities[kLevels]; // weights of the levels' squared errors in the choice
  float hi, lo;
  bool signs; // planes of residual signs instead of nested integers
};

// One block of columns, in the order in which they are rounded. Strides count elements.
struct RoundArgs {
  CodeRule rule;
  const float *targets; // [kLevels, rows, columns]: distance of what each level aims at from the middle of its group
  int64_t target_level_stride, target_row_stride;
  const int32_t *group_of; // [columns]
  // Of so many levels, the first, changes move the targets of later columns: by -pushes[k, later] for one in column k.
  int pushed;
  const float *pushes; // [columns, columns], row stride below; unused (as what follows) where nothing is pushed
  int64_t push_stride;
  const float *before; // what changes are counted from, strides as targets'
  float *changes;      // [pushed, rows, columns], contiguous: the new values less those before
  uint8_t *codes, *nibbles; // [rows, columns], contiguous
  int64_t rows, columns;
};

// Codes of whole rows that are chosen again, one column after another, all others given. Rows are contiguous.
struct DescentArgs {
  CodeRule rule;
  const int32_t *group_of; // [columns]
  int pushed;              // of so many levels, the first, errors have a part in other columns
  const float *hessian;    // [columns, columns]
  const float *aims;       // [kLevels, rows, columns], used where nothing is pushed
  float *values;           // [pushed, rows, columns]: what codes stand for, before and after
  float *downhill;         // [pushed, rows, columns]: half of what the cost falls by as a value grows, before and after
  int64_t aims_stride, values_stride, downhill_stride; // from one level to the next, in elements
  uint8_t *codes, *nibbles; // [rows, columns]
  int64_t rows, columns;
};

// What it would cost to round every group of every row with each of a few scales.
struct ScaleCostArgs {
  const float *weights;    // [rows, groups * group], contiguous
  const float *importance; // [groups * group]
  const float *scales;     // [tries, rows, groups]
  const float *middles;    // [rows, groups]
  float *costs;            // [tries, rows, groups]
  float steps[kLevels], priorities[kLevels];
  float hi, lo;
  int64_t tries, rows, groups, group; // group is a multiple of 16
};

} // namespace moestro
