#include "known_experts.h"

#include <algorithm>
#include <chrono>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "clock.h"
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

// The places of all picks, ascending for each expert.
std::vector<int32_t> places_by_expert(const RoutedRows &routed) {
  std::vector<int32_t> places(static_cast<size_t>(routed.rows * routed.picks));
  std::iota(places.begin(), places.end(), 0);
  std::stable_sort(places.begin(), places.end(),
                   [ids = routed.ids](int32_t a, int32_t b) { return ids[a] < ids[b]; });
  return places;
}

// One job for each distinct expert of some places, which are in the order of `places_by_expert`.
struct Jobs {
  std::vector<int64_t> planes;
  std::vector<int32_t> levels, starts, rows, places;

  Jobs(const KnownExperts &experts, const RoutedRows &routed, std::vector<int32_t> of) : places(std::move(of)) {
    const int64_t *ids = routed.ids;
    for (size_t i = 0; i < places.size(); ++i) {
      rows.push_back(places[i] / static_cast<int32_t>(routed.picks));
      if (i > 0 && ids[places[i]] == ids[places[i - 1]]) continue;
      const int64_t *from = experts.planes + ids[places[i]] * kPlanes;
      planes.insert(planes.end(), from, from + kPlanes);
      levels.push_back(experts.levels[static_cast<size_t>(ids[places[i]]) % experts.levels.size()]);
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

// Unweighted outputs of jobs, each at its place.
void run_jobs(const KnownExperts &experts, const RoutedRows &routed, const Jobs &jobs, float *outputs,
              const ExpertDeltas &deltas) {
  run_experts(experts.shape, jobs.view(), {routed.hidden, experts.shape.up.columns, routed.rows},
              {outputs, experts.shape.down.rows, routed.rows * routed.picks}, deltas);
}

constexpr std::chrono::milliseconds kLookUpEvery{50};

constexpr int64_t kLeftOut = -1;

void check_ids(const KnownExperts &experts, const RoutedRows &routed) {
  for (int64_t place = 0; place < routed.rows * routed.picks; ++place) {
    const int64_t id = routed.ids[place];
    if (id == kLeftOut || (id >= 0 && id < experts.count)) continue;
    throw std::invalid_argument("known experts: expert " + std::to_string(id) + " does not exist");
  }
}

// Takes places that are left out from the beginning of the list; nothing is added for them.
void leave_out(const KnownExperts &experts, const RoutedRows &routed, std::vector<int32_t> &places, float *outputs) {
  const auto kept = std::find_if(places.begin(), places.end(), [&](int32_t place) { return routed.ids[place] != kLeftOut; });
  const int64_t width = experts.shape.down.rows;
  std::for_each(places.begin(), kept, [&](int32_t place) { std::fill_n(outputs + place * width, width, 0.0F); });
  places.erase(places.begin(), kept);
}

// `here` of each expert: whether it has come.
void note(KnownExperts &experts, const Arrival &arrival, std::vector<char> &here) {
  if (arrival.expert < 0 || arrival.expert >= experts.count) {
    throw std::invalid_argument("known experts: expert " + std::to_string(arrival.expert) + " came, and does not exist");
  }
  std::copy(arrival.planes, arrival.planes + kPlanes, experts.planes + arrival.expert * kPlanes);
  here[static_cast<size_t>(arrival.expert)] = 1;
}

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
  const Jobs jobs(experts, routed, places_by_expert(routed));
  const Deltas deltas(jobs, routed, of_row);
  run_jobs(experts, routed, jobs, outputs, deltas.view());
  combine(outputs, routed.weights, sums, routed.rows, routed.picks, experts.shape.down.rows);
  return true;
}

void run_listed(const KnownExperts &experts, const RoutedRows &routed, float *outputs, float *sums) {
  std::vector<int32_t> places = places_by_expert(routed);
  leave_out(experts, routed, places, outputs);
  if (!places.empty()) run_jobs(experts, routed, Jobs(experts, routed, std::move(places)), outputs, {});
  combine(outputs, routed.weights, sums, routed.rows, routed.picks, experts.shape.down.rows);
}

bool run_arriving(KnownExperts &experts, const RoutedRows &routed, Arrivals &arrivals, float *outputs, float *sums,
                  Course &course, const std::function<void()> &look_up) {
  check_ids(experts, routed);
  const double start = now();
  std::vector<int32_t> left = places_by_expert(routed);
  leave_out(experts, routed, left, outputs);
  std::vector<char> here(static_cast<size_t>(experts.count), 0);
  std::vector<Arrival> arrived;
  while (!left.empty()) {
    arrived.clear();
    const double idle_since = now() - start;
    auto news = arrivals.take(arrived, std::chrono::milliseconds(0));
    const bool waits = news == Arrivals::News::none;
    while (news == Arrivals::News::none) {
      news = arrivals.take(arrived, kLookUpEvery);
      if (news == Arrivals::News::none) look_up();
    }
    if (news == Arrivals::News::failure) return false;
    const double begun = now() - start;
    if (waits) course.waited.push_back({idle_since, begun, arrived.back().expert, arrived.back().begun});
    for (const Arrival &arrival : arrived) {
      note(experts, arrival, here);
      if (arrival.begun > 0) course.came.push_back({arrival.expert, arrival.begun, arrival.ended});
    }
    const auto still = std::stable_partition(left.begin(), left.end(), [&](int32_t place) {
      return here[static_cast<size_t>(routed.ids[place])] != 0;
    });
    if (still == left.begin()) continue;
    const Jobs jobs(experts, routed, {left.begin(), still});
    left.erase(left.begin(), still);
    run_jobs(experts, routed, jobs, outputs, {});
    course.computed.push_back({begun, now() - start, static_cast<int64_t>(jobs.levels.size())});
  }
  combine(outputs, routed.weights, sums, routed.rows, routed.picks, experts.shape.down.rows);
  return true;
}

} // namespace moestro
