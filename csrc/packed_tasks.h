// What one task of a quantised linear map does; each instruction set has its own version (see packed.h for the
// numbers).
#pragma once

#include "packed.h"

namespace moestro {

constexpr int kTile = 16;         // rows of a matrix that lie and are computed together
constexpr int64_t kHeader = 64;   // bytes of constants before the first tile
constexpr int64_t kMostRows = 64; // rows of activations in one task
constexpr int64_t kWidestGroup = 128;

constexpr int64_t parts_of(int64_t total, int64_t part) { return (total + part - 1) / part; }
constexpr int64_t rounded_up(int64_t value, int64_t step) { return parts_of(value, step) * step; }

inline int64_t groups_of(const PackedMatrix &matrix) { return parts_of(matrix.columns, matrix.group); }
inline int64_t tiles_of(const PackedMatrix &matrix) { return parts_of(matrix.rows, kTile); }

// out[t][n - first_row] = dot(row t, row n of the matrix) + bias[n] for all rows n of tiles [first, end). Of a delta:
// out = (out + dot) + bias, where salient channels are a part of dot.
struct TileTask {
  const PackedMatrix *matrix;
  const float *bias; // null: none
  const Salient *delta = nullptr; // null: no delta
  int64_t first, end, first_row;
  int64_t count; // 1 to kMostRows
  const int8_t *codes[kMostRows];
  const GroupScale *scales[kMostRows];
  float *out[kMostRows];
};

enum class ActivationName : int32_t { silu, gelu, gelu_tanh, gelu_quick, relu, relu2, sigmoid, clamped_swiglu };

// none: act(up). halves, interleaved: act(gate) * up, where the gate is another array or every other element.
enum class Gate : int32_t { none = 0, halves = 1, interleaved = 2 };

struct Activation {
  ActivationName name;
  Gate gate;
  float alpha, limit;
};

struct PackedTable {
  void (*tiles)(const TileTask &task);
  // One row: codes and scales of all its groups, the last one filled up with zeros.
  void (*quantise)(const float *x, int64_t columns, int32_t group, int8_t *codes, GroupScale *scales);
  // out[i] for i < count; writes up to the next multiple of 8. `gate` is null or apart from `up` (halves).
  void (*activate)(const Activation &activation, const float *gate, const float *up, int64_t count, float *out);
};

#define MOESTRO_DECLARE_PACKED(isa)                                                                                    \
  namespace isa {                                                                                                      \
  void packed_tiles(const TileTask &task);                                                                             \
  void quantise_row(const float *x, int64_t columns, int32_t group, int8_t *codes, GroupScale *scales);                \
  void activate(const Activation &activation, const float *gate, const float *up, int64_t count, float *out);          \
  }
MOESTRO_DECLARE_PACKED(scalar)
MOESTRO_DECLARE_PACKED(avx2)
MOESTRO_DECLARE_PACKED(avx512vnni)
MOESTRO_DECLARE_PACKED(neon)
#undef MOESTRO_DECLARE_PACKED

} // namespace moestro
