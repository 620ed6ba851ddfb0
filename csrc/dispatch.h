// Picks the kernels for this machine and checks what they are given to read.
#pragma once

#include <vector>

#include "kernels.h"
#include "packed_tasks.h"

namespace moestro {

// The kernels in use: the fastest that the machine has, unless use_kernels() has picked others.
const KernelTable &kernels();
inline const PackedTable &packed_kernels() { return *kernels().packed; }
// All that this machine can run, fastest first.
std::vector<const KernelTable *> available_kernels();
// Returns false when this machine has no kernels of that name.
bool use_kernels(const char *name);

// The rows of a step in the parts that are computed together.
// Throws std::invalid_argument when a row's sequence, position or block lies outside the table or the pool.
std::vector<RowGroup> group_rows(const AttentionArgs &args);
// Attention of rows grouped thus. Throws likewise.
void run_attention(const AttentionArgs &args);

} // namespace moestro
