// What a decoded row may lose in a forward pass, and the experts that are applied at the levels in memory within it:
// without coming back to the interpreter, where nothing has to be read.
#pragma once

#include <cstdint>
#include <vector>

#include "known_experts.h"

namespace moestro {

// The experts of a layer, as far as they are in memory.
struct HeldExperts {
  KnownExperts *levelled = nullptr; // expert e at the level of number s, from 1, is number e * levels + s - 1; null: none are
  const int64_t *planes = nullptr;  // [experts, kPlanes]: addresses of those in memory, from the first on; 0 behind
  int64_t experts = 0;
  std::vector<int64_t> depths; // planes of each level, with level 0, which leaves an expert out, in front
};

class Allowance {
public:
  // `costs` [layers, experts, levels]: nats that a row of one expert loses without the planes of a level; `per_byte`: the
  // same for each byte. What is at those addresses outlives this.
  Allowance(const double *costs, const double *per_byte, int64_t layers, int64_t experts, int64_t levels);

  // Throws std::invalid_argument when the layer does not exist, or does not fit.
  void hold(int64_t moe, const HeldExperts &held);

  // A row may lose `left` nats, at most `price` for each byte that is not read; 0: nothing. The numbers of its levels
  // are written to `levels` [layers, picks], where they are chosen here.
  void begin(double price, double left, int64_t *levels);

  double left() const { return left_; }

  // Computes experts of MoE layer `moe` for one row at the levels that are in memory. False, and nothing is done or
  // lost, where some plane is dearer than its reading, or more would be lost than is left.
  bool compute(int64_t moe, const RoutedRows &routed, float *outputs, float *sums);

private:
  bool choose(int64_t moe, const RoutedRows &routed, int64_t *levels);
  int64_t level_of(const HeldExperts &held, int64_t expert) const;

  const double *costs_, *per_byte_;
  int64_t experts_, levels_;
  std::vector<HeldExperts> held_; // by layer
  double price_ = 0, left_ = 0;
  int64_t *chosen_ = nullptr;
};

} // namespace moestro
