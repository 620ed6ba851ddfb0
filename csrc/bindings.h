// The parts of the Python module; see module.cpp.
#pragma once

#include <nanobind/nanobind.h>

namespace moestro {

template <class T> T *pointer(uintptr_t address) { return reinterpret_cast<T *>(address); }

void bind_decoder(nanobind::module_ &m);

} // namespace moestro
