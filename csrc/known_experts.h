// The experts of a layer for small steps: where planes lie is known, and those that come are taken as they come.
#pragma once

#include <functional>
#include <map>
#include <vector>

#include "arrivals.h"
#include "experts.h"

namespace moestro {

// What a fine-tune adds to the experts of a layer.
struct KnownDeltas {
  ExpertDeltaShape shape;
  const int64_t *planes; // [count], addresses; 0 where not known, kUnchanged of an expert without a delta
};

constexpr int64_t kUnchanged = -1;

struct KnownExperts {
  ExpertShape shape;
  int64_t *planes; // [count, kPlanes], addresses; 0 in front of an expert of which they are not known
  int64_t count;
  std::vector<int32_t> levels; // expert e is applied at levels[e % levels.size()]: it may be there once for each
  std::map<int32_t, KnownDeltas> deltas = {}; // by the slot of the fine-tune
};

// Rows [first, end) of a step belong to the fine-tune in a slot; the others to the base.
struct RowRun {
  int32_t slot;
  int64_t first, end;
};

// The experts that a router has picked for some rows.
struct RoutedRows {
  const float *hidden;  // [rows, width]
  const int64_t *ids;   // [rows, picks]
  const float *weights; // [rows, picks]
  int64_t rows, picks;
  const RowRun *runs = nullptr; // ascending
  int64_t run_count = 0;
};

// Whether these experts, or all of the layer, can be computed for the base's rows.
bool picks_known(const KnownExperts &experts, const int64_t *ids, int64_t count);
bool every_known(const KnownExperts &experts);

// Whether every pick is known, and what the rows' fine-tunes add to it. Throws as `run_known`.
bool all_known(const KnownExperts &experts, const RoutedRows &routed);

// sums [rows, width]: the weighted sums of the rows' experts, in ascending k. `outputs` is room for [rows * picks,
// width]; `sums` may be `hidden`. Returns false, and computes nothing, when an expert is not known, or what a row's
// fine-tune adds to it. Throws std::invalid_argument when runs are not ascending runs of rows.
bool run_known(const KnownExperts &experts, const RoutedRows &routed, float *outputs, float *sums);

// As `run_known`, of the base's rows, all of whose picks are known, or left out: those of -1.
void run_listed(const KnownExperts &experts, const RoutedRows &routed, float *outputs, float *sums);

// What a call did when, in seconds since it began.
struct Course {
  struct Computed {
    double begun, ended;
    int64_t experts;
  };
  struct Waited {
    double begun, ended;
    int64_t expert; // that ended the wait
    double read;    // when its read began, in seconds of the steady clock; 0: not known
  };
  struct Came {
    int64_t expert;
    double begun, ended; // its read, in seconds of the steady clock
  };
  std::vector<Computed> computed;
  std::vector<Waited> waited;
  std::vector<Came> came; // those of which the read is known
};

// As `run_known`, of the base's rows: computes experts as they come, notes where they are, and returns when every one
// that is picked has come, those that were known before as well. An id of -1 is left out. `look_up` is called now and
// then while nothing comes, and may throw. Returns false when one will not come. Throws std::invalid_argument where an
// expert does not exist.
bool run_arriving(KnownExperts &experts, const RoutedRows &routed, Arrivals &arrivals, float *outputs, float *sums,
                  Course &course, const std::function<void()> &look_up);

} // namespace moestro
