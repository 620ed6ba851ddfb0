// What a decoder layer does between its matrices: norms, rotation, routing. Every function works row by row, each
// element by one fixed order of fp32 operations, so a row's result depends on nothing but itself.
#pragma once

#include "kernels.h"

namespace moestro {

// y = x / sqrt(mean of squares + eps) * weight, over groups of `width` elements of a row.
struct Norm {
  const float *weight; // [width]; null: no norm
  int64_t width;
  float eps;
};

// residual[pick[i]] += delta[pick[i]] (where there is a delta), then out[i] = its norm. `out` may be `delta`.
struct AddNormArgs {
  float *residual;
  const float *delta; // null: nothing to add
  const int64_t *pick; // null: rows as they are
  Norm norm;
  float *out;
  int64_t rows;
};

// Where a row's keys and values go: their places are found through the block table.
struct KvTarget {
  float *data;
  int64_t block_stride, head_stride, position_stride;
};

// Norms, limits and rotates queries in place, and puts keys and values into the cache.
struct QkvArgs {
  float *q, *k, *v; // [rows, heads, head_dim], keys and values [rows, heads_kv, head_dim]
  int64_t rows, heads, heads_kv, head_dim;
  Norm q_norm, k_norm; // `width` is a head's or a whole row's
  float clip;          // infinity: none
  const float *cos, *sin; // [positions, head_dim / 2]; element i turns elements i and i + head_dim / 2 of a head
  KvTarget keys, values;
  const int32_t *block_table; // [sequences, max_blocks]
  const int32_t *row_sequence, *row_position;
  int64_t max_blocks, block_size;
};

enum class Routing : int {
  softmax_then_pick = 0,           // probabilities of the picked, as they are
  softmax_then_pick_and_scale = 1, // divided by their sum
  pick_then_softmax = 2,           // softmax of the picked logits
};

// Picks the greatest `picks` of each row's experts, greatest first, of equals the first. `logits` are overwritten.
struct RouteArgs {
  float *logits; // [rows, experts]
  int64_t rows, experts, picks;
  Routing routing;
  int64_t *ids;   // [rows, picks]
  float *weights; // [rows, picks]
};

// gate = silu(gate) * up
struct GateArgs {
  float *gate;
  const float *up;
  int64_t rows, width;
};

// residual += sigmoid(scale) * x, or just x
struct AddScaledArgs {
  float *residual;
  const float *x;
  const float *scale; // [rows], before the sigmoid; null: 1
  int64_t rows, width;
};

// out[i] = table[ids[i]] in fp32
struct EmbedArgs {
  const void *table;
  DType type;
  const int64_t *ids;
  float *out;
  int64_t rows, width;
};

struct RowTable {
  void (*embed)(const EmbedArgs &);
  void (*add_norm)(const AddNormArgs &);
  void (*place_qkv)(const QkvArgs &);
  void (*route)(const RouteArgs &);
  void (*gate)(const GateArgs &);
  void (*add_scaled)(const AddScaledArgs &);
};

#define MOESTRO_DECLARE_ROWS(isa)                                                                                      \
  namespace isa {                                                                                                      \
  extern const RowTable row_table;                                                                                     \
  }
MOESTRO_DECLARE_ROWS(scalar)
MOESTRO_DECLARE_ROWS(avx2)
MOESTRO_DECLARE_ROWS(avx512)
#undef MOESTRO_DECLARE_ROWS

} // namespace moestro
