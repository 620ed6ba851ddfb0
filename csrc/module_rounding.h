// Rounding of weights to codes, in the Python module.
#pragma once

#include <nanobind/nanobind.h>

namespace moestro {

void add_rounding(nanobind::module_ &m);

} // namespace moestro
