// The quantised half of the Python module.
#pragma once

#include <nanobind/nanobind.h>

namespace moestro {

void add_packed(nanobind::module_ &m);

} // namespace moestro
