// Three jobs of the pool: quantise the rows of hidden; up, activation and quantising, group by group of the expert's
// width; down. What passes between them lies in the pool's shared memory.
//
// A unit of the second job is one group of the width for a block of rows. With few rows there may be fewer units than
// threads can use: then a unit is cut into parts, and whoever finishes its last part goes on to the activation.
#include "experts.h"

#include <algorithm>
#include <atomic>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "dispatch.h"
#include "thread_pool.h"

namespace moestro {
namespace {

constexpr int64_t kLeastParallelWork = 1 << 17; // multiply-adds
constexpr int64_t kUnitsPerThread = 4;
constexpr int64_t kDownTasksPerThread = 16;
constexpr int64_t kLeastTiles = 4; // of a task
// Floats per row of a unit: gate and up of a group, each up to a tile wider at either end.
constexpr int64_t kWidestUnit = 2 * (kWidestGroup + 2 * kTile);

// Rows of the lists.
struct Rows {
  int64_t first, count;
};

// Rows of one job that are computed together, and which of the deltas are on some of them.
struct Block {
  int64_t job, first, count;
  int64_t first_delta = 0, end_delta = 0;
  Rows rows() const { return {first, count}; }
};

// What is multiplied with rows: a matrix of a job, or a delta that adds to its results.
struct Factor {
  const PackedMatrix *matrix;
  const float *bias;
  const Salient *delta;
};

// Tiles [first, end) whose results lie from column `column` of a unit's values on.
struct TileRange {
  int64_t first, end, column;
  int64_t tiles() const { return end - first; }
};

struct Unit {
  TileRange ranges[2];
  int64_t up, gate; // columns where the group's values begin
  int64_t tiles() const { return ranges[0].tiles() + ranges[1].tiles(); }
};

struct Run {
  const ExpertShape *shape;
  const ExpertJobs *jobs;
  const OutputRows *out;
  std::vector<PackedMatrix> up, down;
  std::vector<DeltaOfRows> deltas;
  std::vector<Block> blocks;
  std::vector<int32_t> used, slots; // rows of hidden that are used, and the place of each among them
  QuantisedRows hidden, width;      // rows: those used; those of the lists
  int64_t groups;                   // of the width
  int64_t parts;                    // of a unit
  float *values;                    // of units, when they have parts
  int64_t unit_floats;
  std::atomic<int32_t> *finished; // parts of each unit
  int64_t down_tiles;             // of one task
  const HiddenRows *source;

  const float *bias(int64_t job, int64_t offset) const {
    if (offset < 0) return nullptr;
    return reinterpret_cast<const float *>(jobs->planes[job * kPlanes] + offset);
  }

  // Calls use(factor, rows) for the matrix with all rows of a block and for deltas with theirs.
  template <class Use> void each_up(const Block &block, Use use) const {
    use(Factor{&up[block.job], bias(block.job, shape->up_bias), nullptr}, block.rows());
    each_delta(block, [&](const DeltaOfRows &delta, Rows rows) {
      if (delta.shape->has_up) use(factor_of(delta.up), rows);
    });
  }
  template <class Use> void each_down(const Block &block, Use use) const {
    use(Factor{&down[block.job], bias(block.job, shape->down_bias), nullptr}, block.rows());
    each_delta(block, [&](const DeltaOfRows &delta, Rows rows) {
      if (delta.shape->has_down) use(factor_of(delta.down), rows);
    });
  }

private:
  static Factor factor_of(const Delta &delta) { return {&delta.matrix, delta.bias, &delta.salient}; }
  template <class Use> void each_delta(const Block &block, Use use) const {
    for (int64_t d = block.first_delta; d < block.end_delta; ++d) {
      const int64_t first = std::max(deltas[d].first, block.first);
      use(deltas[d], Rows{first, std::min(deltas[d].end, block.first + block.count) - first});
    }
  }
};

[[noreturn]] void refuse(const std::string &what) { throw std::invalid_argument("experts: " + what); }

void check_index(const char *list, int64_t place, int64_t value, int64_t limit) {
  if (value >= 0 && value < limit) return;
  refuse(std::string(list) + "[" + std::to_string(place) + "] is " + std::to_string(value) + ", not in [0, " +
         std::to_string(limit) + ")");
}

void check_lists(const ExpertJobs &jobs, const HiddenRows &hidden, const OutputRows &out) {
  if (jobs.starts[0] != 0 || jobs.starts[jobs.count] != jobs.listed) refuse("starts do not span the lists");
  for (int64_t j = 0; j < jobs.count; ++j) {
    if (jobs.starts[j] > jobs.starts[j + 1]) refuse("starts of job " + std::to_string(j) + " descend");
  }
  for (int64_t r = 0; r < jobs.listed; ++r) {
    check_index("rows", r, jobs.rows[r], hidden.rows);
    check_index("places", r, jobs.places[r], out.rows);
  }
}

// Blocks of at most kMostRows rows, those of jobs with many rows first.
std::vector<Block> blocks_of(const ExpertJobs &jobs) {
  std::vector<Block> blocks;
  for (int64_t j = 0; j < jobs.count; ++j) {
    const int64_t rows = jobs.starts[j + 1] - jobs.starts[j];
    if (rows == 0) continue;
    const int64_t even = parts_of(rows, parts_of(rows, kMostRows));
    for (int64_t first = 0; first < rows; first += even) {
      blocks.push_back({j, jobs.starts[j] + first, std::min(even, rows - first)});
    }
  }
  std::stable_sort(blocks.begin(), blocks.end(), [](const Block &a, const Block &b) { return a.count > b.count; });
  return blocks;
}

// Deltas are in ascending order of their rows, of which none has two.
void find_deltas(const std::vector<DeltaOfRows> &deltas, std::vector<Block> &blocks) {
  const auto place_of = [&](auto bound) { return static_cast<int64_t>(bound - deltas.begin()); };
  for (Block &block : blocks) {
    block.first_delta = place_of(std::partition_point(
        deltas.begin(), deltas.end(), [&](const DeltaOfRows &delta) { return delta.end <= block.first; }));
    block.end_delta = place_of(std::partition_point(deltas.begin(), deltas.end(), [&](const DeltaOfRows &delta) {
      return delta.first < block.first + block.count;
    }));
  }
}

Unit unit_of(const ExpertShape &shape, int64_t group) {
  const int64_t width = shape.down.columns, size = shape.down.group;
  const int64_t first = group * size, end = std::min(first + size, width);
  const auto range = [](int64_t from, int64_t to, int64_t column) {
    return TileRange{from / kTile, parts_of(to, kTile), column};
  };
  switch (shape.activation.gate) {
  case Gate::interleaved: return {{range(2 * first, 2 * end, 0), {}}, 2 * first % kTile, 0};
  case Gate::halves: {
    const TileRange gate = range(first, end, 0), up = range(width + first, width + end, gate.tiles() * kTile);
    return {{gate, up}, up.column + (width + first) % kTile, first % kTile};
  }
  default: return {{range(first, end, 0), {}}, first % kTile, 0};
  }
}

void quantise_used(void *context, int64_t number, char *) {
  const Run &run = *static_cast<const Run *>(context);
  const int64_t groups = run.hidden.columns / run.hidden.group;
  packed_kernels().quantise(run.source->data + run.used[number] * run.source->stride, run.shape->up.columns,
                            run.hidden.group, run.hidden.codes + number * run.hidden.columns,
                            run.hidden.scales + number * groups);
}

TileTask task_of(const Factor &factor, int64_t count) {
  TileTask task;
  task.matrix = factor.matrix;
  task.bias = factor.bias;
  task.delta = factor.delta;
  task.count = count;
  return task;
}

// Parts [first, end) of the unit's tiles, counted through both ranges. `values` are of the first of the rows.
void compute_up(const Run &run, const Factor &factor, Rows rows, const Unit &unit, float *values, int64_t stride,
                int64_t first, int64_t end) {
  TileTask task = task_of(factor, rows.count);
  const int64_t groups = run.hidden.columns / run.hidden.group;
  for (int64_t i = 0; i < rows.count; ++i) {
    const int64_t slot = run.slots[run.jobs->rows[rows.first + i]];
    task.codes[i] = run.hidden.codes + slot * run.hidden.columns;
    task.scales[i] = run.hidden.scales + slot * groups;
  }
  int64_t before = 0;
  for (const TileRange &range : unit.ranges) {
    const int64_t from = std::max<int64_t>(first - before, 0), to = std::min(end - before, range.tiles());
    before += range.tiles();
    if (from >= to) continue;
    task.first = range.first + from;
    task.end = range.first + to;
    task.first_row = range.first * kTile;
    for (int64_t i = 0; i < rows.count; ++i) task.out[i] = values + i * stride + range.column;
    packed_kernels().tiles(task);
  }
}

void activate_unit(const Run &run, const Block &block, const Unit &unit, int64_t group, const float *values,
                   int64_t stride) {
  const int64_t size = run.width.group, count = std::min(size, run.shape->down.columns - group * size);
  for (int64_t i = 0; i < block.count; ++i) {
    const float *row = values + i * stride;
    alignas(64) float activated[kWidestGroup];
    packed_kernels().activate(run.shape->activation, row + unit.gate, row + unit.up, count, activated);
    const int64_t r = block.first + i;
    packed_kernels().quantise(activated, count, static_cast<int32_t>(size),
                              run.width.codes + r * run.width.columns + group * size,
                              run.width.scales + r * run.groups + group);
  }
}

void up_task(void *context, int64_t number, char *scratch) {
  Run &run = *static_cast<Run *>(context);
  const int64_t unit_number = number / run.parts, part = number % run.parts;
  const Block &block = run.blocks[unit_number / run.groups];
  const int64_t group = unit_number % run.groups;
  const Unit unit = unit_of(*run.shape, group);
  float *own = reinterpret_cast<float *>(scratch);
  float *values = run.parts == 1 ? own : run.values + unit_number * run.unit_floats;
  const int64_t tiles = unit.tiles(), first = tiles * part / run.parts, end = tiles * (part + 1) / run.parts;
  run.each_up(block, [&](const Factor &factor, Rows rows) {
    float *own_values = values + (rows.first - block.first) * kWidestUnit;
    compute_up(run, factor, rows, unit, own_values, kWidestUnit, first, end);
  });
  if (run.parts > 1 && run.finished[unit_number].fetch_add(1, std::memory_order_acq_rel) + 1 < run.parts) return;
  activate_unit(run, block, unit, group, values, kWidestUnit);
}

void down_task(void *context, int64_t number, char *) {
  const Run &run = *static_cast<const Run *>(context);
  const int64_t all_tiles = parts_of(run.shape->down.rows, kTile), per_block = parts_of(all_tiles, run.down_tiles);
  const int64_t first = number % per_block * run.down_tiles;
  run.each_down(run.blocks[number / per_block], [&](const Factor &factor, Rows rows) {
    TileTask task = task_of(factor, rows.count);
    task.first = first;
    task.end = std::min(first + run.down_tiles, all_tiles);
    task.first_row = 0;
    for (int64_t i = 0; i < rows.count; ++i) {
      const int64_t r = rows.first + i;
      task.codes[i] = run.width.codes + r * run.width.columns;
      task.scales[i] = run.width.scales + r * run.groups;
      task.out[i] = run.out->data + run.jobs->places[r] * run.out->stride;
    }
    packed_kernels().tiles(task);
  });
}

// Parts of a unit: more than one only where units are few, so that their values need little memory.
int64_t parts_for(int64_t units, int threads) {
  if (threads == 1 || units >= kUnitsPerThread * threads) return 1;
  return std::min<int64_t>(parts_of(kUnitsPerThread * threads, units), 2 * kWidestGroup / kTile / 2);
}

size_t parted_bytes(int64_t units, int64_t rows) {
  return static_cast<size_t>(rounded_up(units * rows * kWidestUnit * int64_t{sizeof(float)}, 64) +
                             rounded_up(units * int64_t{sizeof(std::atomic<int32_t>)}, 64));
}

void find_used(Run &run, int64_t hidden_rows) {
  run.slots.assign(static_cast<size_t>(hidden_rows), -1);
  for (int64_t r = 0; r < run.jobs->listed; ++r) {
    int32_t &slot = run.slots[run.jobs->rows[r]];
    if (slot >= 0) continue;
    slot = static_cast<int32_t>(run.used.size());
    run.used.push_back(run.jobs->rows[r]);
  }
}

void place_shared(Run &run, int64_t most_rows, int threads) {
  const ExpertShape &shape = *run.shape;
  const int64_t used = static_cast<int64_t>(run.used.size()),
                units = static_cast<int64_t>(run.blocks.size()) * run.groups;
  run.parts = parts_for(units, threads);
  const size_t hidden_bytes = quantised_bytes(used, shape.up.columns, shape.up.group);
  const size_t width_bytes = quantised_bytes(run.jobs->listed, shape.down.columns, shape.down.group);
  const size_t values_bytes = run.parts == 1 ? 0 : parted_bytes(units, most_rows);
  char *memory = pool().shared(hidden_bytes + width_bytes + values_bytes);
  run.hidden = quantised_view(memory, used, shape.up.columns, shape.up.group);
  run.width = quantised_view(memory + hidden_bytes, run.jobs->listed, shape.down.columns, shape.down.group);
  if (run.parts == 1) return;
  run.unit_floats = most_rows * kWidestUnit;
  run.values = reinterpret_cast<float *>(memory + hidden_bytes + width_bytes);
  run.finished = reinterpret_cast<std::atomic<int32_t> *>(run.values + units * run.unit_floats);
  for (int64_t u = 0; u < units; ++u) new (run.finished + u) std::atomic<int32_t>(0);
}

} // namespace

PackedMatrix packed_matrix(const MatrixShape &shape, const int64_t *planes, int32_t level) {
  const int32_t bits = flat_bits(shape.encoding);
  const int needed = bits != 0 ? 1 : (level == 8 ? 4 : level - 1);
  const bool known = bits != 0 ? level == bits : level == 2 || level == 3 || level == 4 || level == 8;
  if (!known) refuse("level " + std::to_string(level) + " is none of this encoding");
  PackedMatrix matrix{shape.encoding, level, shape.group, shape.rows, shape.columns, {}};
  for (int p = 0; p < needed; ++p) {
    if (p >= shape.planes || planes[p] == 0) {
      refuse("level " + std::to_string(level) + " needs plane " + std::to_string(p) + ", which is absent");
    }
    matrix.regions[p] = reinterpret_cast<const uint8_t *>(planes[p] + shape.offsets[p]);
  }
  return matrix;
}

void run_experts(const ExpertShape &shape, const ExpertJobs &jobs, const HiddenRows &hidden, const OutputRows &out,
                 const ExpertDeltas &deltas) {
  check_lists(jobs, hidden, out);
  Run run{};
  run.shape = &shape;
  run.jobs = &jobs;
  run.out = &out;
  run.source = &hidden;
  for (int64_t j = 0; j < jobs.count; ++j) {
    run.up.push_back(packed_matrix(shape.up, jobs.planes + j * kPlanes, jobs.levels[j]));
    run.down.push_back(packed_matrix(shape.down, jobs.planes + j * kPlanes, jobs.levels[j]));
  }
  run.blocks = blocks_of(jobs);
  if (run.blocks.empty()) return;
  run.deltas = deltas_of_rows(deltas, run.up.front(), run.down.front(), jobs.starts, jobs.count);
  find_deltas(run.deltas, run.blocks);
  run.groups = parts_of(shape.down.columns, shape.down.group);
  find_used(run, hidden.rows);

  const auto turn = pool().turn();
  const int threads = pool().threads();
  const int64_t blocks = static_cast<int64_t>(run.blocks.size());
  place_shared(run, run.blocks.front().count, threads);
  const int64_t all_tiles = parts_of(shape.down.rows, kTile);
  run.down_tiles = rounded_up(std::max(parts_of(all_tiles * blocks, kDownTasksPerThread * threads), kLeastTiles), 2);
  const bool parallel = jobs.listed * shape.up.rows * shape.up.columns >= kLeastParallelWork;
  pool().run(static_cast<int64_t>(run.used.size()), 0, run.used.size() > 8, quantise_used, &run);
  pool().run(blocks * run.groups * run.parts, experts_scratch_bytes(), parallel, up_task, &run);
  pool().run(blocks * parts_of(all_tiles, run.down_tiles), 0, parallel, down_task, &run);
}

size_t experts_shared_bytes(int64_t rows, int64_t hidden, int32_t hidden_group, int64_t listed, int64_t width,
                            int32_t width_group, int threads) {
  return quantised_bytes(rows, hidden, hidden_group) + quantised_bytes(listed, width, width_group) +
         parted_bytes(kUnitsPerThread * threads, std::min(listed, kMostRows));
}

size_t experts_scratch_bytes() { return kMostRows * kWidestUnit * sizeof(float); }

} // namespace moestro
