#include "arrivals.h"

namespace moestro {

int64_t Arrivals::begin() {
  const std::lock_guard<std::mutex> lock(mutex_);
  come_.clear();
  failed_ = false;
  return ++turn_;
}

void Arrivals::come(const Arrival &arrival) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (arrival.turn != turn_) return;
    come_.push_back(arrival);
  }
  changed_.notify_one();
}

void Arrivals::fail() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    failed_ = true;
  }
  changed_.notify_one();
}

size_t Arrivals::count() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return come_.size();
}

Arrivals::News Arrivals::take(std::vector<Arrival> &into, std::chrono::milliseconds at_most) {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait_for(lock, at_most, [this] { return failed_ || !come_.empty(); });
  if (failed_) return News::failure;
  if (come_.empty()) return News::none;
  into.insert(into.end(), come_.begin(), come_.end());
  come_.clear();
  return News::some;
}

} // namespace moestro
