#include "delta.h"

#include <cstring>
#include <stdexcept>
#include <vector>

#include "packed_tasks.h"
#include "simd.h"
#include "thread_pool.h"
#include "unpack.h"

namespace moestro {
namespace {

constexpr int64_t kLeastParallelValues = 1 << 14;

void add_salient(const Salient &salient, int64_t row, float *out) {
  for (int64_t c = 0; c < salient.count; ++c) {
    MOESTRO_ISA::Float16 value;
    const int64_t place = (row / kTile * salient.count + c) * kTile + row % kTile;
    std::memcpy(&value, salient.values + place * int64_t{sizeof value}, sizeof value);
    out[salient.ids[c]] += MOESTRO_ISA::to_float(value);
  }
}

struct RowsJob {
  const Delta *delta;
  const int64_t *ids;
  float *out;
  int64_t columns;
};

void add_row(void *context, int64_t i, char *scratch) {
  const RowsJob &job = *static_cast<const RowsJob *>(context);
  float *row = reinterpret_cast<float *>(scratch), *out = job.out + i * job.columns;
  unpack_row(job.delta->matrix, job.ids[i], row);
  add_salient(job.delta->salient, job.ids[i], row);
  for (int64_t k = 0; k < job.columns; ++k) out[k] += row[k];
}

} // namespace

DeltaShape checked(const DeltaShape &shape) {
  if (flat_bits(shape.encoding) == 0) throw std::invalid_argument("delta: its codes are not flat");
  if (shape.group != 32 && shape.group != 64 && shape.group != 128) {
    throw std::invalid_argument("delta: its codes have an unknown group");
  }
  return shape;
}

Delta delta_at(const DeltaShape &shape, const uint8_t *address) {
  Delta delta{{shape.encoding, flat_bits(shape.encoding), shape.group, shape.rows, shape.columns, {address}}, {}, nullptr};
  delta.salient = {reinterpret_cast<const int32_t *>(address + shape.ids), address + shape.values, shape.salient};
  if (shape.bias >= 0) delta.bias = reinterpret_cast<const float *>(address + shape.bias);
  return delta;
}

PackedLinear linear_of(const Delta &delta, const QuantisedRows &x, float *y, int64_t y_stride) {
  return {delta.matrix, x, delta.bias, y, y_stride, &delta.salient};
}

void unpack_delta(const Delta &delta, float *out) {
  unpack(delta.matrix, out);
  for (int64_t n = 0; n < delta.matrix.rows; ++n) add_salient(delta.salient, n, out + n * delta.matrix.columns);
}

void add_delta_rows(const Delta &delta, const int64_t *ids, int64_t count, float *out) {
  check_rows("add_delta_rows", ids, count, delta.matrix.rows);
  RowsJob job{&delta, ids, out, delta.matrix.columns};
  const auto scratch = static_cast<size_t>(job.columns) * sizeof(float);
  pool().run(count, scratch, count * job.columns >= kLeastParallelValues, add_row, &job);
}

} // namespace moestro
