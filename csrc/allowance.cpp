#include "allowance.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

namespace moestro {

Allowance::Allowance(const double *costs, const double *per_byte, int64_t layers, int64_t experts, int64_t levels)
    : costs_(costs), per_byte_(per_byte), experts_(experts), levels_(levels), held_(static_cast<size_t>(layers)) {}

void Allowance::hold(int64_t moe, const HeldExperts &held) {
  const bool fits = moe >= 0 && moe < static_cast<int64_t>(held_.size()) && held.experts <= experts_ &&
                    static_cast<int64_t>(held.depths.size()) == levels_ + 1 && held.levelled != nullptr &&
                    held.levelled->count == held.experts * levels_;
  if (!fits) throw std::invalid_argument("allowance: layer " + std::to_string(moe) + " does not exist, or does not fit");
  held_[static_cast<size_t>(moe)] = held;
}

void Allowance::begin(double price, double left, int64_t *levels) {
  price_ = price;
  left_ = left;
  chosen_ = levels;
}

// The highest level whose planes are in memory.
int64_t Allowance::level_of(const HeldExperts &held, int64_t expert) const {
  const int64_t *planes = held.planes + expert * kPlanes;
  const int64_t count = std::find(planes, planes + kPlanes, 0) - planes;
  return std::upper_bound(held.depths.begin(), held.depths.end(), count) - held.depths.begin() - 1;
}

bool Allowance::choose(int64_t moe, const RoutedRows &routed, int64_t *levels) {
  const HeldExperts &held = held_[static_cast<size_t>(moe)];
  const float *weights = routed.weights;
  // As `shares` in policy/levels/base.py.
  const float squares = std::accumulate(weights, weights + routed.picks, 0.0F, [](float sum, float w) { return sum + w * w; });
  double lost = 0;
  for (int64_t k = 0; k < routed.picks; ++k) {
    const int64_t expert = routed.ids[k];
    if (expert < 0 || expert >= held.experts) return false;
    const double share = weights[k] * weights[k] / std::max(squares, 1e-30F);
    levels[k] = level_of(held, expert);
    for (int64_t s = levels[k]; s < levels_; ++s) {
      const int64_t place = (moe * experts_ + expert) * levels_ + s;
      if (share / price_ * per_byte_[place] > 1) return false;
      lost += costs_[place] * share;
    }
  }
  if (!(lost <= left_)) return false; // nor where it is not a number
  left_ -= lost;
  return true;
}

bool Allowance::compute(int64_t moe, const RoutedRows &routed, float *outputs, float *sums) {
  const HeldExperts &held = held_[static_cast<size_t>(moe)];
  if (!(price_ > 0) || held.levelled == nullptr || routed.rows != 1) return false;
  std::vector<int64_t> chosen(static_cast<size_t>(routed.picks)), groups(chosen.size(), -1);
  if (!choose(moe, routed, chosen.data())) return false;
  for (size_t k = 0; k < chosen.size(); ++k) {
    if (chosen[k] == 0) continue;
    groups[k] = routed.ids[k] * levels_ + chosen[k] - 1;
    std::copy_n(held.planes + routed.ids[k] * kPlanes, kPlanes, held.levelled->planes + groups[k] * kPlanes);
  }
  std::copy(chosen.begin(), chosen.end(), chosen_ + moe * routed.picks);
  RoutedRows grouped = routed;
  grouped.ids = groups.data();
  run_listed(*held.levelled, grouped, outputs, sums);
  return true;
}

} // namespace moestro
