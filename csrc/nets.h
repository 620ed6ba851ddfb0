// Small nets that foresee routing (moestro.policy.predictors.folded): what goes into their inner layers is kept as
// sums, so that a row of few experts changes few of them, and the outputs of all horizons are computed in one pass.
//
// Widths are multiples of 8 and the number of experts of 32: whoever lays out weights fills up with zeros. Weights that
// are multiplied are halves (IEEE binary16): reading them is what a decision costs.
#pragma once

#include <cstdint>

namespace moestro {

// Outputs are computed so many at a time.
constexpr int64_t kTileExperts = 32;

constexpr int64_t kMostParts = 16;

// What follows a request: of each layer the features of every expert's own history (averages of use, the recency, the
// latest weight), then for each role its sums: one for each average and, for each view, what the layer's latest weights
// add to the net that looks at it from there.
struct NetShape {
  int64_t layers, experts, averages, views;
  float decays[kMostParts], gains[kMostParts]; // of the averages; the first one is the last visit alone
  int64_t offsets[kMostParts];                 // of each view: the layer it looks at, counted from the net's own
  float fade;                                  // of the recency

  int64_t features() const { return averages + 2; }
  int64_t parts() const { return averages + views; }
};

// One role's nets, of all layers. `rows`: [layers, experts, parts, width], by which uses and weights of an expert count;
// `recency`: [layers, experts, width]; `bias`: [layers, width]; `outputs`: [layers, horizons, tiles,
// 1 + features + width, kTileExperts], rows of a constant, of the own history, of the inner layer. Its sums begin `at`.
struct NetRole {
  const void *rows, *recency, *outputs;
  const float *bias;
  int64_t width, horizons, at;
};

struct Nets {
  NetShape shape;
  const NetRole *roles;
  float *state; // of all requests: [places, layers, stride]
  int64_t stride;
};

// Rows of one request, of ids and weights [rows, picks], went through the layer one after another. A row's weights are
// made to add up to 1. The sums of the first `kept` roles are kept up to date.
struct NetVisit {
  int64_t layer, place, kept;
  const int64_t *ids;
  const float *weights;
  int64_t rows, picks;
};

// out[horizons, experts]: that at least one of the requests uses the expert. `inner` and `lines` are room for a role's
// width for each request; behind them `lines` has room for one number for each request.
struct NetQuestion {
  int64_t layer, role;
  const int64_t *places;
  int64_t count;
  float *inner;
  int64_t *lines;
  float *out;
};

struct NetTable {
  void (*follow)(const Nets &, const NetVisit &);
  // A role's sums of all layers, from the own history alone.
  void (*rebuild)(const Nets &, int64_t place, int64_t role);
  void (*answer)(const Nets &, const NetQuestion &);
};

#define MOESTRO_DECLARE_NETS(isa)                                                                                      \
  namespace isa {                                                                                                      \
  extern const NetTable net_table;                                                                                     \
  }
MOESTRO_DECLARE_NETS(scalar)
MOESTRO_DECLARE_NETS(avx2)
MOESTRO_DECLARE_NETS(avx512)
#undef MOESTRO_DECLARE_NETS

} // namespace moestro
