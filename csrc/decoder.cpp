#include "decoder.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "clock.h"
#include "dispatch.h"
#include "unpack.h"

namespace moestro {
namespace {

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

// An input of several matrices, quantised when the first of them needs it.
class SharedInput {
public:
  SharedInput(const float *x, void *memory) : x_(x), memory_(memory) {}

  const QuantisedRows &quantised(int64_t rows, int64_t columns, int32_t group) {
    if (done_) return view_;
    view_ = quantised_view(memory_, rows, columns, group);
    quantise(x_, columns, columns, view_);
    done_ = true;
    return view_;
  }

private:
  const float *x_;
  void *memory_;
  QuantisedRows view_{};
  bool done_ = false;
};

QuantisedRows rows_of(const QuantisedRows &all, int64_t first, int64_t rows) {
  return {all.codes + first * all.columns, all.scales + first * (all.columns / all.group), rows, all.columns, all.group};
}

// Adds the time until it goes to a sum of seconds.
class Timer {
public:
  explicit Timer(double &sum) : sum_(sum), start_(now()) {}
  ~Timer() { sum_ += now() - start_; }
  Timer(const Timer &) = delete;
  Timer &operator=(const Timer &) = delete;

private:
  double &sum_;
  double start_;
};

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
  check_runs(step);
  step_ = step;
  segments_ = segments_of(step.runs, step.rows, variants_);
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
  if (flat(embedding_)) {
    unpack_rows(packed(embedding_), step.token_ids, step.rows, workspace_.residual);
  } else {
    kernels().rows->embed(
        {embedding_.data, type_of(embedding_), step.token_ids, workspace_.residual, step.rows, width_});
  }
  for (const Segment &segment : segments_) {
    if (segment.variant != nullptr) embed_variant(segment);
  }
}

void Decoder::embed_variant(const Segment &segment) {
  const int64_t *ids = (step_.variant_ids == nullptr ? step_.token_ids : step_.variant_ids) + segment.first;
  float *out = workspace_.residual + segment.first * width_;
  if (const auto *delta = std::get_if<Delta>(&segment.variant->embedding)) {
    add_delta_rows(*delta, ids, segment.rows(), out);
  }
  if (const auto *weight = std::get_if<Weight>(&segment.variant->embedding)) {
    kernels().rows->embed({weight->data, type_of(*weight), ids, out, segment.rows(), width_});
  }
}

const std::vector<RowGroup> &Decoder::groups_of(const Layer &layer) const {
  for (const Window &window : windows_) {
    if (window.rows == layer.window) return window.groups;
  }
  throw std::logic_error("decoder: a layer runs outside a step");
}

const Change &Decoder::change_of(const Segment &segment, const Product &product) const {
  static const Change nothing;
  if (segment.variant == nullptr) return nothing;
  return product.part == nullptr ? segment.variant->head : segment.variant->layers[layer_].*product.part;
}

void Decoder::project(const float *x, int64_t rows, const std::vector<Segment> &segments, Products products) {
  const Timer timer(kernel_seconds_);
  SharedInput input(x, workspace_.quantised);
  std::vector<PackedLinear> linears, deltas;
  for (const Product &product : products) {
    const Weight &weight = product.weight;
    if (flat(weight)) {
      const QuantisedRows &all = input.quantised(rows, weight.inputs, weight.group);
      linears.push_back({packed(weight), all, weight.bias, product.y, weight.outputs});
    } else {
      kernels().linear(linear_args(weight, x, rows, product.y));
    }
  }
  if (!linears.empty()) packed_linear(linears.data(), static_cast<int64_t>(linears.size()));
  for (const Segment &segment : segments) {
    for (const Product &product : products) {
      const Change &change = change_of(segment, product);
      const int64_t inputs = product.weight.inputs, outputs = product.weight.outputs;
      float *y = product.y + segment.first * outputs;
      if (const auto *delta = std::get_if<Delta>(&change)) {
        const QuantisedRows &all = input.quantised(rows, inputs, delta->matrix.group);
        deltas.push_back(linear_of(*delta, rows_of(all, segment.first, segment.rows()), y, outputs));
      }
      if (const auto *weight = std::get_if<Weight>(&change)) {
        kernels().linear(linear_args(*weight, x + segment.first * inputs, segment.rows(), y));
      }
    }
  }
  if (!deltas.empty()) packed_linear(deltas.data(), static_cast<int64_t>(deltas.size()));
}

const VariantLayer &Decoder::changed(const Segment &segment) const {
  static const VariantLayer nothing;
  return segment.variant == nullptr ? nothing : segment.variant->layers[layer_];
}

void Decoder::add_norm(const float *delta, Norm VariantLayer::*part, const Norm &norm) {
  for (const Segment &segment : segments_) {
    const int64_t start = segment.first * width_;
    kernels().rows->add_norm({workspace_.residual + start, delta == nullptr ? nullptr : delta + start, nullptr,
                              either(changed(segment).*part, norm), workspace_.hidden + start, segment.rows()});
  }
}

void Decoder::place_qkv(const Layer &layer, float *q, float *k, float *v) {
  const int64_t wide = layer.heads * layer.head_dim, wide_kv = layer.heads_kv * layer.head_dim;
  for (const Segment &segment : segments_) {
    const int64_t first = segment.first;
    const VariantLayer &change = changed(segment);
    kernels().rows->place_qkv({q + first * wide, k + first * wide_kv, v + first * wide_kv, segment.rows(), layer.heads,
                               layer.heads_kv, layer.head_dim, either(change.q_norm, layer.q_norm),
                               either(change.k_norm, layer.k_norm), layer.clip, rotation_.cos, rotation_.sin,
                               layer.keys, layer.values, step_.block_table, step_.row_sequence + first,
                               step_.row_position + first, step_.max_blocks, block_size_});
  }
}

void Decoder::attend(const Layer &layer, float *query) {
  const Timer timer(kernel_seconds_);
  const std::vector<RowGroup> &groups = groups_of(layer);
  AttentionArgs args = attention_args(layer, query);
  const bool same = std::none_of(segments_.begin(), segments_.end(),
                                 [&](const Segment &segment) { return changed(segment).sinks != nullptr; });
  if (same) return kernels().attention(args, groups.data(), static_cast<int64_t>(groups.size()));
  auto group = groups.begin();
  for (const Segment &segment : segments_) {
    const auto end = std::find_if(group, groups.end(), [&](const RowGroup &g) { return g.first >= segment.end; });
    const float *sinks = changed(segment).sinks;
    args.sinks = sinks == nullptr ? layer.sinks : sinks;
    kernels().attention(args, &*group, end - group);
    group = end;
  }
}

void Decoder::run_mlp(const Mlp &mlp) {
  const int64_t rows = step_.rows, inner = mlp.gate.outputs;
  float *gate = workspace_.scratch, *up = gate + rows * inner;
  project(workspace_.hidden, {{mlp.gate, gate, &VariantLayer::gate}, {mlp.up, up, &VariantLayer::up}});
  kernels().rows->gate({gate, up, rows, inner});
  float *out = up, *scale = nullptr;
  project(gate, {{mlp.down, out, &VariantLayer::down}});
  if (there(mlp.scale)) {
    scale = out + rows * width_;
    project(workspace_.hidden, {{mlp.scale, scale, &VariantLayer::scale}});
  }
  kernels().rows->add_scaled({workspace_.residual, out, scale, rows, width_});
}

void Decoder::route(const Layer &layer, int64_t moe) {
  const Weight &router = layer.router;
  const int64_t place = moe * step_.rows * workspace_.picks;
  project(workspace_.hidden, {{router, workspace_.scratch, &VariantLayer::router}});
  kernels().rows->route({workspace_.scratch, step_.rows, router.outputs, workspace_.picks, layer.routing,
                         workspace_.ids + place, workspace_.weights + place});
  if (step_.given_ids == nullptr) return;
  const int64_t places = step_.rows * workspace_.picks;
  std::copy_n(step_.given_ids + place, places, workspace_.ids + place);
  std::copy_n(step_.given_weights + place, places, workspace_.weights + place);
}

bool Decoder::run_experts(int64_t moe) {
  const KnownExperts *known = known_[static_cast<size_t>(moe)];
  if (known == nullptr || step_.rows > workspace_.known_rows) return false;
  const Timer timer(experts_seconds_);
  return run_known(*known, routed_rows(moe), workspace_.outputs, workspace_.hidden);
}

// As `run_experts`, at lower levels where that is allowed.
bool Decoder::run_lower(int64_t moe) {
  if (allowance_ == nullptr || !step_.runs.empty()) return false;
  const Timer timer(experts_seconds_);
  return allowance_->compute(moe, routed_rows(moe), workspace_.outputs, workspace_.hidden);
}

RoutedRows Decoder::routed_rows(int64_t moe) const {
  const int64_t place = moe * step_.rows * workspace_.picks;
  return {workspace_.hidden,  workspace_.ids + place,  workspace_.weights + place,             step_.rows,
          workspace_.picks, step_.runs.data(), static_cast<int64_t>(step_.runs.size())};
}

bool Decoder::fetches() const {
  return fetching_ != nullptr && fetching_->lends() && step_.rows == 1 && step_.runs.empty();
}

// As `run_experts`, reading what is not known.
bool Decoder::fetch_experts(int64_t moe) {
  const RoutedRows routed = routed_rows(moe);
  if (!fetching_->ask(moe, known_, routed)) return false;
  const size_t next = next_routed();
  const int64_t candidates = fetching_->candidates();
  if (candidates > 0 && next < layers_.size() && !every_known(*known_[static_cast<size_t>(moe) + 1])) {
    looked_.resize(static_cast<size_t>(candidates));
    ask_router(next, looked_.data(), candidates);
    fetching_->look(moe + 1, known_, looked_.data());
  }
  const Timer timer(experts_seconds_);
  return fetching_->compute(known_, routed, workspace_.outputs, workspace_.hidden, look_up_);
}

// The next layer that has a router; the number of layers where there is none.
size_t Decoder::next_routed() const {
  size_t next = next_layer_;
  while (next < layers_.size() && !there(layers_[next].router)) ++next;
  return next;
}

// Looks ahead from MoE layer `moe`; whether one of the experts that tell is not known.
bool Decoder::lacks_ahead(int64_t moe) {
  seen_rows_ = 0;
  const size_t next = next_routed();
  if (ahead_ids_ == nullptr || step_.rows > workspace_.known_rows || next == layers_.size()) return false;
  const KnownExperts *known = known_[static_cast<size_t>(moe) + 1];
  if (known != nullptr && every_known(*known)) return false;
  ask_router(next, ahead_ids_, ahead_candidates_);
  seen_rows_ = step_.rows;
  if (known == nullptr) return false;
  for (int64_t row = 0; row < step_.rows; ++row) {
    const int64_t *ids = ahead_ids_ + row * ahead_candidates_;
    if (!picks_known(*known, ids, ahead_telling_)) return true;
  }
  return false;
}

// What the router of a layer would pick if the hidden state stayed as it is.
void Decoder::ask_router(size_t layer, int64_t *ids, int64_t candidates) {
  const Weight &router = layers_[layer].router;
  const size_t here = layer_;
  layer_ = layer; // whose changes by fine-tunes count
  project(workspace_.hidden, {{router, workspace_.scratch, &VariantLayer::router}});
  layer_ = here;
  // The weights are of no use; outputs are not in use yet.
  kernels().rows->route({workspace_.scratch, step_.rows, router.outputs, candidates, Routing::pick_then_softmax, ids,
                         workspace_.outputs});
}

int64_t Decoder::run(const float *delta, int64_t stop) {
  if (!fetches()) return run_on(delta, stop, false);
  try {
    const int64_t reached = run_on(delta, stop, true);
    fetching_->stop(known_);
    return reached;
  } catch (...) {
    fetching_->stop(known_);
    throw;
  }
}

int64_t Decoder::run_on(const float *delta, int64_t stop, bool fetch) {
  delta_ = delta;
  while (next_layer_ < layers_.size()) {
    layer_ = next_layer_++;
    const Layer &layer = layers_[layer_];
    run_layer(layer, delta_);
    delta_ = nullptr;
    if (!there(layer.router)) continue;
    const int64_t moe = next_moe_++;
    route(layer, moe);
    if (fetch ? moe == stop || !fetch_experts(moe)
              : lacks_ahead(moe) || moe == stop || !(run_experts(moe) || run_lower(moe))) {
      return moe;
    }
    delta_ = workspace_.hidden;
  }
  return next_moe_;
}

void Decoder::run_layer(const Layer &layer, const float *delta) {
  const int64_t rows = step_.rows, wide = layer.heads * layer.head_dim, wide_kv = layer.heads_kv * layer.head_dim;
  float *q = workspace_.scratch, *k = q + rows * wide, *v = k + rows * wide_kv;
  add_norm(delta, &VariantLayer::input_norm, layer.input_norm);
  project(workspace_.hidden, {{layer.q, q, &VariantLayer::q}, {layer.k, k, &VariantLayer::k}, {layer.v, v, &VariantLayer::v}});
  place_qkv(layer, q, k, v);
  attend(layer, q);
  project(q, {{layer.o, workspace_.hidden, &VariantLayer::o}});
  add_norm(workspace_.hidden, &VariantLayer::post_norm, layer.post_norm);
  if (there(layer.mlp.gate)) run_mlp(layer.mlp);
}

void Decoder::logits(const int64_t *rows, int64_t count, float *out) {
  require(next_layer_ == layers_.size(), "logits before the last layer");
  for (int64_t i = 0; i < count; ++i) require(rows[i] >= 0 && rows[i] < step_.rows, "logits of a row that is not there");
  // All rows before any is normed: what is to be added may lie in workspace.hidden.
  if (delta_ != nullptr) kernels().rows->add_scaled({workspace_.residual, delta_, nullptr, step_.rows, width_});
  delta_ = nullptr;
  const std::vector<Segment> picked = segments_of(rows, count, segments_);
  for (const Segment &segment : picked) {
    const Norm &norm = segment.variant == nullptr ? norm_ : either(segment.variant->norm, norm_);
    kernels().rows->add_norm({workspace_.residual, nullptr, rows + segment.first, norm,
                              workspace_.hidden + segment.first * width_, segment.rows()});
  }
  project(workspace_.hidden, count, picked, {{head_, out, nullptr}});
}

} // namespace moestro
