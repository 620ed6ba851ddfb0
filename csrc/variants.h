// Fine-tunes of a decoder: what each changes in the decoder of its base, and which rows of a step are whose.
#pragma once

#include <map>
#include <memory>
#include <variant>
#include <vector>

#include "delta.h"
#include "known_experts.h"
#include "layers.h"

namespace moestro {

// What becomes of a matrix: nothing, a delta is added to its results, or another one takes its place.
using Change = std::variant<std::monostate, Delta, Weight>;

// What changes in a layer. Norms without a weight, and sinks that are null, are the base's.
struct VariantLayer {
  Norm input_norm{}, post_norm{}, q_norm{}, k_norm{};
  Change q, k, v, o, gate, up, down, scale, router;
  const float *sinks = nullptr;
};

struct Variant {
  Change embedding, head;
  Norm norm{};
  std::vector<VariantLayer> layers;
};

// Rows [first, end) of a step. Null: the base's.
struct Segment {
  const Variant *variant;
  int64_t first, end;
  int64_t rows() const { return end - first; }
};

// All rows of a step, in order.
std::vector<Segment> segments_of(const std::vector<RowRun> &runs, int64_t rows,
                                 const std::map<int32_t, std::unique_ptr<const Variant>> &variants);
// Places in a list of rows, cut where the next row belongs to another of the segments.
std::vector<Segment> segments_of(const int64_t *rows, int64_t count, const std::vector<Segment> &segments);

inline const Norm &either(const Norm &changed, const Norm &base) { return changed.weight == nullptr ? base : changed; }

// Those that rows are multiplied with.
std::vector<const Delta *> deltas_of(const Variant &variant);

// Throws std::invalid_argument, naming the part, when a change does not fit what it changes.
void check_change(const Change &change, const Weight &base, const char *part);
void check_norm(const Norm &changed, const Norm &base, const char *part);
void check_layer(const VariantLayer &changed, const Layer &base);
// A lookup needs no more than the base's width; a delta of it may have more rows than are there to be looked up.
void check_embedding(const Change &change, const Weight &base);

} // namespace moestro
