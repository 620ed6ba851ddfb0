#include "unpack.h"

#include <cstring>
#include <stdexcept>
#include <string>

#include "packed_tasks.h"
#include "simd.h"
#include "thread_pool.h"

namespace moestro {
namespace {

using MOESTRO_ISA::Float16;
using MOESTRO_ISA::to_float;

constexpr int64_t kRowBytes = kTile * int64_t{sizeof(uint16_t)};
constexpr int64_t kLeastParallelValues = 1 << 14;

struct Constants {
  float unit, kh[kPlanes], high, low;
};

float half_at(const uint8_t *p, int64_t row) {
  Float16 half;
  std::memcpy(&half, p + row * int64_t{sizeof half}, sizeof half);
  return to_float(half);
}

// Bits of one code, at byte 4 * row + column % 4 of a chunk. `shift` is where it begins.
struct Place {
  int64_t chunk;
  int shift;
};

Place place_of(int bits, int64_t column) {
  const int64_t quad = column / 4;
  switch (bits) {
  case 1: return {quad / 8, static_cast<int>(2 * (quad % 4) + quad % 8 / 4)};
  case 2: return {quad / 4, static_cast<int>(2 * (quad % 4))};
  case 4: return {quad / 2, static_cast<int>(4 * (quad % 2))};
  default: return {quad, 0};
  }
}

// One row of one group: reads codes and scales plane by plane.
class GroupReader {
public:
  GroupReader(const PackedMatrix &matrix, int64_t row, int64_t group)
      : matrix_(matrix), tile_(row / kTile), row_(row % kTile), group_(group) {}

  int base_bits() const {
    const int bits = flat_bits(matrix_.encoding);
    return bits == 0 ? 2 : bits;
  }
  float scale() const { return half_at(base(), row_); }
  float middle() const { return half_at(base() + kRowBytes, row_); }
  int base_code(int64_t column) const { return code(base() + 2 * kRowBytes, base_bits(), column); }
  // Of a higher plane.
  float scale(int plane) const { return half_at(tile_start(plane) + group_ * kRowBytes, row_); }
  int code(int plane, int64_t column) const {
    const int64_t bytes = matrix_.group * plane_bits(plane) * 2;
    return code(tile_start(plane) + scale_bytes() + group_ * bytes, plane_bits(plane), column);
  }

private:
  static int plane_bits(int plane) { return plane == 3 ? 4 : 1; }
  int64_t scale_bytes() const {
    return matrix_.encoding == Encoding::signs ? rounded_up(groups_of(matrix_) * kRowBytes, 64) : 0;
  }
  const uint8_t *base() const {
    const int64_t bytes = 2 * kRowBytes + matrix_.group * base_bits() * 2;
    return matrix_.regions[0] + kHeader + (tile_ * groups_of(matrix_) + group_) * bytes;
  }
  const uint8_t *tile_start(int plane) const {
    return matrix_.regions[plane] +
           tile_ * (scale_bytes() + groups_of(matrix_) * matrix_.group * plane_bits(plane) * 2);
  }
  int code(const uint8_t *chunks, int bits, int64_t column) const {
    const Place place = place_of(bits, column);
    return chunks[place.chunk * 64 + 4 * row_ + column % 4] >> place.shift & ((1 << bits) - 1);
  }

  const PackedMatrix &matrix_;
  int64_t tile_, row_, group_;
};

// A code's distance from the middle in units of the scale.
float nested_offset(const GroupReader &reader, const Constants &constants, int level, int64_t column) {
  int code = reader.base_code(column);
  if (level >= 3) code = 2 * code + reader.code(1, column);
  if (level >= 4) code = 2 * code + reader.code(2, column);
  if (level < 8) return 2.0f * constants.kh[level - 2] * (static_cast<float>(code) - ((1 << level) - 1) * 0.5f);
  const float low = static_cast<float>(reader.code(3, column)) - 7.5f;
  return 2.0f * constants.kh[3] * (constants.high * (static_cast<float>(code) - 7.5f) + constants.low * low);
}

float flat_offset(const GroupReader &reader, const Constants &constants, int64_t column) {
  const int code = reader.base_code(column);
  const int bits = reader.base_bits();
  const float centred = bits == 8 ? static_cast<float>(static_cast<int8_t>(code)) + 0.5f
                                  : static_cast<float>(code) - static_cast<float>((1 << bits) - 1) * 0.5f;
  return 2.0f * constants.kh[0] * centred;
}

float sign_of(const GroupReader &reader, int plane, int64_t column) {
  return reader.scale(plane) * static_cast<float>(2 * reader.code(plane, column) - 1);
}

float value_of(const PackedMatrix &matrix, const GroupReader &reader, const Constants &constants, int64_t column) {
  const bool flat = flat_bits(matrix.encoding) != 0;
  const bool signs = matrix.encoding == Encoding::signs;
  const float offset = flat ? flat_offset(reader, constants, column)
                            : nested_offset(reader, constants, signs ? 2 : matrix.level, column);
  float value = reader.middle() + reader.scale() * offset;
  if (signs && matrix.level >= 3) value += sign_of(reader, 1, column);
  if (signs && matrix.level >= 4) value += sign_of(reader, 2, column);
  if (signs && matrix.level >= 8) value += reader.scale(3) * (static_cast<float>(reader.code(3, column)) - 7.5f);
  return constants.unit * value;
}

Constants constants_of(const PackedMatrix &matrix) {
  Constants constants;
  static_assert(sizeof constants == 7 * sizeof(float));
  std::memcpy(&constants, matrix.regions[0], sizeof constants);
  return constants;
}

void write_row(const PackedMatrix &matrix, const Constants &constants, int64_t row, float *out) {
  for (int64_t k = 0; k < matrix.columns; ++k) {
    const GroupReader reader(matrix, row, k / matrix.group);
    out[k] = value_of(matrix, reader, constants, k % matrix.group);
  }
}

struct RowsJob {
  const PackedMatrix *matrix;
  Constants constants;
  const int64_t *ids; // null: all rows in order
  float *out;
};

void row_task(void *context, int64_t i, char *) {
  const RowsJob &job = *static_cast<const RowsJob *>(context);
  write_row(*job.matrix, job.constants, job.ids == nullptr ? i : job.ids[i], job.out + i * job.matrix->columns);
}

void run(const PackedMatrix &matrix, const int64_t *ids, int64_t count, float *out) {
  RowsJob job{&matrix, constants_of(matrix), ids, out};
  pool().run(count, 0, count * matrix.columns >= kLeastParallelValues, row_task, &job);
}

} // namespace

void unpack(const PackedMatrix &matrix, float *out) { run(matrix, nullptr, matrix.rows, out); }

void unpack_row(const PackedMatrix &matrix, int64_t row, float *out) {
  write_row(matrix, constants_of(matrix), row, out);
}

void check_rows(const char *what, const int64_t *ids, int64_t count, int64_t rows) {
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] >= 0 && ids[i] < rows) continue;
    throw std::invalid_argument(std::string(what) + ": id " + std::to_string(ids[i]) + " is not in [0, " +
                                std::to_string(rows) + ")");
  }
}

void unpack_rows(const PackedMatrix &matrix, const int64_t *ids, int64_t count, float *out) {
  check_rows("packed_rows", ids, count, matrix.rows);
  run(matrix, ids, count, out);
}

} // namespace moestro
