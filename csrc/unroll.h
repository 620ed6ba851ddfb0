// Small counts known to the compiler, so that what they index stays in registers.
#pragma once

#include "simd.h"

namespace moestro {
namespace MOESTRO_ISA {

template <int N> struct Count {
  static constexpr int value = N;
};

// Calls f(Count<n>{}) for a run-time n in [1, Most].
template <int Most, class F> MOESTRO_INLINE void with_count(int64_t n, F f) {
  if constexpr (Most == 1) {
    f(Count<1>{});
  } else if (n == Most) {
    f(Count<Most>{});
  } else {
    with_count<Most - 1>(n, f);
  }
}

// Splits `total` into even parts of at most `Most` and calls f(first, Count<part>{}) for each.
template <int Most, class F> MOESTRO_INLINE void for_each_part(int64_t total, F f) {
  for (int64_t first = 0, part; first < total; first += part) {
    const int64_t left = total - first, parts = (left + Most - 1) / Most;
    part = (left + parts - 1) / parts;
    with_count<Most>(part, [&](auto count) { f(first, count); });
  }
}

} // namespace MOESTRO_ISA
} // namespace moestro
