// Rounding of weights to codes that are good at several levels at once (see moestro/quant/rounding.py).
#pragma once

#include <cstdint>

namespace moestro {

constexpr int kLevels = 4; // 2, 3, 4 and 8 bits

// One block of columns, in the order in which they are rounded. Strides count elements.
struct RoundArgs {
  const float *targets; // [kLevels, rows, columns]: distance of what each level aims at from the middle of its group
  int64_t target_level_stride, target_row_stride;
  const float *scales[kLevels]; // [rows, groups]; nested codes use the first, sign planes one for each plane
  int64_t groups;
  const int32_t *group_of; // [columns]
  // How an error in one column moves the targets of later ones: [columns, columns], row stride below; null: not at all.
  const float *pushes;
  int64_t push_stride;
  // Values that the codes stand for now, strides as targets'. Null: an error is (target - new value) / pushes[k, k], as in
  // GPTQ; else it is (new - old value), as in coordinate descent.
  const float *old_values;
  float *errors; // [kLevels, rows, columns], contiguous: what is to be pushed into later blocks; unused without pushes
  uint8_t *codes, *nibbles; // [rows, columns], contiguous
  float steps[kLevels];     // of the levels, in scales
  float priorities[kLevels]; // weights of the levels' squared errors in the choice
  float hi, lo;
  bool signs; // planes of residual signs instead of nested integers
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
