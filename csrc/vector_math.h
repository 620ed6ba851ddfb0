// exp and tanh on eight lanes: the same instructions for a full vector and for its tail, so the same bits.
#pragma once

#include "simd.h"

namespace moestro {
namespace MOESTRO_ISA {

// Relative error at most 1.2e-7 (measured over every float with a normal result); denormal results are rounded once;
// exp(-inf) = 0, exp(inf) = inf, NaN stays NaN.
//
// exp(x) = 2^n * e^r with n = round(x / ln 2), |r| <= ln 2 / 2 and Cephes' minimax polynomial for e^r (S. Moshier).
MOESTRO_INLINE Vec exp(Vec x) {
  // Beyond these the result is 0 or inf anyway. NaN is the second operand, so it is kept.
  x = max(broadcast(-105.0f), x);
  x = min(broadcast(89.0f), x);
  const Vec round_bias = broadcast(12582912.0f); // 1.5 * 2^23: adding it rounds to a whole number
  const Vec n = sub(add(mul(x, broadcast(1.44269504088896341f)), round_bias), round_bias);
  Vec r = fma(n, broadcast(-0.693359375f), x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  Vec p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, broadcast(1.0f)));
  // 2^n in two factors: n itself may lie outside the exponents of a normal float.
  const Vec half = sub(add(mul(n, broadcast(0.5f)), round_bias), round_bias);
  const Vec low = power_of_two(add(half, round_bias));
  const Vec high = power_of_two(add(sub(n, half), round_bias));
  return mul(mul(p, low), high);
}

// tanh(x) = 1 - 2 / (e^2x + 1), and an odd polynomial (Cephes) where that would cancel. Relative error below 2.8e-7
// (measured likewise).
MOESTRO_INLINE Vec tanh(Vec x) {
  const Vec one = broadcast(1.0f);
  const Vec large = sub(one, div(broadcast(2.0f), add(exp(add(x, x)), one)));
  const Vec square = mul(x, x);
  Vec p = broadcast(-5.70498872745e-3f);
  p = fma(p, square, broadcast(2.06390887954e-2f));
  p = fma(p, square, broadcast(-5.37397155531e-2f));
  p = fma(p, square, broadcast(1.33314422036e-1f));
  p = fma(p, square, broadcast(-3.33332819422e-1f));
  const Vec small = fma(mul(p, square), x, x);
  return if_below(x, 0.625f, small, large);
}

// x = exp(x - greatest) in place. Returns the sum, by lane and then over the lanes.
inline float exp_and_sum(float *x, int64_t count, float greatest) {
  const Vec shift = broadcast(greatest);
  Vec sum = zero();
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vec e = exp(sub(load(x + i), shift));
    store(x + i, e);
    sum = add(sum, e);
  }
  if (i < count) {
    store_some(x + i, exp(sub(load_some(x + i, count - i), shift)), count - i);
    sum = add(sum, load_some(x + i, count - i));
  }
  return sum_lanes(sum);
}

} // namespace MOESTRO_ISA
} // namespace moestro
