// Causal attention over blocks of keys and values. A task is the queries of some rows of one sequence that share a
// key-value head; its scores stay in the thread's scratch.
//
// The order for one query, whatever shares its task: scores by dot_tile's order; weights e = exp(score - greatest);
// their sum by lane (position - first position) mod 8, then over the lanes; values added in ascending position, one
// fused multiply-add each; one division by the sum.
#include "dot_tile.h"
#include "thread_pool.h"
#include "vector_math.h"

namespace moestro {
namespace MOESTRO_ISA {
namespace {

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Positions whose values stay in the first-level cache while every query uses them, and how far ahead of use keys and
// values are asked for. A row's place is known only from the table, so no hardware prefetcher can do it.
constexpr int64_t kChunk = 32;
constexpr int64_t kAhead = 8;
constexpr int64_t kLeastParallelWork = 1 << 15;
constexpr float kMinusInfinity = -__builtin_inff();
// How many vectors of a value row are summed at once for a tile of queries.
#ifdef __AVX512VL__
constexpr int kValueVectors = 4;
#else
constexpr int kValueVectors = 2;
#endif

struct Job {
  const AttentionArgs *args;
  const RowGroup *groups;
  int64_t count;
  int64_t head_parts; // parts into which the query heads of a key-value head are split
  int64_t part_heads;
};

struct Query {
  const float *query;
  float *out;
  float *weights; // scores, then weights, of positions low .. high of the group
  float *sums;    // weighted values so far
  int64_t head;
  int64_t first, last; // positions relative to the group's low
  float total;
};

struct Work {
  const AttentionArgs *args;
  const RowGroup *group;
  int64_t head_kv;
  int64_t queries;
  Query query[kQueriesPerTask];
};

int64_t scores_stride(int64_t positions) { return round_up(positions, kLanes); }

size_t scratch_for(int64_t queries, int64_t positions, int64_t value_dim) {
  return static_cast<size_t>(queries * (scores_stride(positions) + round_up(value_dim, kLanes))) * sizeof(float);
}

// The rows of positions [from, from + kChunk + kAhead), the last one repeated where there are no more.
struct Rows {
  const float *at[kChunk + kAhead];
};

Rows gather(const Work &work, const KvPool &kv, int64_t from, int64_t positions) {
  const AttentionArgs &args = *work.args;
  const int32_t *table = args.block_table + args.row_sequence[work.group->first] * args.max_blocks;
  const float *base = kv.data + work.head_kv * kv.head_stride;
  const int64_t start = work.group->low + from;
  int64_t block = start / args.block_size, inside = start % args.block_size;
  Rows rows;
  for (int64_t i = 0; i < kChunk + kAhead; ++i) {
    if (from + i >= positions) {
      rows.at[i] = rows.at[i - 1];
      continue;
    }
    rows.at[i] = base + table[block] * kv.block_stride + inside * kv.position_stride;
    if (++inside == args.block_size) {
      inside = 0;
      ++block;
    }
  }
  return rows;
}

MOESTRO_INLINE void ask_for(const float *row, int64_t dim) {
  constexpr int64_t kLine = 64 / sizeof(float);
  for (int64_t d = 0; d < dim; d += kLine) __builtin_prefetch(row + d);
}

template <int Width> MOESTRO_INLINE void score_rows(Work &work, const float *const *keys, int64_t position) {
  for (int j = 0; j < Width; ++j) ask_for(keys[kAhead + j], work.args->keys.dim);
  for_each_part<kTileTokens>(work.queries, [&](int64_t first, auto count) {
    constexpr int kTokens = decltype(count)::value;
    const float *x[kTokens];
    for (int i = 0; i < kTokens; ++i) x[i] = work.query[first + i].query;
    float dots[kTokens * Width];
    dot_tile<kTokens, Width>(x, keys, work.args->keys.dim, Ahead{}, dots);
    for (int i = 0; i < kTokens; ++i) {
      std::memcpy(work.query[first + i].weights + position, dots + i * Width, Width * sizeof(float));
    }
  });
}

void score(Work &work, int64_t positions) {
  for (int64_t from = 0; from < positions; from += kChunk) {
    const int64_t count = smaller(kChunk, positions - from);
    const Rows keys = gather(work, work.args->keys, from, positions);
    int64_t j = 0;
    for (; j + kTileRows <= count; j += kTileRows) score_rows<kTileRows>(work, keys.at + j, from + j);
    for (; j < count; ++j) score_rows<1>(work, keys.at + j, from + j);
  }
}

MOESTRO_INLINE Vec scaled(const AttentionArgs &args, Vec dots) {
  const Vec score = mul(dots, broadcast(args.scale));
  if (args.softcap == 0.0f) return score;
  const Vec cap = broadcast(args.softcap);
  return mul(cap, tanh(div(score, cap)));
}

MOESTRO_INLINE float greatest_lane(Vec v) {
  float lanes[kLanes], greatest = kMinusInfinity;
  store(lanes, v);
  for (float lane : lanes) greatest = lane > greatest ? lane : greatest;
  return greatest;
}

// Scales the scores in place and returns the greatest, leaving NaN aside (it comes back through exp).
float scale_scores(const AttentionArgs &args, float *scores, int64_t count) {
  Vec greatest = broadcast(kMinusInfinity);
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    const Vec s = scaled(args, load(scores + j));
    store(scores + j, s);
    greatest = max(s, greatest);
  }
  float result = greatest_lane(greatest);
  if (j == count) return result;
  store_some(scores + j, scaled(args, load_some(scores + j, count - j)), count - j);
  for (; j < count; ++j) result = scores[j] > result ? scores[j] : result;
  return result;
}

// Turns scores into weights, not yet divided by their sum.
void weigh(Work &work) {
  const AttentionArgs &args = *work.args;
  for (int64_t q = 0; q < work.queries; ++q) {
    Query &query = work.query[q];
    float *scores = query.weights + query.first;
    const int64_t count = query.last - query.first + 1;
    float greatest = scale_scores(args, scores, count);
    if (args.sinks == nullptr) {
      query.total = exp_and_sum(scores, count, greatest);
      continue;
    }
    // A sink is one more logit that takes weight and has no value.
    float sink = args.sinks[query.head];
    greatest = sink > greatest ? sink : greatest;
    query.total = exp_and_sum(scores, count, greatest);
    query.total += exp_and_sum(&sink, 1, greatest);
  }
}

// sums[i][d ..] += weights[i][j] * values[j][d ..] for j in [from, to), one j after another.
template <int Queries, int Vectors>
MOESTRO_INLINE void add_values(Query *query, const float *const *values, int64_t base, int64_t from, int64_t to,
                               int64_t d, int64_t ask_dim = 0) {
  Vec sums[Queries][Vectors];
#pragma GCC unroll 8
  for (int i = 0; i < Queries; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) sums[i][v] = load(query[i].sums + d + v * kLanes);
  }
  const float *weights[Queries];
  for (int i = 0; i < Queries; ++i) weights[i] = query[i].weights + base;
  for (int64_t j = from; j < to; ++j) {
    ask_for(values[j + kAhead], ask_dim);
    const float *value = values[j] + d;
    Vec row[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) row[v] = load(value + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < Queries; ++i) {
      const Vec weight = broadcast(weights[i][j]);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sums[i][v] = fma(weight, row[v], sums[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Queries; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) store(query[i].sums + d + v * kLanes, sums[i][v]);
  }
}

void add_last_values(Query &query, const float *const *values, int64_t base, int64_t from, int64_t to, int64_t d,
                     int64_t left) {
  Vec sums = load(query.sums + d);
  for (int64_t j = from; j < to; ++j) {
    sums = fma(broadcast(query.weights[base + j]), load_some(values[j] + d, left), sums);
  }
  store(query.sums + d, sums);
}

template <int Queries, int Vectors>
void add_all_values(Query *query, const float *const *values, int64_t dim, int64_t base, int64_t from, int64_t to) {
  if (from >= to) return;
  int64_t d = 0;
  if (Vectors * kLanes <= dim) { // the first pass over the rows asks for those to come
    add_values<Queries, Vectors>(query, values, base, from, to, 0, dim);
    d = Vectors * kLanes;
  }
  for (; d + Vectors * kLanes <= dim; d += Vectors * kLanes)
    add_values<Queries, Vectors>(query, values, base, from, to, d);
  for (; d + kLanes <= dim; d += kLanes) add_values<Queries, 1>(query, values, base, from, to, d);
  if (d == dim) return;
  for (int i = 0; i < Queries; ++i) add_last_values(query[i], values, base, from, to, d, dim - d);
}

// One chunk of values for `Queries` queries: together where all of them attend, each alone at the ragged ends.
template <int Queries>
void add_chunk(Query *query, const float *const *values, int64_t dim, int64_t base, int64_t count) {
  int64_t from = 0, to = count;
  for (int i = 0; i < Queries; ++i) {
    from = larger(from, query[i].first - base);
    to = smaller(to, query[i].last + 1 - base);
  }
  if (from >= to) from = to = 0;
  for (int i = 0; i < Queries; ++i) {
    const int64_t begin = larger(0, query[i].first - base), end = smaller(count, query[i].last + 1 - base);
    add_all_values<1, 8>(query + i, values, dim, base, begin, from < to ? from : end);
  }
  add_all_values<Queries, kValueVectors>(query, values, dim, base, from, to);
  if (from == to) return;
  for (int i = 0; i < Queries; ++i) {
    const int64_t end = smaller(count, query[i].last + 1 - base);
    add_all_values<1, 8>(query + i, values, dim, base, to, end);
  }
}

void add_chunks(Work &work, int64_t positions) {
  const int64_t dim = work.args->values.dim;
  for (int64_t from = 0; from < positions; from += kChunk) {
    const int64_t count = smaller(kChunk, positions - from);
    const Rows rows = gather(work, work.args->values, from, positions);
    const float *const *values = rows.at;
    int64_t q = 0;
    for (; q + 4 <= work.queries; q += 4) add_chunk<4>(work.query + q, values, dim, from, count);
    for (; q + 2 <= work.queries; q += 2) add_chunk<2>(work.query + q, values, dim, from, count);
    for (; q < work.queries; ++q) add_chunk<1>(work.query + q, values, dim, from, count);
  }
}

void write(const Work &work) {
  const int64_t dim = work.args->values.dim;
  for (int64_t q = 0; q < work.queries; ++q) {
    const Query &query = work.query[q];
    const Vec total = broadcast(query.total);
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) store(query.out + d, div(load(query.sums + d), total));
    if (d < dim) store_some(query.out + d, div(load(query.sums + d), total), dim - d);
  }
}

void lay_out(Work &work, int64_t head, int64_t heads, char *scratch) {
  const AttentionArgs &args = *work.args;
  const RowGroup &group = *work.group;
  const int64_t dim = args.values.dim, stride = scores_stride(group.high - group.low + 1);
  float *sums = reinterpret_cast<float *>(scratch);
  float *weights = sums + group.count * heads * round_up(dim, kLanes);
  for (int64_t row = group.first; row < group.first + group.count; ++row) {
    const int64_t position = args.row_position[row];
    for (int64_t h = head; h < head + heads; ++h) {
      Query &query = work.query[work.queries++];
      query.query = args.query + row * args.query_row_stride + h * args.query_head_stride;
      query.out = args.out + (row * args.heads + h) * dim;
      query.head = h;
      query.first = first_position(position, args.window) - group.low;
      query.last = position - group.low;
      query.sums = sums;
      query.weights = weights;
      sums += round_up(dim, kLanes);
      weights += stride;
      std::memset(query.sums, 0, static_cast<size_t>(round_up(dim, kLanes)) * sizeof(float));
    }
  }
}

void attention_task(void *context, int64_t task, char *scratch) {
  const Job &job = *static_cast<const Job *>(context);
  const AttentionArgs &args = *job.args;
  const int64_t shared_heads = args.heads / args.heads_kv, part = task / job.count;
  Work work;
  work.args = &args;
  // One head after another, whose keys and values stay in cache; the longest rows first, which evens out the end.
  work.group = &job.groups[job.count - 1 - task % job.count];
  work.head_kv = part / job.head_parts;
  work.queries = 0;
  const int64_t first = part % job.head_parts * job.part_heads;
  lay_out(work, work.head_kv * shared_heads + first, smaller(job.part_heads, shared_heads - first), scratch);
  const int64_t positions = work.group->high - work.group->low + 1;
  score(work, positions);
  weigh(work);
  add_chunks(work, positions);
  write(work);
}

} // namespace

size_t attention_scratch(int64_t positions, int64_t value_dim) {
  return scratch_for(kQueriesPerTask, positions, value_dim);
}

void attention(const AttentionArgs &args, const RowGroup *groups, int64_t count) {
  const int64_t shared_heads = args.heads / args.heads_kv;
  Job job{&args, groups, count, (shared_heads + kQueriesPerTask - 1) / kQueriesPerTask, 0};
  job.part_heads = (shared_heads + job.head_parts - 1) / job.head_parts;
  size_t scratch = 0;
  int64_t work = 0;
  for (int64_t g = 0; g < count; ++g) {
    const int64_t positions = groups[g].high - groups[g].low + 1;
    const size_t needed = scratch_for(groups[g].count * job.part_heads, positions, args.values.dim);
    scratch = needed > scratch ? needed : scratch;
    work += groups[g].count * positions;
  }
  work *= args.heads * (args.keys.dim + args.values.dim);
  const int64_t tasks = count * args.heads_kv * job.head_parts;
  pool().run(tasks, scratch, work >= kLeastParallelWork, attention_task, &job);
}

} // namespace MOESTRO_ISA
} // namespace moestro
