// The MLPs of many experts in one call: down(activation(up(x))), each expert on rows of its own and at a level of its
// own.
#pragma once

#include "expert_deltas.h"
#include "packed_tasks.h"

namespace moestro {

// A matrix that every expert of a layer has, at the same offsets in its own planes.
struct MatrixShape {
  Encoding encoding;
  int64_t rows, columns;
  int32_t group;
  int32_t planes; // how many offsets there are
  int64_t offsets[kPlanes];
};

struct ExpertShape {
  MatrixShape up, down;
  int64_t up_bias, down_bias; // offsets in plane 0; negative: none
  Activation activation;
};

// Job j: an expert's planes, its level, and rows [starts[j], starts[j + 1]) of the lists.
struct ExpertJobs {
  int64_t count;
  const int64_t *planes; // [count, kPlanes], addresses; 0 where absent
  const int32_t *levels;
  const int32_t *starts;
  const int32_t *rows;   // of hidden
  const int32_t *places; // rows of out
  int64_t listed;        // length of the lists
};

struct HiddenRows {
  const float *data;
  int64_t stride, rows;
};

struct OutputRows {
  float *data;
  int64_t stride, rows;
};

// The matrix of an expert whose planes are given. Throws std::invalid_argument when the level is unknown or needs a
// plane that is absent.
PackedMatrix packed_matrix(const MatrixShape &shape, const int64_t *planes, int32_t level);

// out[places[r]] = MLP(hidden[rows[r]]), not weighted. A job's matrices are multiplied with all its rows at once, deltas
// with theirs. Throws std::invalid_argument when a job's lists, level or planes or a delta are wrong, before anything is
// computed.
void run_experts(const ExpertShape &shape, const ExpertJobs &jobs, const HiddenRows &hidden, const OutputRows &out,
                 const ExpertDeltas &deltas = {});

// Most bytes that `threads` threads share in run_experts: `rows` distinct rows of hidden with `hidden` columns,
// `listed` rows in the lists, experts of `width`.
size_t experts_shared_bytes(int64_t rows, int64_t hidden, int32_t hidden_group, int64_t listed, int64_t width,
                            int32_t width_group, int threads);
// Most bytes of scratch of each thread.
size_t experts_scratch_bytes();

} // namespace moestro
