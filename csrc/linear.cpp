// y = x w^T + bias. Few tokens: straight from the weights, at the speed of memory. Many: through blocks in cache.
#include "dot_tile.h"
#include "thread_pool.h"

namespace moestro {
namespace MOESTRO_ISA {
namespace {

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t parts(int64_t total, int64_t part) { return (total + part - 1) / part; }
constexpr int64_t round_up(int64_t value, int64_t step) { return parts(value, step) * step; }

// Up to this many tokens the weights are converted in registers for each tile, beyond it once per block.
constexpr int64_t kDirectTokens = 2 * kTileTokens;
// A block of each operand and the lanes' sums, 320 KiB in all, stay in the second-level cache.
constexpr int64_t kBlockTokens = 60;
constexpr int64_t kBlockRows = 48;
constexpr int64_t kBlockInputs = 512;
static_assert(kBlockTokens % kTileTokens == 0 && kBlockRows % kTileRows == 0 && kBlockInputs % kLanes == 0);
// Less work than this (multiply-adds) is done before a worker would wake.
constexpr int64_t kLeastParallelWork = 1 << 18;
constexpr int64_t kLeastTaskBytes = 1 << 15;
// A tile's tokens and rows up to this size leave room in the first-level cache (32 KiB) for the next tile's rows.
constexpr int64_t kNearBytes = 12 << 10;
constexpr int64_t kNearBytesOneToken = 24 << 10; // whose one row is in use all the time

struct Job {
  const LinearArgs *args;
  int64_t token_blocks, block_tokens, block_rows;
};

float bias_of(const LinearArgs &args, int64_t n) {
  if (args.bias == nullptr) return 0.0f;
  switch (args.bias_type) {
  case DType::bf16: return to_float(static_cast<const BFloat16 *>(args.bias)[n]);
  case DType::f16: return to_float(static_cast<const Float16 *>(args.bias)[n]);
  default: return static_cast<const float *>(args.bias)[n];
  }
}

void write(const LinearArgs &args, int64_t t, int64_t n, float sum) {
  args.y[t * args.outputs + n] = args.bias == nullptr ? sum : sum + bias_of(args, n);
}

template <int Rows, class W> MOESTRO_INLINE void direct_rows(const LinearArgs &args, int64_t n) {
  const int64_t inputs = args.inputs;
  const W *w[Rows];
  for (int j = 0; j < Rows; ++j) w[j] = static_cast<const W *>(args.w) + (n + j) * inputs;
  const int64_t tile_bytes =
      inputs * (Rows * int64_t{sizeof(W)} + smaller(args.tokens, kTileTokens) * int64_t{sizeof(float)});
  const bool near = tile_bytes <= (args.tokens == 1 ? kNearBytesOneToken : kNearBytes);
  const Ahead next{reinterpret_cast<const char *>(w[0] + Rows * inputs), near};
  for_each_part<kTileTokens>(args.tokens, [&](int64_t first, auto count) {
    constexpr int kTokens = decltype(count)::value;
    const float *x[kTokens];
    for (int i = 0; i < kTokens; ++i) x[i] = args.x + (first + i) * args.x_stride;
    float sums[kTokens * Rows];
    // After the first pass this tile's rows come from cache; the first pass asks for the next tile's.
    dot_tile<kTokens, Rows>(x, w, inputs, first == 0 ? next : Ahead{}, sums);
    for (int i = 0; i < kTokens; ++i) {
      for (int j = 0; j < Rows; ++j) write(args, first + i, n + j, sums[i * Rows + j]);
    }
  });
}

template <class W> void direct_task(void *context, int64_t task, char *) {
  const Job &job = *static_cast<const Job *>(context);
  const LinearArgs &args = *job.args;
  int64_t n = task * job.block_rows;
  const int64_t end = smaller(n + job.block_rows, args.outputs);
  for (; n + kTileRows <= end; n += kTileRows) direct_rows<kTileRows, W>(args, n);
  for (; n < end; ++n) direct_rows<1, W>(args, n);
}

// Interleaves `Width` rows per tile: out[tile][step][row][lane]. What lies outside `rows` x `length` becomes zero.
template <int Width, class W>
MOESTRO_INLINE void pack(const W *in, int64_t stride, int64_t rows, int64_t length, float *out) {
  const int64_t whole = length / kLanes, left = length % kLanes;
  for (int64_t first = 0; first < rows; first += Width) {
    for (int i = 0; i < Width; ++i) {
      float *to = out + i * kLanes;
      const bool inside = first + i < rows;
      const W *row = in + (inside ? first + i : 0) * stride;
      for (int64_t s = 0; s < whole; ++s) store(to + s * Width * kLanes, inside ? load(row + s * kLanes) : zero());
      if (left == 0) continue;
      store(to + whole * Width * kLanes, inside ? load_some(row + whole * kLanes, left) : zero());
    }
    out += (whole + (left != 0)) * Width * kLanes;
  }
}

struct Block {
  float *tokens, *rows, *sums;
};

Block block_in(char *scratch) {
  float *tokens = reinterpret_cast<float *>(scratch);
  float *rows = tokens + kBlockTokens * kBlockInputs;
  return {tokens, rows, rows + kBlockRows * kBlockInputs};
}

using FullTile = Tile<kTileTokens, kTileRows>;

// Adds `steps` steps of the inputs to a tile's sums, which lie in memory lane by lane. They stay in registers meanwhile
// only because the tile is local and every loop over it is unrolled.
MOESTRO_INLINE void packed_tile(const float *x, const float *w, int64_t steps, bool first, float *sums) {
  Tile<kTileTokens, kTileRows> tile;
  if (first) {
    tile.clear();
  } else {
    tile.load_from(sums);
  }
  for (int64_t s = 0; s < steps; ++s) {
    tile.step([&](int i) { return load(x + i * kLanes); }, [&](int j) { return load(w + j * kLanes); });
    x += kTileTokens * kLanes;
    w += kTileRows * kLanes;
  }
  tile.store_to(sums);
}

void write_tile(const LinearArgs &args, const float *sums, int64_t t, int64_t n, int64_t t_end, int64_t n_end) {
  Vec lanes[kTileTokens * kTileRows];
  for (int i = 0; i < kTileTokens * kTileRows; ++i) lanes[i] = load(sums + i * kLanes);
  float totals[kTileTokens * kTileRows];
  sum_lanes_of<kTileTokens * kTileRows>(lanes, totals);
  for (int64_t i = 0; i < kTileTokens && t + i < t_end; ++i) {
    for (int64_t j = 0; j < kTileRows && n + j < n_end; ++j) write(args, t + i, n + j, totals[i * kTileRows + j]);
  }
}

template <class W> void packed_task(void *context, int64_t task, char *scratch) {
  const Job &job = *static_cast<const Job *>(context);
  const LinearArgs &args = *job.args;
  const Block block = block_in(scratch);
  const int64_t t0 = task % job.token_blocks * job.block_tokens, t1 = smaller(t0 + job.block_tokens, args.tokens);
  const int64_t n0 = task / job.token_blocks * job.block_rows, n1 = smaller(n0 + job.block_rows, args.outputs);
  for (int64_t k = 0; k < args.inputs; k += kBlockInputs) {
    const int64_t length = smaller(kBlockInputs, args.inputs - k), steps = parts(length, kLanes);
    const bool last = k + length == args.inputs;
    pack<kTileTokens>(args.x + t0 * args.x_stride + k, args.x_stride, t1 - t0, length, block.tokens);
    pack<kTileRows>(static_cast<const W *>(args.w) + n0 * args.inputs + k, args.inputs, n1 - n0, length, block.rows);
    const float *x = block.tokens;
    float *sums = block.sums;
    for (int64_t t = t0; t < t1; t += kTileTokens, x += steps * kTileTokens * kLanes) {
      const float *w = block.rows;
      for (int64_t n = n0; n < n1; n += kTileRows, w += steps * kTileRows * kLanes) {
        packed_tile(x, w, steps, k == 0, sums);
        if (last) write_tile(args, sums, t, n, t1, n1);
        sums += kTileTokens * kTileRows * kLanes;
      }
    }
  }
}

template <class W> void run(const LinearArgs &args) {
  Job job{&args, 1, args.tokens, 0};
  const bool parallel = args.tokens * args.outputs * args.inputs >= kLeastParallelWork;
  if (args.tokens <= kDirectTokens || args.inputs == 0) {
    const int64_t row_bytes = larger(1, args.inputs * static_cast<int64_t>(sizeof(W)));
    const int64_t even = parts(args.outputs, 8 * pool().threads());
    job.block_rows = round_up(larger(even, kLeastTaskBytes / row_bytes), kTileRows);
    pool().run(parts(args.outputs, job.block_rows), 0, parallel, direct_task<W>, &job);
    return;
  }
  // Even blocks: a last block of one token would cost as much conversion as a full one.
  job.token_blocks = parts(args.tokens, kBlockTokens);
  job.block_tokens = round_up(parts(args.tokens, job.token_blocks), kTileTokens);
  job.token_blocks = parts(args.tokens, job.block_tokens);
  job.block_rows = round_up(parts(args.outputs, parts(args.outputs, kBlockRows)), kTileRows);
  const int64_t row_blocks = parts(args.outputs, job.block_rows);
  pool().run(job.token_blocks * row_blocks, linear_scratch(), parallel, packed_task<W>, &job);
}

} // namespace

size_t linear_scratch() {
  const int64_t operands = (kBlockTokens + kBlockRows) * kBlockInputs, sums = kBlockTokens * kBlockRows * kLanes;
  return static_cast<size_t>(operands + sums) * sizeof(float);
}

void linear(const LinearArgs &args) {
  if (args.tokens == 0 || args.outputs == 0) return;
  switch (args.w_type) {
  case DType::bf16: return run<BFloat16>(args);
  case DType::f16: return run<Float16>(args);
  default: return run<float>(args);
  }
}

} // namespace MOESTRO_ISA
} // namespace moestro
