// Activation functions on eight lanes, without the C library: the same bits everywhere.
#pragma once

#include "packed_tasks.h"
#include "vector_math.h"

namespace moestro {
namespace MOESTRO_ISA {

MOESTRO_INLINE Vec one() { return broadcast(1.0f); }

MOESTRO_INLINE Vec sigmoid(Vec x) { return div(one(), add(one(), exp(sub(zero(), x)))); }

// erf(x) = x * P(x^2) / Q(x^2) on [-4, 4], beyond which it is 1 within the error, at most 3e-7 (measured). The
// coefficients are those of XLA's erf for fp32. NaN stays NaN.
MOESTRO_INLINE Vec erf(Vec x) {
  x = min(broadcast(4.0f), max(broadcast(-4.0f), x));
  const Vec square = mul(x, x);
  Vec p = broadcast(-2.72614225801306e-10f);
  p = fma(p, square, broadcast(2.77068142495902e-08f));
  p = fma(p, square, broadcast(-2.10102402082508e-06f));
  p = fma(p, square, broadcast(-5.69250639462346e-05f));
  p = fma(p, square, broadcast(-7.34990630326855e-04f));
  p = fma(p, square, broadcast(-2.95459980854025e-03f));
  p = fma(p, square, broadcast(-1.60960333262415e-02f));
  Vec q = broadcast(-1.45660718464996e-05f);
  q = fma(q, square, broadcast(-2.13374055278905e-04f));
  q = fma(q, square, broadcast(-1.68282697438203e-03f));
  q = fma(q, square, broadcast(-7.37332916720468e-03f));
  q = fma(q, square, broadcast(-1.42647390514189e-02f));
  return div(mul(x, p), q);
}

MOESTRO_INLINE Vec gelu_from(Vec x, Vec share) { return mul(mul(x, broadcast(0.5f)), add(one(), share)); }

MOESTRO_INLINE Vec gelu_tanh(Vec x) {
  const Vec cubic = fma(mul(mul(x, x), broadcast(0.044715f)), x, x);
  return gelu_from(x, tanh(mul(cubic, broadcast(0.797884560802865356f))));
}

template <ActivationName Name> MOESTRO_INLINE Vec activated(Vec x) {
  if constexpr (Name == ActivationName::silu) return div(x, add(one(), exp(sub(zero(), x))));
  if constexpr (Name == ActivationName::gelu) return gelu_from(x, erf(mul(x, broadcast(0.707106781186547524f))));
  if constexpr (Name == ActivationName::gelu_tanh) return gelu_tanh(x);
  if constexpr (Name == ActivationName::gelu_quick) return mul(x, sigmoid(mul(x, broadcast(1.702f))));
  if constexpr (Name == ActivationName::relu) return max(zero(), x); // NaN is the second operand, so it is kept
  if constexpr (Name == ActivationName::relu2) {
    const Vec positive = max(zero(), x);
    return mul(positive, positive);
  }
  if constexpr (Name == ActivationName::sigmoid) return sigmoid(x);
}

// gpt-oss: gate and up are clamped; (up + 1) * gate * sigmoid(alpha * gate).
MOESTRO_INLINE Vec clamped_swiglu(const Activation &activation, Vec gate, Vec up) {
  const Vec limit = broadcast(activation.limit);
  gate = min(limit, gate);
  up = min(limit, max(sub(zero(), limit), up));
  const Vec glu = mul(gate, sigmoid(mul(gate, broadcast(activation.alpha))));
  return mul(add(up, one()), glu);
}

} // namespace MOESTRO_ISA
} // namespace moestro
