// What the Python module calls: plain argument blocks and one table of functions per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "rounding.h"

namespace moestro {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// y[t, n] = sum over k of x[t, k] * w[n, k], then + bias[n]. Strides count elements; w and y are contiguous.
struct LinearArgs {
  const float *x;
  int64_t x_stride;
  const void *w;
  DType w_type;
  const void *bias; // null: none
  DType bias_type;
  float *y;
  int64_t tokens, outputs, inputs;
};

// Pools are [blocks, heads_kv, block_size, dim] with any strides (in elements) but the innermost, which is 1.
struct KvPool {
  const float *data;
  int64_t block_stride, head_stride, position_stride;
  int64_t dim;
};

struct AttentionArgs {
  const float *query; // [rows, heads, keys.dim]
  int64_t query_row_stride, query_head_stride;
  KvPool keys, values;
  const int32_t *block_table; // [sequences, max_blocks]
  const int32_t *row_sequence, *row_position;
  const float *sinks; // [heads]; null: none
  float *out;         // [rows, heads, values.dim], contiguous; may be the query, where that is laid out alike
  int64_t rows, heads, heads_kv;
  int64_t blocks, block_size, sequences, max_blocks;
  float scale;
  int64_t window; // 0: none
  float softcap;  // 0: none
};

// Rows [first, first + count) are of one sequence and are computed together; they attend to positions [low, high].
struct RowGroup {
  int64_t first, count, low, high;
};

// Queries computed together share the keys and values they load: at most this many (rows times heads).
constexpr int64_t kQueriesPerTask = 16;

// First position that a row attends to, from its own position.
inline __attribute__((always_inline)) int64_t first_position(int64_t position, int64_t window) {
  return window > 0 && position >= window ? position - window + 1 : 0;
}

struct PackedTable; // packed_tasks.h
struct RowTable; // rows.h
struct NetTable; // nets.h

struct KernelTable {
  const char *name;
  const PackedTable *packed;
  void (*linear)(const LinearArgs &);
  void (*attention)(const AttentionArgs &, const RowGroup *, int64_t groups);
  // Most bytes of scratch per thread.
  size_t (*linear_scratch)();
  size_t (*attention_scratch)(int64_t positions, int64_t value_dim);
  void (*round_columns)(const RoundArgs &);
  void (*descend)(const DescentArgs &);
  void (*scale_costs)(const ScaleCostArgs &);
  const RowTable *rows;
  const NetTable *nets;
};

#define MOESTRO_DECLARE_KERNELS(isa)                                                                                   \
  namespace isa {                                                                                                      \
  void linear(const LinearArgs &args);                                                                                 \
  void attention(const AttentionArgs &args, const RowGroup *groups, int64_t count);                                    \
  size_t linear_scratch();                                                                                             \
  size_t attention_scratch(int64_t positions, int64_t value_dim);                                                      \
  void round_columns(const RoundArgs &args);                                                                           \
  void descend(const DescentArgs &args);                                                                               \
  void scale_costs(const ScaleCostArgs &args);                                                                         \
  }
MOESTRO_DECLARE_KERNELS(scalar)
MOESTRO_DECLARE_KERNELS(avx2)
MOESTRO_DECLARE_KERNELS(avx512)
#undef MOESTRO_DECLARE_KERNELS

} // namespace moestro
