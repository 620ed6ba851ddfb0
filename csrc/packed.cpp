// Quantised linear maps as jobs of the pool: which thread computes which tiles for which rows.
#include "packed.h"

#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "packed_tasks.h"
#include "thread_pool.h"

namespace moestro {
namespace {

// Less work than this is done before a worker would wake: values quantised, multiply-adds.
constexpr int64_t kLeastParallelValues = 1 << 14;
constexpr int64_t kLeastParallelWork = 1 << 17;
constexpr int64_t kRowsPerTask = 8;
// Tasks per thread, so that a slow one leaves little behind, but none shorter than kLeastTiles.
constexpr int64_t kTasksPerThread = 16;
constexpr int64_t kLeastTiles = 2;

struct QuantiseJob {
  const float *x;
  int64_t stride, columns;
  QuantisedRows out;
};

void quantise_task(void *context, int64_t task, char *) {
  const QuantiseJob &job = *static_cast<const QuantiseJob *>(context);
  const int64_t groups = job.out.columns / job.out.group;
  const int64_t end = std::min((task + 1) * kRowsPerTask, job.out.rows);
  for (int64_t t = task * kRowsPerTask; t < end; ++t) {
    packed_kernels().quantise(job.x + t * job.stride, job.columns, job.out.group, job.out.codes + t * job.out.columns,
                              job.out.scales + t * groups);
  }
}

struct LinearJob {
  const PackedLinear *linears;
  struct Piece {
    int64_t linear, first_tile, end_tile, first_row, end_row;
  };
  std::vector<Piece> pieces;
};

void linear_task(void *context, int64_t number, char *) {
  const LinearJob &job = *static_cast<const LinearJob *>(context);
  const LinearJob::Piece &piece = job.pieces[number];
  const PackedLinear &linear = job.linears[piece.linear];
  const int64_t groups = linear.x.columns / linear.x.group;
  TileTask task;
  task.matrix = &linear.matrix;
  task.bias = linear.bias;
  task.delta = linear.delta;
  task.first = piece.first_tile;
  task.end = piece.end_tile;
  task.first_row = 0;
  task.count = piece.end_row - piece.first_row;
  for (int64_t i = 0; i < task.count; ++i) {
    const int64_t t = piece.first_row + i;
    task.codes[i] = linear.x.codes + t * linear.x.columns;
    task.scales[i] = linear.x.scales + t * groups;
    task.out[i] = linear.y + t * linear.y_stride;
  }
  packed_kernels().tiles(task);
}

} // namespace

size_t quantised_bytes(int64_t rows, int64_t columns, int32_t group) {
  const int64_t groups = parts_of(columns, group);
  return static_cast<size_t>(rounded_up(rows * groups * group, 64) +
                             rounded_up(rows * groups * int64_t{sizeof(GroupScale)}, 64));
}

QuantisedRows quantised_view(void *memory, int64_t rows, int64_t columns, int32_t group) {
  const int64_t padded = rounded_up(columns, group);
  char *scales = static_cast<char *>(memory) + rounded_up(rows * padded, 64);
  return {static_cast<int8_t *>(memory), reinterpret_cast<GroupScale *>(scales), rows, padded, group};
}

void quantise(const float *x, int64_t stride, int64_t columns, const QuantisedRows &out) {
  QuantiseJob job{x, stride, columns, out};
  const bool parallel = out.rows * columns >= kLeastParallelValues;
  pool().run(parts_of(out.rows, kRowsPerTask), 0, parallel, quantise_task, &job);
}

void packed_linear(const PackedLinear *linears, int64_t count) {
  LinearJob job{linears, {}};
  int64_t work = 0, tiles = 0;
  for (int64_t i = 0; i < count; ++i) {
    const PackedMatrix &matrix = linears[i].matrix;
    const int64_t blocks = parts_of(linears[i].x.rows, kMostRows);
    tiles += tiles_of(matrix) * blocks;
    work += matrix.rows * linears[i].x.columns * linears[i].x.rows;
  }
  const int64_t even = parts_of(tiles, kTasksPerThread * pool().threads());
  const int64_t piece_tiles = rounded_up(std::max(even, kLeastTiles), 2);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t rows = linears[i].x.rows, all_tiles = tiles_of(linears[i].matrix);
    if (rows == 0) continue;
    const int64_t block = parts_of(rows, parts_of(rows, kMostRows)); // even blocks
    for (int64_t tile = 0; tile < all_tiles; tile += piece_tiles) {
      for (int64_t row = 0; row < rows; row += block) {
        const int64_t end = std::min(tile + piece_tiles, all_tiles);
        job.pieces.push_back({i, tile, end, row, std::min(row + block, rows)});
      }
    }
  }
  const bool parallel = work >= kLeastParallelWork;
  pool().run(static_cast<int64_t>(job.pieces.size()), 0, parallel, linear_task, &job);
}

} // namespace moestro
