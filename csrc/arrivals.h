// Experts of a layer whose planes come while others are computed.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <vector>

#include "packed.h"

namespace moestro {

struct Arrival {
  int64_t turn; // of `Arrivals`
  int64_t expert;
  int64_t planes[kPlanes]; // addresses; 0 where absent
  double begun = 0, ended = 0; // its read, in seconds of the steady clock; 0: not known
};

// Readers say what has come, in threads of their own; the one that computes takes it.
class Arrivals {
public:
  enum class News { none, some, failure };

  // Forgets what was said before, and does not hear from now on what was meant for earlier turns: reads may still be
  // under way that an error has made useless. Returns the number of the turn that begins.
  int64_t begin();
  void come(const Arrival &arrival);
  // One will not come. What came before that is of no use any more.
  void fail();
  // How many have come since the last call of `take`.
  size_t count();
  // Appends what has come since the last call; waits for it at most so long.
  News take(std::vector<Arrival> &into, std::chrono::milliseconds at_most);

private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Arrival> come_;
  int64_t turn_ = 0;
  bool failed_ = false;
};

} // namespace moestro
