#include "decoder.h"

#include <array>
#include <chrono>
#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "unpack.h"

namespace moestro {
namespace {

void require(bool good, const std::string &what) {
  if (!good) throw std::invalid_argument("decoder: " + what);
}

DType type_of(const Weight &weight) { return static_cast<DType>(weight.kind); }

bool there(const Weight &weight) { return weight.kind != Weight::Kind::none; }

bool flat(const Weight &weight) { return weight.kind == Weight::Kind::flat8 || weight.kind == Weight::Kind::flat4; }

PackedMatrix packed(const Weight &weight) {
  const bool wide = weight.kind == Weight::Kind::flat8;
  PackedMatrix matrix{};
  matrix.encoding = wide ? Encoding::flat8 : Encoding::flat4;
  matrix.level = wide ? 8 : 4;
  matrix.group = weight.group;
  matrix.rows = weight.outputs;
  matrix.columns = weight.inputs;
  matrix.regions[0] = static_cast<const uint8_t *>(weight.data);
  return matrix;
}

LinearArgs linear_args(const Weight &weight, const float *x, int64_t rows, float *y) {
  LinearArgs args{};
  args.x = x;
  args.x_stride = weight.inputs;
  args.w = weight.data;
  args.w_type = type_of(weight);
  args.bias = weight.bias;
  args.bias_type = DType::f32;
  args.y = y;
  args.tokens = rows;
  args.outputs = weight.outputs;
  args.inputs = weight.inputs;
  return args;
}

constexpr size_t kMostProducts = 3; // of one input

// Adds the time until it goes to a sum of seconds.
class Timer {
public:
  explicit Timer(double &sum) : sum_(sum), start_(Clock::now()) {}
  ~Timer() { sum_ += std::chrono::duration<double>(Clock::now() - start_).count(); }
  Timer(const Timer &) = delete;
  Timer &operator=(const Timer &) = delete;

private:
  using Clock = std::chrono::steady_clock;
  double &sum_;
  Clock::time_point start_;
};

bool divides(const Norm &norm, int64_t width, int64_t head_dim) {
  return norm.weight == nullptr || norm.width == width || norm.width == head_dim;
}

} // namespace

Decoder::Decoder(const Weight &embedding, const Norm &norm, const Weight &head, const Rotation &rotation,
                 const Workspace &workspace, int64_t blocks, int64_t block_size)
    : embedding_(embedding), head_(head), norm_(norm), rotation_(rotation), workspace_(workspace),
      width_(embedding.inputs), blocks_(blocks), block_size_(block_size) {
  require(there(embedding) && there(head) && norm.weight != nullptr, "embedding, norm and head are needed");
  require(norm.width == width_ && head.inputs == width_, "embedding, norm and head differ in width");
  require(blocks > 0 && block_size > 0 && workspace.rows > 0, "no blocks, or no rows");
  if (flat(head)) check_flat(head);
}

void Decoder::check_weight(const Weight &weight, int64_t outputs, int64_t inputs, const char *name) const {
  require(there(weight) && weight.outputs == outputs && weight.inputs == inputs,
          std::string(name) + " is [" + std::to_string(weight.outputs) + ", " + std::to_string(weight.inputs) +
              "], expected [" + std::to_string(outputs) + ", " + std::to_string(inputs) + "]");
  if (flat(weight)) check_flat(weight);
}

void Decoder::check_flat(const Weight &weight) const {
  require(weight.group == 32 || weight.group == 64 || weight.group == 128, "a quantised matrix has an unknown group");
  require(quantised_bytes(workspace_.rows, weight.inputs, weight.group) <= workspace_.quantised_size,
          "the workspace is too small for quantised rows");
}

// Matrices that share their input share its quantised rows.
void Decoder::check_together(std::initializer_list<const Weight *> weights) const {
  int32_t group = 0;
  for (const Weight *weight : weights) {
    if (!flat(*weight)) continue;
    require(group == 0 || weight->group == group, "matrices of one input differ in their groups");
    group = weight->group;
  }
}

void Decoder::check_mlp(const Mlp &mlp) const {
  const int64_t inner = mlp.gate.outputs;
  check_weight(mlp.gate, inner, width_, "gate");
  check_weight(mlp.up, inner, width_, "up");
  check_weight(mlp.down, width_, inner, "down");
  if (there(mlp.scale)) check_weight(mlp.scale, 1, width_, "scale");
  check_together({&mlp.gate, &mlp.up});
  const int64_t scratch = inner + (inner > width_ ? inner : width_) + 1;
  require(scratch <= workspace_.scratch_width, "the workspace is too small for the MLP");
}

void Decoder::add(const Layer &layer) {
  const int64_t wide = layer.heads * layer.head_dim, wide_kv = layer.heads_kv * layer.head_dim;
  require(layer.heads_kv > 0 && layer.heads % layer.heads_kv == 0 && layer.head_dim == 2 * rotation_.half,
          "heads do not go together");
  require(layers_.empty() || (layer.heads == layers_[0].heads && layer.heads_kv == layers_[0].heads_kv),
          "layers differ in heads");
  require(layer.input_norm.width == width_ && layer.post_norm.width == width_, "a norm has another width");
  require(layer.input_norm.weight != nullptr && layer.post_norm.weight != nullptr, "a norm is missing");
  require(divides(layer.q_norm, wide, layer.head_dim) && divides(layer.k_norm, wide_kv, layer.head_dim),
          "a norm of queries or keys has a width that is neither a head's nor a row's");
  check_weight(layer.q, wide, width_, "q");
  check_weight(layer.k, wide_kv, width_, "k");
  check_weight(layer.v, wide_kv, width_, "v");
  check_weight(layer.o, width_, wide, "o");
  check_together({&layer.q, &layer.k, &layer.v});
  require(wide + 2 * wide_kv <= workspace_.scratch_width, "the workspace is too small for attention");
  require(layer.keys.data != nullptr && layer.values.data != nullptr, "there is no KV cache");
  if (there(layer.mlp.gate)) check_mlp(layer.mlp);
  if (there(layer.router)) {
    check_weight(layer.router, layer.router.outputs, width_, "router");
    require(workspace_.picks > 0 && workspace_.picks <= layer.router.outputs, "more experts are picked than exist");
    require(layer.router.outputs <= workspace_.scratch_width, "the workspace is too small for routing");
    require(static_cast<int64_t>(known_.size()) < workspace_.moe_layers, "the workspace is for fewer MoE layers");
    known_.push_back(nullptr);
  }
  layers_.push_back(layer);
}

void Decoder::know(int64_t moe, const KnownExperts &experts) {
  require(moe >= 0 && moe < static_cast<int64_t>(known_.size()), "there is no such MoE layer");
  require(experts.shape.up.columns == width_ && experts.shape.down.rows == width_, "experts have another width");
  known_[static_cast<size_t>(moe)] = &experts;
}

AttentionArgs Decoder::attention_args(const Layer &layer, float *query) const {
  AttentionArgs args{};
  args.query = query;
  args.query_row_stride = layer.heads * layer.head_dim;
  args.query_head_stride = layer.head_dim;
  const auto pool = [&](const KvTarget &target) {
    return KvPool{target.data, target.block_stride, target.head_stride, target.position_stride, layer.head_dim};
  };
  args.keys = pool(layer.keys);
  args.values = pool(layer.values);
  args.block_table = step_.block_table;
  args.row_sequence = step_.row_sequence;
  args.row_position = step_.row_position;
  args.sinks = layer.sinks;
  args.out = query;
  args.rows = step_.rows;
  args.heads = layer.heads;
  args.heads_kv = layer.heads_kv;
  args.blocks = blocks_;
  args.block_size = block_size_;
  args.sequences = step_.sequences;
  args.max_blocks = step_.max_blocks;
  args.scale = layer.scale;
  args.window = layer.window;
  args.softcap = layer.softcap;
  return args;
}

void Decoder::begin(const Step &step) {
  require(step.rows > 0 && step.rows <= workspace_.rows, std::to_string(step.rows) + " rows do not fit the workspace");
  for (int64_t row = 0; row < step.rows; ++row) {
    const int64_t token = step.token_ids[row];
    require(token >= 0 && token < embedding_.outputs, "token " + std::to_string(token) + " does not exist");
    const int64_t position = step.row_position[row];
    require(position < rotation_.positions, "position " + std::to_string(position) + " is beyond the context");
  }
  step_ = step;
  next_layer_ = 0;
  next_moe_ = 0;
  delta_ = nullptr;
  windows_.clear();
  for (const Layer &layer : layers_) {
    bool known = false;
    for (const Window &window : windows_) known = known || window.rows == layer.window;
    // The same checks hold for writing: a row's own position is among those that it attends to.
    if (!known) windows_.push_back({layer.window, group_rows(attention_args(layer, nullptr))});
  }
  embed(step);
}

void Decoder::embed(const Step &step) {
  if (flat(embedding_)) return unpack_rows(packed(embedding_), step.token_ids, step.rows, workspace_.residual);
  kernels().rows->embed(
      {embedding_.data, type_of(embedding_), step.token_ids, workspace_.residual, step.rows, width_});
}

const std::vector<RowGroup> &Decoder::groups_of(const Layer &layer) const {
  for (const Window &window : windows_) {
    if (window.rows == layer.window) return window.groups;
  }
  throw std::logic_error("decoder: a layer runs outside a step");
}

void Decoder::project(const float *x, int64_t rows, std::initializer_list<Product> products) {
  const Timer timer(kernel_seconds_);
  std::array<PackedLinear, kMostProducts> linears;
  int64_t count = 0;
  for (const auto &[weight, y] : products) {
    if (!flat(weight)) {
      kernels().linear(linear_args(weight, x, rows, y));
      continue;
    }
    const QuantisedRows view = quantised_view(workspace_.quantised, rows, weight.inputs, weight.group);
    if (count == 0) quantise(x, weight.inputs, weight.inputs, view);
    linears[static_cast<size_t>(count++)] = {packed(weight), view, weight.bias, y, weight.outputs};
  }
  if (count > 0) packed_linear(linears.data(), count);
}

void Decoder::add_norm(const float *delta, const int64_t *pick, const Norm &norm, int64_t rows) {
  kernels().rows->add_norm({workspace_.residual, delta, pick, norm, workspace_.hidden, rows});
}

void Decoder::attend(const Layer &layer, float *query) {
  const Timer timer(kernel_seconds_);
  const std::vector<RowGroup> &groups = groups_of(layer);
  kernels().attention(attention_args(layer, query), groups.data(), static_cast<int64_t>(groups.size()));
}

void Decoder::run_mlp(const Mlp &mlp) {
  const int64_t rows = step_.rows, inner = mlp.gate.outputs;
  float *gate = workspace_.scratch, *up = gate + rows * inner;
  project(workspace_.hidden, rows, {{mlp.gate, gate}, {mlp.up, up}});
  kernels().rows->gate({gate, up, rows, inner});
  float *out = up, *scale = nullptr;
  project(gate, rows, {{mlp.down, out}});
  if (there(mlp.scale)) {
    scale = out + rows * width_;
    project(workspace_.hidden, rows, {{mlp.scale, scale}});
  }
  kernels().rows->add_scaled({workspace_.residual, out, scale, rows, width_});
}

void Decoder::route(const Layer &layer, int64_t moe) {
  const Weight &router = layer.router;
  const int64_t place = moe * step_.rows * workspace_.picks;
  project(workspace_.hidden, step_.rows, {{router, workspace_.scratch}});
  kernels().rows->route({workspace_.scratch, step_.rows, router.outputs, workspace_.picks, layer.routing,
                         workspace_.ids + place, workspace_.weights + place});
}

bool Decoder::run_experts(int64_t moe) {
  const KnownExperts *known = known_[static_cast<size_t>(moe)];
  if (known == nullptr || step_.rows > workspace_.known_rows) return false;
  const Timer timer(experts_seconds_);
  const int64_t place = moe * step_.rows * workspace_.picks;
  return run_known(*known, {workspace_.hidden, workspace_.ids + place, workspace_.weights + place, step_.rows,
                            workspace_.picks}, workspace_.outputs, workspace_.hidden);
}

int64_t Decoder::run(const float *delta) {
  delta_ = delta;
  while (next_layer_ < layers_.size()) {
    const Layer &layer = layers_[next_layer_++];
    run_layer(layer, delta_);
    delta_ = nullptr;
    if (!there(layer.router)) continue;
    const int64_t moe = next_moe_++;
    route(layer, moe);
    if (!run_experts(moe)) return moe;
    delta_ = workspace_.hidden;
  }
  return next_moe_;
}

void Decoder::run_layer(const Layer &layer, const float *delta) {
  const int64_t rows = step_.rows, wide = layer.heads * layer.head_dim, wide_kv = layer.heads_kv * layer.head_dim;
  float *q = workspace_.scratch, *k = q + rows * wide, *v = k + rows * wide_kv;
  add_norm(delta, nullptr, layer.input_norm, rows);
  project(workspace_.hidden, rows, {{layer.q, q}, {layer.k, k}, {layer.v, v}});
  kernels().rows->place_qkv({q, k, v, rows, layer.heads, layer.heads_kv, layer.head_dim, layer.q_norm, layer.k_norm,
                             layer.clip, rotation_.cos, rotation_.sin, layer.keys, layer.values,
                             step_.block_table, step_.row_sequence, step_.row_position, step_.max_blocks, block_size_});
  attend(layer, q);
  project(q, rows, {{layer.o, workspace_.hidden}});
  add_norm(workspace_.hidden, nullptr, layer.post_norm, rows);
  if (there(layer.mlp.gate)) run_mlp(layer.mlp);
}

void Decoder::logits(const int64_t *rows, int64_t count, float *out) {
  require(next_layer_ == layers_.size(), "logits before the last layer");
  for (int64_t i = 0; i < count; ++i) require(rows[i] >= 0 && rows[i] < step_.rows, "logits of a row that is not there");
  add_norm(delta_, rows, norm_, count);
  project(workspace_.hidden, count, {{head_, out}});
}

} // namespace moestro
