// Linear maps from quantised weights, on activations that are quantised once and then used by any number of matrices.
//
// Numbers. A row of activations is cut into groups; a group has int8 codes a and a scale sx = max|x| / 127. The dot
// product of a group's codes is an exact integer, and groups are added in ascending order with fused multiply-adds:
//   D' = 2 * sum(code * a) - (2^bits - 1) * sum(a)
//   acc = fma(s, float(D') * (sx * kh), acc);  acc = fma(m, sx * float(sum(a)), acc);   out = acc * u + bias
// with s and m the fp16 scale and middle of the weights' group, u and kh constants of the matrix. Every instruction
// set, thread count and number of rows gives the same bits. A group with NaN or infinity makes its row's outputs NaN.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moestro {

// What the codes of a group of activations have in common.
struct GroupScale {
  float scale;   // sx
  float sum;     // sx * float(codes)
  int32_t codes; // the sum of the codes
};

// Rows of quantised activations: codes [rows, columns] and scales [rows, columns / group]. `columns` is padded (with
// zeros) to whole groups.
struct QuantisedRows {
  int8_t *codes;
  GroupScale *scales;
  int64_t rows, columns;
  int32_t group;
};

// Bytes that quantised rows take, and such memory (64-byte aligned) as quantised rows.
size_t quantised_bytes(int64_t rows, int64_t columns, int32_t group);
QuantisedRows quantised_view(void *memory, int64_t rows, int64_t columns, int32_t group);

// Quantises x [out.rows, columns] (rows `stride` floats apart; columns as before padding) on the pool.
void quantise(const float *x, int64_t stride, int64_t columns, const QuantisedRows &out);

enum class Encoding : int32_t { nested = 0, signs = 1, flat8 = 2, flat4 = 3, flat2 = 4, flat1 = 5 };

// Bits of a flat matrix's codes; 0 of a chain of planes.
constexpr int32_t flat_bits(Encoding encoding) {
  switch (encoding) {
  case Encoding::flat8: return 8;
  case Encoding::flat4: return 4;
  case Encoding::flat2: return 2;
  case Encoding::flat1: return 1;
  default: return 0;
  }
}

constexpr int kPlanes = 4;

// A matrix [rows, columns] at one level (2, 3, 4, 8; of a flat matrix its bits). regions[p] is its place in plane p of
// its chain, null where the level needs none.
struct PackedMatrix {
  Encoding encoding;
  int32_t level;
  int32_t group;
  int64_t rows, columns;
  const uint8_t *regions[kPlanes];
};

// Input channels whose values are kept in fp16 beside a matrix's codes, [tiles of the matrix, count, rows of a tile]. To
// a row's result (after the unit) they are added in the order given: t = fma(sx * float(a), value, t), with a the code of
// that channel's activation and sx the scale of its group.
struct Salient {
  const int32_t *ids;
  const uint8_t *values;
  int64_t count;
};

// y[t, n] = dot(x[t], row n of matrix) + bias[n]; x is quantised in the matrix's groups. Where it is a delta, with its
// salient channels, it comes to what is there: y = (y + dot) + bias.
struct PackedLinear {
  PackedMatrix matrix;
  QuantisedRows x;
  const float *bias; // null: none
  float *y;          // rows `y_stride` floats apart
  int64_t y_stride;
  const Salient *delta = nullptr; // null: no delta
};

// Computes several linear maps (the projections of one layer) as one job of the pool.
void packed_linear(const PackedLinear *linears, int64_t count);

} // namespace moestro
