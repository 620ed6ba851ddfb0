#include "expert_deltas.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace moestro {
namespace {

void require(bool good, int64_t number, const char *what) {
  if (!good) throw std::invalid_argument("experts: delta " + std::to_string(number) + " " + what);
}

bool fits(const DeltaShape &shape, const PackedMatrix &matrix) {
  return shape.rows == matrix.rows && shape.columns == matrix.columns && shape.group == matrix.group;
}

DeltaOfRows delta_of_rows(const ExpertDeltas &deltas, int64_t d) {
  const ExpertDeltaShape *shape = deltas.shapes[deltas.shape[d]];
  DeltaOfRows delta{deltas.firsts[d], deltas.ends[d], shape, {}, {}};
  const auto *plane = reinterpret_cast<const uint8_t *>(deltas.planes[d]);
  if (shape->has_up) delta.up = delta_at(shape->up, plane + shape->up_at);
  if (shape->has_down) delta.down = delta_at(shape->down, plane + shape->down_at);
  return delta;
}

} // namespace

std::vector<DeltaOfRows> deltas_of_rows(const ExpertDeltas &deltas, const PackedMatrix &up, const PackedMatrix &down,
                                        const int32_t *starts, int64_t jobs) {
  std::vector<DeltaOfRows> all;
  all.reserve(static_cast<size_t>(deltas.count));
  for (int64_t d = 0; d < deltas.count; ++d) {
    const int32_t job = deltas.jobs[d];
    require(job >= 0 && job < jobs, d, "is of a job that does not exist");
    require(starts[job] <= deltas.firsts[d] && deltas.firsts[d] <= deltas.ends[d] && deltas.ends[d] <= starts[job + 1],
            d, "is on rows that are not its job's");
    require(deltas.shape[d] >= 0 && deltas.shape[d] < deltas.shape_count, d, "has a shape that does not exist");
    const ExpertDeltaShape &shape = *deltas.shapes[deltas.shape[d]];
    require((!shape.has_up || fits(shape.up, up)) && (!shape.has_down || fits(shape.down, down)), d,
            "has another shape than the matrices");
    if (!(shape.has_up || shape.has_down) || deltas.firsts[d] == deltas.ends[d]) continue;
    require(deltas.planes[d] != 0, d, "has no plane");
    all.push_back(delta_of_rows(deltas, d));
  }
  std::sort(all.begin(), all.end(), [](const DeltaOfRows &a, const DeltaOfRows &b) { return a.first < b.first; });
  for (size_t d = 1; d < all.size(); ++d) {
    if (all[d].first < all[d - 1].end) throw std::invalid_argument("experts: two deltas are on the same rows");
  }
  return all;
}

} // namespace moestro
