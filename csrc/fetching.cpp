#include "fetching.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "clock.h"

namespace moestro {
namespace {

using Kind = Fetched::Kind;

KnownExperts &at(const Fetching::Known &known, int64_t moe) { return *known[static_cast<size_t>(moe)]; }

int64_t *planes_of(const Fetching::Known &known, int64_t moe, int64_t expert) {
  return at(known, moe).planes + expert * kPlanes;
}

bool on_its_way(const Fetched &one) { return one.kind != Kind::taken_back && one.ended == 0; }

} // namespace

Fetching::Fetching(ReadQueue &queue, uint8_t *unread, int64_t layers, int64_t experts)
    : queue_(queue), unread_(unread), experts_(experts), shelves_(static_cast<size_t>(layers)) {
  for (int64_t layer = 0; layer < layers; ++layer) arrivals_.push_back(std::make_unique<Arrivals>());
}

Fetching::~Fetching() { queue_.settle(); }

void Fetching::shelve(int64_t moe, const Shelf &shelf) {
  if (moe < 0 || moe >= static_cast<int64_t>(shelves_.size()) || static_cast<int64_t>(shelf.offsets.size()) > experts_) {
    throw std::invalid_argument("fetching: layer " + std::to_string(moe) + " does not exist, or has too many experts");
  }
  shelves_[static_cast<size_t>(moe)] = shelf;
}

void Fetching::lend(std::vector<LentSlot> slots, std::vector<int> idle, std::vector<int> reading, Worths worths) {
  slots_ = std::move(slots);
  for (size_t i = 0; i < slots_.size(); ++i) slots_[i].since = static_cast<int64_t>(i);
  worths_ = worths;
  idle_ = std::move(idle);
  reading_ = std::move(reading);
  turn_of_ = layer_ = -1;
  fetched_.clear();
  ids_.clear();
  before_.clear();
  waits_.clear();
  visits_.clear();
}

std::array<int64_t, kPlanes> Fetching::planes_at(int64_t moe, int64_t address) const {
  std::array<int64_t, kPlanes> planes{};
  const Shelf &shelf = shelves_[static_cast<size_t>(moe)];
  for (size_t plane = 0; plane < kPlanes; ++plane) planes[plane] = shelf.inner[plane] < 0 ? 0 : address + shelf.inner[plane];
  return planes;
}

bool Fetching::is_picked(int64_t expert) const { return std::binary_search(picked_.begin(), picked_.end(), expert); }

Fetched *Fetching::find(int64_t moe, int64_t expert) {
  const auto found = std::find_if(fetched_.rbegin(), fetched_.rend(), [&](const Fetched &one) {
    return one.moe == moe && one.expert == expert && one.kind != Kind::taken_back;
  });
  return found == fetched_.rend() ? nullptr : &*found;
}

template <class Stays> LentSlot *Fetching::find_slot(const Stays &stays) {
  LentSlot *found = nullptr;
  for (LentSlot &one : slots_) {
    if (!is_free(one) || stays(one)) continue;
    if (found == nullptr || std::tie(one.worth, one.since) < std::tie(found->worth, found->since)) found = &one;
  }
  return found;
}

// Reads for this layer are told of from now on.
void Fetching::begin_turn(int64_t moe) {
  turn_of_ = moe;
  turn_ = arrivals_[static_cast<size_t>(moe)]->begin();
  ahead_ = fetched_.size();
}

// Takes the slot: what lies there is not known any more.
QueuedRead Fetching::read_of(const Known &known, LentSlot &slot, int64_t moe, int64_t expert, Kind kind) {
  const Shelf &shelf = shelves_[static_cast<size_t>(moe)];
  if (slot.moe >= 0) {
    std::fill_n(planes_of(known, slot.moe, slot.expert), kPlanes, 0);
    unread_[slot.moe * experts_ + slot.expert] = 1;
  }
  before_.push_back(slot);
  const int64_t place = moe * experts_ + expert;
  unread_[place] = 0;
  const bool stays = worths_.before == nullptr;
  slot = {slot.address, moe, expert, stays ? 0 : worths_.before[place] + worths_.rise,
          static_cast<int64_t>(slots_.size() + fetched_.size()), stays ? kStays : moe};
  fetched_.push_back({moe, expert, &slot - slots_.data(), kind, now()});
  ids_.push_back(ReadQueue::kNobodys - reads_++);
  QueuedRead read{ids_.back(), shelf.file, shelf.offsets[static_cast<size_t>(expert)], shelf.bytes,
                  static_cast<uint64_t>(slot.address), kind == Kind::demand, arrivals_[static_cast<size_t>(moe)].get(),
                  {turn_, expert, {}}};
  const auto planes = planes_at(moe, slot.address);
  std::copy(planes.begin(), planes.end(), read.arrival.planes);
  return read;
}

// The slot's owner is where it was, if its read has not begun.
void Fetching::take_back(const Known &known, Fetched &one, int64_t id) {
  if (!queue_.remove(id)) return;
  LentSlot &slot = slots_[static_cast<size_t>(one.slot)];
  slot = before_[static_cast<size_t>(&one - fetched_.data())];
  if (slot.moe >= 0) {
    const auto planes = planes_at(slot.moe, slot.address);
    std::copy(planes.begin(), planes.end(), planes_of(known, slot.moe, slot.expert));
    unread_[slot.moe * experts_ + slot.expert] = 0;
  }
  unread_[one.moe * experts_ + one.expert] = 1;
  one.kind = Kind::taken_back;
}

void Fetching::note(int64_t moe, int64_t expert, double begun, double ended) {
  Fetched *one = find(moe, expert);
  if (one != nullptr) one->begun = begun, one->ended = ended;
}

// Takes in what has come for a layer.
void Fetching::come(int64_t moe, const Known &known) {
  std::vector<Arrival> arrived;
  arrivals_[static_cast<size_t>(moe)]->take(arrived, std::chrono::milliseconds(0));
  for (const Arrival &one : arrived) {
    std::copy(one.planes, one.planes + kPlanes, planes_of(known, moe, one.expert));
    if (one.begun > 0) note(moe, one.expert, one.begun, one.ended);
  }
}

// What was read ahead for the layer meets what it has picked.
void Fetching::meet(int64_t moe, const Known &known) {
  come(moe, known);
  for (size_t i = fetched_.size(); i-- > ahead_;) {
    Fetched &one = fetched_[i];
    if (is_picked(one.expert)) {
      one.kind = on_its_way(one) ? Kind::ahead_late : Kind::ahead_in_time;
      if (on_its_way(one)) queue_.promote(ids_[i]);
    } else if (on_its_way(one)) {
      take_back(known, one, ids_[i]);
      if (on_its_way(one)) slots_[static_cast<size_t>(one.slot)].needed = kStays; // something is still read there
    }
  }
}

bool Fetching::ask(int64_t moe, const Known &known, const RoutedRows &routed) {
  const double routed_at = now();
  const Shelf &shelf = shelves_[static_cast<size_t>(moe)];
  picked_.assign(routed.ids, routed.ids + routed.rows * routed.picks);
  std::sort(picked_.begin(), picked_.end());
  picked_.erase(std::unique(picked_.begin(), picked_.end()), picked_.end());
  const auto count = std::min(at(known, moe).count, static_cast<int64_t>(shelf.offsets.size()));
  if (shelf.file < 0 || picked_.front() < 0 || picked_.back() >= count) return false;
  if (turn_of_ == moe) {
    meet(moe, known);
  } else {
    begin_turn(moe);
  }
  layer_ = moe;
  waits_for_ = false;
  std::vector<int64_t> missing;
  for (const int64_t id : picked_) {
    if (*planes_of(known, moe, id) != 0) continue;
    const Fetched *one = turn_of_ == moe ? find(moe, id) : nullptr;
    waits_for_ = true;
    if (one != nullptr && one->kind == Kind::ahead_late) continue;
    if (unread_[moe * experts_ + id] == 0) return false;
    missing.push_back(id);
  }
  for (LentSlot &slot : slots_) {
    if (slot.moe == moe && is_picked(slot.expert) && slot.needed < moe) slot.needed = kStays; // its worth has risen
  }
  const auto room = std::count_if(slots_.begin(), slots_.end(), [&](const LentSlot &one) { return is_free(one); });
  if (room < static_cast<int64_t>(missing.size())) return false;
  if (waits_for_) {
    for (const int64_t id : picked_) {
      const int64_t *planes = planes_of(known, moe, id);
      if (*planes == 0) continue;
      Arrival arrival{turn_, id, {}};
      std::copy(planes, planes + kPlanes, arrival.planes);
      arrivals_[static_cast<size_t>(moe)]->come(arrival);
    }
  }
  std::vector<QueuedRead> reads;
  for (const int64_t id : missing) {
    LentSlot *slot = find_slot([](const LentSlot &) { return false; });
    reads.push_back(read_of(known, *slot, moe, id, Kind::demand));
  }
  if (!reads.empty()) queue_.push(reads);
  visits_.push_back({moe, routed_at, waits_for_});
  return true;
}

void Fetching::look(int64_t next, const Known &known, const int64_t *candidates) {
  visits_.back().candidates.assign(candidates, candidates + static_cast<int64_t>(idle_.size()));
  const std::vector<int> &most = visits_.back().reading ? reading_ : idle_;
  const int64_t *last = candidates + idle_.size();
  const auto stays = [&](const LentSlot &slot) {
    return slot.moe == next && std::find(candidates, last, slot.expert) != last;
  };
  begin_turn(next);
  if (shelves_[static_cast<size_t>(next)].file < 0) return;
  std::vector<QueuedRead> reads;
  const auto count = std::min(at(known, next).count, static_cast<int64_t>(shelves_[static_cast<size_t>(next)].offsets.size()));
  for (size_t rank = 0; rank < idle_.size(); ++rank) {
    const int64_t id = candidates[rank];
    if (static_cast<int>(reads.size()) >= most[rank] || id < 0 || id >= count) continue;
    if (*planes_of(known, next, id) != 0 || unread_[next * experts_ + id] == 0) continue;
    LentSlot *slot = find_slot(stays);
    if (slot == nullptr) break;
    reads.push_back(read_of(known, *slot, next, id, Kind::ahead));
  }
  if (!reads.empty()) queue_.push(reads);
}

// The layer is not computed, and what was to come for it not used: it may be damaged, and nobody has heard of it.
void Fetching::give_up(const Known &known, int64_t moe) {
  queue_.settle();
  visits_.pop_back();
  for (Fetched &one : fetched_) {
    if (one.moe != moe || one.kind == Kind::taken_back) continue;
    std::fill_n(planes_of(known, moe, one.expert), kPlanes, 0);
    one.begun = one.ended = 0;
  }
}

bool Fetching::compute(const Known &known, const RoutedRows &routed, float *outputs, float *sums,
                       const std::function<void()> &look_up) {
  KnownExperts &here = at(known, layer_);
  if (!waits_for_) return run_known(here, routed, outputs, sums);
  const double start = now();
  Course course;
  bool all = false;
  try {
    all = run_arriving(here, routed, *arrivals_[static_cast<size_t>(layer_)], outputs, sums, course, look_up);
  } catch (...) {
    give_up(known, layer_);
    throw;
  }
  for (const Course::Came &one : course.came) note(layer_, one.expert, one.begun, one.ended);
  for (const Course::Waited &one : course.waited) {
    const Fetched *ended_by = find(layer_, one.expert);
    const bool late = ended_by != nullptr && ended_by->kind == Kind::ahead_late;
    waits_.push_back({start + one.begun, start + one.ended, one.read, late});
  }
  if (!all) give_up(known, layer_);
  return all;
}

void Fetching::stop(const Known &known) {
  for (size_t i = fetched_.size(); i-- > 0;) {
    if (on_its_way(fetched_[i])) take_back(known, fetched_[i], ids_[i]);
  }
  queue_.settle();
  for (const Fetched &one : fetched_) {
    if (on_its_way(one)) come(one.moe, known);
  }
}

} // namespace moestro
