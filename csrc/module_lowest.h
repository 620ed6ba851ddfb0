// The least of many worths, in the Python module.
#pragma once

#include <nanobind/nanobind.h>

namespace moestro {

void add_lowest(nanobind::module_ &m);

} // namespace moestro
