// The weighted sum of experts' outputs.
#pragma once

#include <cstdint>

namespace moestro {

// out[t] = sum over k, ascending, of weights[t, k] * outputs[t, k]; products and sums are rounded one by one.
void combine(const float *outputs, const float *weights, float *out, int64_t tokens, int64_t picks, int64_t width);

} // namespace moestro
