// The values that quantised weights stand for, in fp32. Not on any fast path: plain C++, the same for all instruction
// sets.
#pragma once

#include "packed.h"

namespace moestro {

// out [rows, columns], contiguous.
void unpack(const PackedMatrix &matrix, float *out);
// Row ids[i] of the matrix to out [count, columns]. Throws std::invalid_argument when an id is not a row.
void unpack_rows(const PackedMatrix &matrix, const int64_t *ids, int64_t count, float *out);

} // namespace moestro
