#include "known_experts.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "combine.h"

namespace moestro {
namespace {

// The fine-tune of each row, null for the base's. False when one is not known, or one of its picks.
bool find_deltas(const KnownExperts &experts, const RoutedRows &routed, std::vector<const KnownDeltas *> &of_row) {
  int64_t before = 0;
  for (int64_t r = 0; r < routed.run_count; before = routed.runs[r++].end) {
    const RowRun &run = routed.runs[r];
    if (run.first < before || run.end < run.first || run.end > routed.rows) {
      throw std::invalid_argument("known experts: runs are not ascending runs of rows");
    }
    const auto found = experts.deltas.find(run.slot);
    if (found == experts.deltas.end()) return false;
    const KnownDeltas &deltas = found->second;
    const bool known = std::all_of(routed.ids + run.first * routed.picks, routed.ids + run.end * routed.picks,
                                   [&](int64_t id) { return deltas.planes[id] != 0; });
    if (!known) return false;
    std::fill(of_row.begin() + run.first, of_row.begin() + run.end, &deltas);
  }
  return true;
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

// The deltas that are on rows of jobs. Rows of one fine-tune follow each other in a job, as they do in the step.
struct Deltas {
  std::vector<const ExpertDeltaShape *> shapes;
  std::vector<int32_t> jobs, firsts, ends;
  std::vector<int32_t> shape;
  std::vector<int64_t> planes;

  Deltas(const Jobs &all, const RoutedRows &routed, const std::vector<const KnownDeltas *> &of_row) {
    for (int32_t job = 0; job < static_cast<int32_t>(all.levels.size()); ++job) {
      const int64_t expert = routed.ids[all.places[all.starts[job]]];
      const KnownDeltas *last = nullptr;
      for (int32_t i = all.starts[job]; i < all.starts[job + 1]; ++i) {
        const KnownDeltas *deltas = of_row[all.rows[i]];
        if (deltas != nullptr && deltas->planes[expert] == kUnchanged) deltas = nullptr;
        if (deltas != nullptr && deltas == last) ++ends.back();
        if (deltas != nullptr && deltas != last) add(job, i, deltas->shape, deltas->planes[expert]);
        last = deltas;
      }
    }
  }

  ExpertDeltas view() const {
    const auto count = static_cast<int64_t>(jobs.size());
    return {count, shapes.data(), count, jobs.data(), firsts.data(), ends.data(), shape.data(), planes.data()};
  }

private:
  void add(int32_t job, int32_t first, const ExpertDeltaShape &of, int64_t plane) {
    shape.push_back(static_cast<int32_t>(shapes.size()));
    shapes.push_back(&of);
    jobs.push_back(job);
    firsts.push_back(first);
    ends.push_back(first + 1);
    planes.push_back(plane);
  }
};

} // namespace

bool picks_known(const KnownExperts &experts, const int64_t *ids, int64_t count) {
  return std::all_of(ids, ids + count, [&](int64_t id) {
    return id >= 0 && id < experts.count && experts.planes[id * kPlanes] != 0;
  });
}

bool every_known(const KnownExperts &experts) {
  for (int64_t id = 0; id < experts.count; ++id) {
    if (experts.planes[id * kPlanes] == 0) return false;
  }
  return true;
}

bool all_known(const KnownExperts &experts, const RoutedRows &routed) {
  std::vector<const KnownDeltas *> of_row(static_cast<size_t>(routed.rows), nullptr);
  return picks_known(experts, routed.ids, routed.rows * routed.picks) && find_deltas(experts, routed, of_row);
}

bool run_known(const KnownExperts &experts, const RoutedRows &routed, float *outputs, float *sums) {
  if (!picks_known(experts, routed.ids, routed.rows * routed.picks)) return false;
  std::vector<const KnownDeltas *> of_row(static_cast<size_t>(routed.rows), nullptr);
  if (!find_deltas(experts, routed, of_row)) return false;
  const Jobs jobs(experts, routed);
  const Deltas deltas(jobs, routed, of_row);
  const int64_t width = experts.shape.down.rows, inputs = experts.shape.up.columns;
  run_experts(experts.shape, jobs.view(), {routed.hidden, inputs, routed.rows},
              {outputs, width, routed.rows * routed.picks}, deltas.view());
  combine(outputs, routed.weights, sums, routed.rows, routed.picks, width);
  return true;
}

} // namespace moestro
