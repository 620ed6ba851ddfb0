// What fine-tunes add to the experts of one layer, each to some rows of an expert's job.
#pragma once

#include <vector>

#include "delta.h"

namespace moestro {

// Where the deltas of an expert's matrices lie in the plane that holds both, if it has them.
struct ExpertDeltaShape {
  bool has_up, has_down;
  DeltaShape up, down;
  int64_t up_at, down_at; // offsets in the plane
};

// Delta d adds to rows [firsts[d], ends[d]) of the lists, which are rows of job jobs[d] and of no other delta.
struct ExpertDeltas {
  int64_t count = 0;
  const ExpertDeltaShape *const *shapes = nullptr; // [shape_count]
  int64_t shape_count = 0;
  const int32_t *jobs = nullptr, *firsts = nullptr, *ends = nullptr, *shape = nullptr;
  const int64_t *planes = nullptr; // addresses
};

struct DeltaOfRows {
  int64_t first, end; // in the lists
  const ExpertDeltaShape *shape;
  Delta up, down; // where the shape has them
};

// The deltas in ascending order of their rows. Throws std::invalid_argument when one is wrong: of shapes other than
// [up_rows, up_columns] and [down_rows, down_columns], without a plane, or not on rows of its own within its job, which
// has rows [starts[job], starts[job + 1]).
std::vector<DeltaOfRows> deltas_of_rows(const ExpertDeltas &deltas, const PackedMatrix &up, const PackedMatrix &down,
                                        const int32_t *starts, int64_t jobs);

} // namespace moestro
