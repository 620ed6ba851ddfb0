#include "rows.h"
#include "thread_pool.h"
#include "vector_math.h"

namespace moestro {
namespace MOESTRO_ISA {
namespace {

// Less work than this (elements) is done before a worker would wake.
constexpr int64_t kLeastParallelElements = 1 << 15;
constexpr int64_t kTasksPerThread = 4;

template <class Args> struct RowsJob {
  const Args *args;
  int64_t rows, rows_per_task;
};

// Calls Row(args, row) for all rows, on all threads where there is enough to do.
template <class Args, void (*Row)(const Args &, int64_t)> void for_rows(const Args &args, int64_t rows, int64_t width) {
  const int64_t tasks = kTasksPerThread * pool().threads();
  RowsJob<Args> job{&args, rows, (rows + tasks - 1) / tasks};
  const auto task = [](void *context, int64_t index, char *) {
    const auto &job = *static_cast<const RowsJob<Args> *>(context);
    const int64_t first = index * job.rows_per_task, end = first + job.rows_per_task;
    for (int64_t row = first; row < (end < job.rows ? end : job.rows); ++row) Row(*job.args, row);
  };
  if (rows == 0) return;
  const bool parallel = rows * width >= kLeastParallelElements;
  pool().run((rows + job.rows_per_task - 1) / job.rows_per_task, 0, parallel, task, &job);
}

template <class W> void embed_row_of(const EmbedArgs &args, int64_t row) {
  const W *from = static_cast<const W *>(args.table) + args.ids[row] * args.width;
  float *to = args.out + row * args.width;
  for (int64_t i = 0; i < args.width; ++i) to[i] = to_float(from[i]);
}

void embed_row(const EmbedArgs &args, int64_t row) {
  switch (args.type) {
  case DType::bf16: return embed_row_of<BFloat16>(args, row);
  case DType::f16: return embed_row_of<Float16>(args, row);
  default: return embed_row_of<float>(args, row);
  }
}

// Squares are summed by lane, as dot products are.
float sum_of_squares(const float *x, int64_t width) {
  Vec sum = zero();
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    const Vec v = load(x + i);
    sum = fma(v, v, sum);
  }
  if (i < width) {
    const Vec v = load_some(x + i, width - i);
    sum = fma(v, v, sum);
  }
  return sum_lanes(sum);
}

void norm_row(const float *x, const Norm &norm, float *out) {
  const float mean = sum_of_squares(x, norm.width) / static_cast<float>(norm.width);
  const float factor = 1.0f / std::sqrt(mean + norm.eps);
  const Vec factors = broadcast(factor);
  int64_t i = 0;
  for (; i + kLanes <= norm.width; i += kLanes) store(out + i, mul(load(norm.weight + i), mul(load(x + i), factors)));
  for (; i < norm.width; ++i) out[i] = norm.weight[i] * (x[i] * factor);
}

void add_row(const float *x, int64_t width, float *sum) {
  for (int64_t i = 0; i < width; ++i) sum[i] += x[i];
}

void add_norm_row(const AddNormArgs &args, int64_t row) {
  const int64_t width = args.norm.width, from = args.pick == nullptr ? row : args.pick[row];
  float *residual = args.residual + from * width;
  if (args.delta != nullptr) add_row(args.delta + from * width, width, residual);
  norm_row(residual, args.norm, args.out + row * width);
}

void norm_groups(float *x, int64_t width, const Norm &norm) {
  if (norm.weight == nullptr) return;
  for (int64_t i = 0; i < width; i += norm.width) norm_row(x + i, norm, x + i);
}

// NaN stays NaN.
void clip_row(float *x, int64_t width, float clip) {
  if (clip == __builtin_inff()) return;
  for (int64_t i = 0; i < width; ++i) {
    const float above = x[i] < -clip ? -clip : x[i];
    x[i] = above > clip ? clip : above;
  }
}

// `out` may be `x`.
void rotate_head(const float *x, const float *cos, const float *sin, int64_t half, float *out) {
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const Vec first = load(x + i), second = load(x + i + half), c = load(cos + i), s = load(sin + i);
    store(out + i, sub(mul(first, c), mul(second, s)));
    store(out + i + half, add(mul(second, c), mul(first, s)));
  }
  for (; i < half; ++i) {
    const float first = x[i], second = x[i + half];
    out[i] = first * cos[i] - second * sin[i];
    out[i + half] = second * cos[i] + first * sin[i];
  }
}

float *cached_row(const QkvArgs &args, const KvTarget &target, int64_t row) {
  const int64_t position = args.row_position[row];
  const int32_t *table = args.block_table + args.row_sequence[row] * args.max_blocks;
  return target.data + table[position / args.block_size] * target.block_stride +
         position % args.block_size * target.position_stride;
}

void place_row(const QkvArgs &args, int64_t row) {
  const int64_t dim = args.head_dim, width = args.heads * dim, width_kv = args.heads_kv * dim;
  const int64_t angles = args.row_position[row] * (dim / 2);
  const float *cos = args.cos + angles, *sin = args.sin + angles;
  float *q = args.q + row * width, *k = args.k + row * width_kv, *v = args.v + row * width_kv;
  norm_groups(q, width, args.q_norm);
  norm_groups(k, width_kv, args.k_norm);
  clip_row(q, width, args.clip);
  clip_row(k, width_kv, args.clip);
  clip_row(v, width_kv, args.clip);
  for (int64_t h = 0; h < args.heads; ++h) rotate_head(q + h * dim, cos, sin, dim / 2, q + h * dim);
  float *keys = cached_row(args, args.keys, row), *values = cached_row(args, args.values, row);
  for (int64_t h = 0; h < args.heads_kv; ++h) {
    rotate_head(k + h * dim, cos, sin, dim / 2, keys + h * args.keys.head_stride);
    std::memcpy(values + h * args.values.head_stride, v + h * dim, static_cast<size_t>(dim) * sizeof(float));
  }
}

void softmax_row(float *x, int64_t count) {
  float greatest = x[0];
  for (int64_t i = 1; i < count; ++i) greatest = x[i] > greatest ? x[i] : greatest;
  const float total = exp_and_sum(x, count, greatest);
  for (int64_t i = 0; i < count; ++i) x[i] /= total;
}

// Insertion into the short list of the best so far. Whatever the values are (NaN is greater than nothing), the ids that
// come out are distinct and exist.
void pick_row(const float *x, int64_t count, int64_t picks, int64_t *ids, float *values) {
  for (int64_t i = 0; i < count; ++i) {
    int64_t at = i < picks ? i : picks;
    if (at == picks && !(x[i] > values[picks - 1])) continue;
    if (at == picks) --at;
    for (; at > 0 && x[i] > values[at - 1]; --at) {
      values[at] = values[at - 1];
      ids[at] = ids[at - 1];
    }
    values[at] = x[i];
    ids[at] = i;
  }
}

void route_row(const RouteArgs &args, int64_t row) {
  float *logits = args.logits + row * args.experts, *weights = args.weights + row * args.picks;
  if (args.routing != Routing::pick_then_softmax) softmax_row(logits, args.experts);
  pick_row(logits, args.experts, args.picks, args.ids + row * args.picks, weights);
  if (args.routing == Routing::softmax_then_pick) return;
  if (args.routing == Routing::pick_then_softmax) return softmax_row(weights, args.picks);
  float total = weights[0];
  for (int64_t i = 1; i < args.picks; ++i) total += weights[i];
  for (int64_t i = 0; i < args.picks; ++i) weights[i] /= total;
}

MOESTRO_INLINE Vec one_plus_exp_minus(Vec x) { return add(broadcast(1.0f), exp(sub(zero(), x))); }

MOESTRO_INLINE Vec gated(Vec gate, Vec up) { return mul(div(gate, one_plus_exp_minus(gate)), up); }

void gate_row(const GateArgs &args, int64_t row) {
  float *gate = args.gate + row * args.width;
  const float *up = args.up + row * args.width;
  int64_t i = 0;
  for (; i + kLanes <= args.width; i += kLanes) store(gate + i, gated(load(gate + i), load(up + i)));
  const int64_t left = args.width - i;
  if (left > 0) store_some(gate + i, gated(load_some(gate + i, left), load_some(up + i, left)), left);
}

void add_scaled_row(const AddScaledArgs &args, int64_t row) {
  float *residual = args.residual + row * args.width;
  const float *x = args.x + row * args.width;
  if (args.scale == nullptr) return add_row(x, args.width, residual);
  float lanes[kLanes];
  store(lanes, div(broadcast(1.0f), one_plus_exp_minus(broadcast(args.scale[row]))));
  for (int64_t i = 0; i < args.width; ++i) residual[i] += lanes[0] * x[i];
}

void embed(const EmbedArgs &args) { for_rows<EmbedArgs, embed_row>(args, args.rows, args.width); }
void add_norm(const AddNormArgs &args) { for_rows<AddNormArgs, add_norm_row>(args, args.rows, args.norm.width); }
void place_qkv(const QkvArgs &args) {
  for_rows<QkvArgs, place_row>(args, args.rows, (args.heads + 2 * args.heads_kv) * args.head_dim);
}
void route(const RouteArgs &args) { for_rows<RouteArgs, route_row>(args, args.rows, args.experts); }
void gate(const GateArgs &args) { for_rows<GateArgs, gate_row>(args, args.rows, args.width); }
void add_scaled(const AddScaledArgs &args) { for_rows<AddScaledArgs, add_scaled_row>(args, args.rows, args.width); }

} // namespace

const RowTable row_table = {embed, add_norm, place_qkv, route, gate, add_scaled};

} // namespace MOESTRO_ISA
} // namespace moestro
