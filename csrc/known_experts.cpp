#include "known_experts.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "combine.h"

namespace moestro {
namespace {

bool all_known(const KnownExperts &experts, const RoutedRows &routed) {
  return std::all_of(routed.ids, routed.ids + routed.rows * routed.picks, [&](int64_t id) {
    return id >= 0 && id < experts.count && experts.planes[id * kPlanes] != 0;
  });
}

// One job for each distinct expert.
struct Jobs {
  std::vector<int64_t> planes;
  std::vector<int32_t> levels, starts, rows, places;

  Jobs(const KnownExperts &experts, const RoutedRows &routed) : places(static_cast<size_t>(routed.rows * routed.picks)) {
    const int64_t *ids = routed.ids;
    std::iota(places.begin(), places.end(), 0);
    std::stable_sort(places.begin(), places.end(), [ids](int32_t a, int32_t b) { return ids[a] < ids[b]; });
    for (size_t i = 0; i < places.size(); ++i) {
      rows.push_back(places[i] / static_cast<int32_t>(routed.picks));
      if (i > 0 && ids[places[i]] == ids[places[i - 1]]) continue;
      const int64_t *from = experts.planes + ids[places[i]] * kPlanes;
      planes.insert(planes.end(), from, from + kPlanes);
      levels.push_back(experts.level);
      starts.push_back(static_cast<int32_t>(i));
    }
    starts.push_back(static_cast<int32_t>(places.size()));
  }

  ExpertJobs view() const {
    return {static_cast<int64_t>(levels.size()), planes.data(), levels.data(),
            starts.data(), rows.data(), places.data(), static_cast<int64_t>(places.size())};
  }
};

} // namespace

bool run_known(const KnownExperts &experts, const RoutedRows &routed, float *outputs, float *sums) {
  if (!all_known(experts, routed)) return false;
  const Jobs jobs(experts, routed);
  const int64_t width = experts.shape.down.rows, inputs = experts.shape.up.columns;
  run_experts(experts.shape, jobs.view(), {routed.hidden, inputs, routed.rows},
              {outputs, width, routed.rows * routed.picks});
  combine(outputs, routed.weights, sums, routed.rows, routed.picks, width);
  return true;
}

} // namespace moestro
