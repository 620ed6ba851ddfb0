// The decoder's part of the Python module.
#pragma once

#include <nanobind/nanobind.h>

namespace moestro {

void add_decoder(nanobind::module_ &m);

} // namespace moestro
