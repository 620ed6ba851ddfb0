// The values that quantised weights stand for, in fp32. Not on any fast path: plain C++, the same for all instruction
// sets.
#pragma once

#include "packed.h"

namespace moestro {

// out [rows, columns], contiguous.
void unpack(const PackedMatrix &matrix, float *out);
// One row of it to out [columns].
void unpack_row(const PackedMatrix &matrix, int64_t row, float *out);
// Throws std::invalid_argument, in the name of `what`, when an id is not in [0, rows).
void check_rows(const char *what, const int64_t *ids, int64_t count, int64_t rows);
// Row ids[i] of the matrix to out [count, columns]. Throws std::invalid_argument when an id is not a row.
void unpack_rows(const PackedMatrix &matrix, const int64_t *ids, int64_t count, float *out);

} // namespace moestro
