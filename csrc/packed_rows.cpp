// Rows of activations: quantised into codes, and the activation function of an expert.
#include "activations.h"
#include "int_lanes.h"

namespace moestro {
namespace MOESTRO_ISA {
namespace {

constexpr int kBatch = 4 * kLanes; // every group is a multiple of it
constexpr int32_t kInfinityBits = 0x7f800000;
constexpr float kLeastMagnitude = 1e-30f;

GroupScale quantise_group(const float *x, int32_t group, int8_t *codes) {
  IntVec greatest = no_ints();
  for (int32_t i = 0; i < group; i += kLanes) greatest = greater(greatest, magnitude_bits(load(x + i)));
  const int32_t bits = greatest_of(greatest);
  const float magnitude = from_bits(static_cast<uint32_t>(bits));
  if (bits >= kInfinityBits || magnitude < kLeastMagnitude) {
    std::memset(codes, 0, static_cast<size_t>(group));
    const float scale = bits >= kInfinityBits ? __builtin_nanf("") : 0.0f;
    return {scale, scale, 0};
  }
  const Vec inverse = broadcast(127.0f / magnitude), bias = broadcast(kRoundBias);
  IntVec sum = no_ints();
  for (int32_t i = 0; i < group; i += kBatch) {
    IntVec batch[4];
    for (int j = 0; j < 4; ++j) {
      batch[j] = rounded(add(mul(load(x + i + j * kLanes), inverse), bias));
      sum = add(sum, batch[j]);
    }
    store_as_bytes(codes + i, batch);
  }
  const float scale = magnitude / 127.0f;
  const int32_t total = sum_of(sum);
  return {scale, scale * static_cast<float>(total), total};
}

template <ActivationName Name>
void activate_as(const Activation &activation, const float *gate, const float *up, int64_t count, float *out) {
  const auto each = [&](auto function) {
    for (int64_t i = 0; i < count; i += kLanes) store(out + i, function(i));
  };
  const auto gated = [&](Vec g, Vec u) {
    if constexpr (Name == ActivationName::clamped_swiglu) {
      return clamped_swiglu(activation, g, u);
    } else {
      return mul(activated<Name>(g), u);
    }
  };
  switch (activation.gate) {
  case Gate::halves: return each([&](int64_t i) { return gated(load(gate + i), load(up + i)); });
  case Gate::interleaved:
    return each([&](int64_t i) {
      Vec g, u;
      load_pairs(up + 2 * i, g, u);
      return gated(g, u);
    });
  default:
    if constexpr (Name != ActivationName::clamped_swiglu) {
      each([&](int64_t i) { return activated<Name>(load(up + i)); });
    }
  }
}

} // namespace

void quantise_row(const float *x, int64_t columns, int32_t group, int8_t *codes, GroupScale *scales) {
  for (; columns >= group; columns -= group, x += group, codes += group) *scales++ = quantise_group(x, group, codes);
  if (columns == 0) return;
  float filled[kWidestGroup] = {};
  std::memcpy(filled, x, static_cast<size_t>(columns) * sizeof(float));
  *scales = quantise_group(filled, group, codes);
}

void activate(const Activation &activation, const float *gate, const float *up, int64_t count, float *out) {
  switch (activation.name) {
#define MOESTRO_CASE(name)                                                                                             \
  case ActivationName::name: return activate_as<ActivationName::name>(activation, gate, up, count, out)
    MOESTRO_CASE(silu);
    MOESTRO_CASE(gelu);
    MOESTRO_CASE(gelu_tanh);
    MOESTRO_CASE(gelu_quick);
    MOESTRO_CASE(relu);
    MOESTRO_CASE(relu2);
    MOESTRO_CASE(sigmoid);
    MOESTRO_CASE(clamped_swiglu);
#undef MOESTRO_CASE
  }
}

} // namespace MOESTRO_ISA
} // namespace moestro
