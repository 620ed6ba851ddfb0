// The salient channels of a delta: the few columns whose values are kept in fp16, times the same quantised activations.
//
// Those of a tile are asked for a tile ahead. What a row's activations are in those channels is worked out once for all
// tiles of a task.
#pragma once

#include "packed_tasks.h"
#include "tile_simd.h"

namespace moestro {
namespace MOESTRO_ISA {

// Activations of salient channels that a task keeps ready, and how many a tile works out by itself where a task has more.
constexpr int64_t kReadyInputs = 4096;
constexpr int64_t kOwnInputs = 64;

inline const uint8_t *salient_values(const Salient &salient, int64_t channel, int64_t tile) {
  return salient.values + (tile * salient.count + channel) * kTile * int64_t{sizeof(uint16_t)};
}

inline void ask_for_salient(const Salient &salient, int64_t tile) {
  const uint8_t *end = salient_values(salient, 0, tile + 1);
  for (const uint8_t *p = salient_values(salient, 0, tile); p < end; p += kChunk) __builtin_prefetch(p);
}

// out[c] = what row t of the task has in salient channel first + c.
inline void salient_inputs(const TileTask &task, int64_t t, int64_t first, int64_t count, float *out) {
  const int shift = __builtin_ctz(static_cast<unsigned>(task.matrix->group));
  const int32_t *ids = task.delta->ids + first;
  for (int64_t c = 0; c < count; ++c) {
    out[c] = task.scales[t][ids[c] >> shift].scale * static_cast<float>(task.codes[t][ids[c]]);
  }
}

// All of them, [task.count, channels].
class SalientInputs {
public:
  explicit SalientInputs(const TileTask &task) {
    if (task.delta == nullptr || task.count * task.delta->count > kReadyInputs) return;
    const int64_t channels = task.delta->count;
    for (int64_t t = 0; t < task.count; ++t) salient_inputs(task, t, 0, channels, inputs_ + t * channels);
    ready_ = true;
  }
  // Row t's from channel `first` on; null where there are too many to keep.
  const float *row(const TileTask &task, int64_t t, int64_t first) const {
    return ready_ ? inputs_ + t * task.delta->count + first : nullptr;
  }

private:
  bool ready_ = false;
  float inputs_[kReadyInputs];
};

// Adds the salient channels of a tile to the results of rows first, first + 1, ... of a task. Not inlined: results are
// in memory meanwhile, which the code of codes alone should not have to provide for.
template <int Tokens>
__attribute__((noinline)) void add_salient(const TileTask &task, const SalientInputs &inputs, int64_t tile,
                                           int64_t first, Reals (&results)[Tokens][kParts]) {
  const Salient &salient = *task.delta;
  Reals sums[Tokens][kParts];
  for (int t = 0; t < Tokens; ++t) {
    for (int part = 0; part < kParts; ++part) sums[t][part] = results[t][part];
  }
  for (int64_t from = 0; from < salient.count; from += kOwnInputs) {
    const int64_t count = salient.count - from < kOwnInputs ? salient.count - from : kOwnInputs;
    float own[Tokens][kOwnInputs];
    const float *x[Tokens];
    for (int t = 0; t < Tokens; ++t) {
      x[t] = inputs.row(task, first + t, from);
      if (x[t] != nullptr) continue;
      salient_inputs(task, first + t, from, count, own[t]);
      x[t] = own[t];
    }
    for (int64_t c = 0; c < count; ++c) {
      const auto *values = reinterpret_cast<const Float16 *>(salient_values(salient, from + c, tile));
      for (int part = 0; part < kParts; ++part) {
        const Reals value = load_reals(values + part * kPartRows);
#pragma GCC unroll 8
        for (int t = 0; t < Tokens; ++t) sums[t][part] = fma_reals(all_reals(x[t][c]), value, sums[t][part]);
      }
    }
  }
  for (int t = 0; t < Tokens; ++t) {
    for (int part = 0; part < kParts; ++part) results[t][part] = sums[t][part];
  }
}

} // namespace MOESTRO_ISA
} // namespace moestro
