// Signals, of which Python code hears only when it runs.
#pragma once

#include <nanobind/nanobind.h>

namespace moestro {

// To be called now and then by what takes long without the interpreter's lock. Throws what a handler raises.
inline void handle_signals() {
  const nanobind::gil_scoped_acquire acquire;
  if (PyErr_CheckSignals() != 0) throw nanobind::python_error();
}

} // namespace moestro
