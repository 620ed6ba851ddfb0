// The experts of a layer for steps that need nothing to be read: where their planes lie is known.
#pragma once

#include "experts.h"

namespace moestro {

struct KnownExperts {
  ExpertShape shape;
  const int64_t *planes; // [count, kPlanes], addresses; 0 in front of an expert of which they are not known
  int64_t count;
  int32_t level;
};

// The experts that a router has picked for some rows.
struct RoutedRows {
  const float *hidden;  // [rows, width]
  const int64_t *ids;   // [rows, picks]
  const float *weights; // [rows, picks]
  int64_t rows, picks;
};

// sums [rows, width]: the weighted sums of the rows' experts, in ascending k. `outputs` is room for [rows * picks,
// width]; `sums` may be `hidden`. Returns false, and computes nothing, when an expert is not known.
bool run_known(const KnownExperts &experts, const RoutedRows &routed, float *outputs, float *sums);

} // namespace moestro
