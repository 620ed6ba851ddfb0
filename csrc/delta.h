// What a fine-tune adds to a matrix of its base: flat codes for all input channels, a few channels in fp16 that come on
// top, and maybe the difference of the biases (src/moestro/quant/delta.py says how the bytes lie).
//
// y = (y + dot) + bias, where dot is as in packed.h, salient channels included. A row gets the same bits whatever the
// other rows, the instruction set and the number of threads.
#pragma once

#include "packed.h"

namespace moestro {

// A delta's parts at byte offsets from its address; its codes are at the address itself.
struct DeltaShape {
  Encoding encoding; // flat
  int64_t rows, columns;
  int32_t group;
  int64_t salient, ids, values;
  int64_t bias; // negative: none
};

struct Delta {
  PackedMatrix matrix;
  Salient salient;
  const float *bias; // null: none
};

// Throws std::invalid_argument when the encoding is not flat or the group unknown.
DeltaShape checked(const DeltaShape &shape);

Delta delta_at(const DeltaShape &shape, const uint8_t *address);

// As a linear map that adds to y. `delta` has to outlive it.
PackedLinear linear_of(const Delta &delta, const QuantisedRows &x, float *y, int64_t y_stride);

// out [rows, columns], contiguous: what the bytes stand for.
void unpack_delta(const Delta &delta, float *out);
// out [count, columns] += rows ids of the delta. Throws std::invalid_argument when an id is not a row.
void add_delta_rows(const Delta &delta, const int64_t *ids, int64_t count, float *out);

} // namespace moestro
