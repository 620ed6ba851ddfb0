// The nets that foresee routing, in the Python module.
#pragma once

#include <nanobind/nanobind.h>

namespace moestro {

void add_nets(nanobind::module_ &m);

} // namespace moestro
