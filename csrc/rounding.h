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
  const float *root;       // [columns, columns] upper triangular, row stride below; null: errors are not compensated
  int64_t root_stride;
  float *errors; // [kLevels, rows, columns], contiguous: what is to be pushed into later columns; unused without root
  uint8_t *codes, *nibbles; // [rows, columns], contiguous
  float steps[kLevels];     // of the levels, in scales
  float priorities[kLevels]; // weights of the levels' squared errors in the choice
  float hi, lo;
  bool signs; // planes of residual signs instead of nested integers
  int64_t rows, columns;
};

} // namespace moestro
