// Reads from disk, in the Python module.
#pragma once

#include <nanobind/nanobind.h>

namespace moestro {

void add_reads(nanobind::module_ &m);

} // namespace moestro
