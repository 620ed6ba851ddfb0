// Seconds of the steady clock, which on Linux is that of Python's `time.perf_counter`.
#pragma once

#include <chrono>

namespace moestro {

inline double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

} // namespace moestro
