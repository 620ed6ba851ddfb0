#include "variants.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace moestro {
namespace {

void require(bool good, const char *part, const std::string &what) {
  if (!good) throw std::invalid_argument("variant: " + std::string(part) + " " + what);
}

} // namespace

std::vector<Segment> segments_of(const std::vector<RowRun> &runs, int64_t rows,
                                 const std::map<int32_t, std::unique_ptr<const Variant>> &variants) {
  std::vector<Segment> segments;
  int64_t before = 0;
  for (const RowRun &run : runs) {
    if (before < run.first) segments.push_back({nullptr, before, run.first});
    segments.push_back({variants.at(run.slot).get(), run.first, run.end});
    before = run.end;
  }
  if (before < rows) segments.push_back({nullptr, before, rows});
  return segments;
}

std::vector<Segment> segments_of(const int64_t *rows, int64_t count, const std::vector<Segment> &segments) {
  std::vector<Segment> places;
  const Segment *last = nullptr;
  for (int64_t i = 0; i < count; ++i) {
    const auto found = std::partition_point(segments.begin(), segments.end(),
                                            [&](const Segment &segment) { return segment.end <= rows[i]; });
    if (&*found != last) places.push_back({found->variant, i, i});
    places.back().end = i + 1;
    last = &*found;
  }
  return places;
}

void check_change(const Change &change, const Weight &base, const char *part) {
  if (std::holds_alternative<std::monostate>(change)) return;
  require(there(base), part, "is changed, which the base does not have");
  if (const auto *delta = std::get_if<Delta>(&change)) {
    const PackedMatrix &matrix = delta->matrix;
    require(matrix.rows == base.outputs && matrix.columns == base.inputs, part, "has another shape than the base's");
    require(matrix.group == group_of(base.inputs), part, "has another group than its inputs");
    return;
  }
  const Weight &weight = std::get<Weight>(change);
  require(there(weight) && !flat(weight), part, "is replaced by a matrix that is none or is quantised");
  require(weight.outputs == base.outputs && weight.inputs == base.inputs, part, "has another shape than the base's");
}

std::vector<const Delta *> deltas_of(const Variant &variant) {
  using Part = Change VariantLayer::*;
  using Changes = VariantLayer;
  constexpr Part kParts[] = {&Changes::q,  &Changes::k,    &Changes::v,     &Changes::o,     &Changes::gate,
                             &Changes::up, &Changes::down, &Changes::scale, &Changes::router};
  std::vector<const Delta *> deltas;
  const auto take = [&](const Change &change) {
    if (const auto *delta = std::get_if<Delta>(&change)) deltas.push_back(delta);
  };
  take(variant.head);
  for (const VariantLayer &layer : variant.layers) {
    for (const Part part : kParts) take(layer.*part);
  }
  return deltas;
}

void check_norm(const Norm &changed, const Norm &base, const char *part) {
  if (changed.weight == nullptr) return;
  require(base.weight != nullptr && changed.width == base.width, part, "has another width than the base's");
}

void check_layer(const VariantLayer &changed, const Layer &base) {
  check_norm(changed.input_norm, base.input_norm, "input_norm");
  check_norm(changed.post_norm, base.post_norm, "post_norm");
  check_norm(changed.q_norm, base.q_norm, "q_norm");
  check_norm(changed.k_norm, base.k_norm, "k_norm");
  check_change(changed.q, base.q, "q");
  check_change(changed.k, base.k, "k");
  check_change(changed.v, base.v, "v");
  check_change(changed.o, base.o, "o");
  check_change(changed.gate, base.mlp.gate, "gate");
  check_change(changed.up, base.mlp.up, "up");
  check_change(changed.down, base.mlp.down, "down");
  check_change(changed.scale, base.mlp.scale, "scale");
  check_change(changed.router, base.router, "router");
  require(changed.sinks == nullptr || base.sinks != nullptr, "sinks", "are changed, which the base does not have");
}

void check_embedding(const Change &change, const Weight &base) {
  if (const auto *delta = std::get_if<Delta>(&change)) {
    require(delta->matrix.columns == base.inputs, "embedding", "has another width than the base's");
  }
  if (const auto *weight = std::get_if<Weight>(&change)) {
    require(there(*weight) && !flat(*weight) && weight->inputs == base.inputs, "embedding",
            "is replaced by a matrix that does not fit");
  }
}

} // namespace moestro
