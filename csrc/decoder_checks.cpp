// What the decoder is given: refused where it would read or write outside its memory.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "decoder.h"

namespace moestro {
namespace {

bool divides(const Norm &norm, int64_t width, int64_t head_dim) {
  return norm.weight == nullptr || norm.width == width || norm.width == head_dim;
}

} // namespace

void Decoder::require(bool good, const std::string &what) {
  if (!good) throw std::invalid_argument("decoder: " + what);
}

void Decoder::check_weight(const Weight &weight, int64_t outputs, int64_t inputs, const char *name) const {
  require(there(weight) && weight.outputs == outputs && weight.inputs == inputs,
          std::string(name) + " is [" + std::to_string(weight.outputs) + ", " + std::to_string(weight.inputs) +
              "], expected [" + std::to_string(outputs) + ", " + std::to_string(inputs) + "]");
  if (flat(weight)) check_flat(weight);
}

void Decoder::check_flat(const Weight &weight) const {
  require(weight.group == group_of(weight.inputs), "a quantised matrix has another group than its inputs");
  check_quantised(weight.inputs);
}

void Decoder::check_quantised(int64_t inputs) const {
  require(quantised_bytes(workspace_.rows, inputs, group_of(inputs)) <= workspace_.quantised_size,
          "the workspace is too small for quantised rows");
}

void Decoder::check_mlp(const Mlp &mlp) const {
  const int64_t inner = mlp.gate.outputs;
  check_weight(mlp.gate, inner, width_, "gate");
  check_weight(mlp.up, inner, width_, "up");
  check_weight(mlp.down, width_, inner, "down");
  if (there(mlp.scale)) check_weight(mlp.scale, 1, width_, "scale");
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

void Decoder::know(int64_t moe, KnownExperts &experts) {
  require(moe >= 0 && moe < static_cast<int64_t>(known_.size()), "there is no such MoE layer");
  require(experts.shape.up.columns == width_ && experts.shape.down.rows == width_, "experts have another width");
  known_[static_cast<size_t>(moe)] = &experts;
}

void Decoder::fetch(Fetching *fetching, std::function<void()> look_up) {
  require(fetching == nullptr || std::none_of(known_.begin(), known_.end(), [](const KnownExperts *each) { return each == nullptr; }),
          "experts are fetched for layers of which all are known");
  fetching_ = fetching;
  look_up_ = std::move(look_up);
}

void Decoder::look_ahead(int64_t *ids, int64_t candidates, int64_t telling) {
  for (const Layer &layer : layers_) {
    require(!there(layer.router) || (workspace_.picks <= candidates && candidates <= layer.router.outputs),
            "fewer candidates than picks, or more than there are experts");
  }
  require(candidates <= workspace_.picks * width_, "the workspace is too small for candidates");
  require(telling >= 0 && telling <= workspace_.picks, "more candidates that tell than picks");
  ahead_ids_ = ids;
  ahead_candidates_ = candidates;
  ahead_telling_ = telling;
}

void Decoder::set_variant(int32_t slot, const Variant *variant) {
  std::unique_ptr<const Variant> own;
  if (variant != nullptr) {
    require(variant->layers.size() == layers_.size(), "a variant has another number of layers");
    for (size_t l = 0; l < layers_.size(); ++l) check_layer(variant->layers[l], layers_[l]);
    check_embedding(variant->embedding, embedding_);
    check_norm(variant->norm, norm_, "norm");
    check_change(variant->head, head_, "head");
    for (const Delta *delta : deltas_of(*variant)) check_quantised(delta->matrix.columns);
    own = std::make_unique<const Variant>(*variant);
  }
  step_ = Step{};
  segments_.clear();
  next_layer_ = layers_.size();
  if (own == nullptr) {
    variants_.erase(slot);
  } else {
    variants_[slot] = std::move(own);
  }
}

void Decoder::check_variant_ids(const Step &step, const RowRun &run) const {
  const Change &change = variants_.at(run.slot)->embedding;
  int64_t limit = 0;
  if (const auto *delta = std::get_if<Delta>(&change)) limit = delta->matrix.rows;
  if (const auto *weight = std::get_if<Weight>(&change)) limit = weight->outputs;
  if (limit == 0) return;
  const int64_t *ids = step.variant_ids == nullptr ? step.token_ids : step.variant_ids;
  for (int64_t row = run.first; row < run.end; ++row) {
    require(ids[row] >= 0 && ids[row] < limit, "token " + std::to_string(ids[row]) + " of a variant does not exist");
  }
}

void Decoder::check_runs(const Step &step) const {
  int64_t before = 0;
  for (const RowRun &run : step.runs) {
    require(before <= run.first && run.first < run.end && run.end <= step.rows, "runs are not ascending runs of rows");
    require(variants_.count(run.slot) == 1, "there is no variant in slot " + std::to_string(run.slot));
    for (const int64_t row : {run.first, run.end}) {
      require(row == 0 || row == step.rows || step.row_sequence[row - 1] != step.row_sequence[row],
              "a sequence is of two variants");
    }
    check_variant_ids(step, run);
    before = run.end;
  }
}

} // namespace moestro
