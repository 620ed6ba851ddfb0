// Tensors come to the module as addresses.
#pragma once

#include <cstdint>

namespace moestro {

template <class T> T *pointer(uintptr_t address) { return reinterpret_cast<T *>(address); }

} // namespace moestro
