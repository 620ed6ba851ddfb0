// Experts that a step turns out to lack, read on its way into slots that were lent for it, and some of those that the
// next layer's router names: without coming back to the interpreter, where asking for one takes as long as computing it.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#include "known_experts.h"
#include "read_queue.h"

namespace moestro {

// Where the experts of a MoE layer lie on disk, each in one piece.
struct Shelf {
  int file = -1; // descriptor; negative: nothing of this layer is read here
  int64_t bytes = 0;
  std::vector<int64_t> offsets;       // by expert
  std::array<int64_t, kPlanes> inner; // where planes begin in the piece; negative where there is none
};

// Room for one expert. What lies there has to leave before: an expert of some layer, or nothing (negative).
struct LentSlot {
  int64_t address, moe, expert;
  double worth;       // of what lies there: of two slots, that of less is taken
  int64_t since = 0;  // or, of equal ones, that which had it first
  int64_t needed = -1; // up to the layer of this number
};

// What an expert is worth once it has been read: `rise` more than it was.
struct Worths {
  const double *before = nullptr; // [layers, experts]; null: what has been read stays
  double rise = 0;
};

// An expert that was asked for, with the number of its slot among those lent. Times are seconds of the steady clock;
// `begun` and `ended` are 0 of a read that was taken back (its slot as well) or has failed.
struct Fetched {
  enum class Kind { demand, ahead, ahead_in_time, ahead_late, taken_back };
  int64_t moe, expert, slot;
  Kind kind;
  double asked, begun = 0, ended = 0;
};

// A wait for the read of an expert that began at `read`; `late` where that had been asked for ahead.
struct FetchWait {
  double begun, ended, read;
  bool late;
};

// A layer that routed and was computed, and the candidates of the router after it, if that was asked.
struct FetchVisit {
  int64_t moe;
  double routed;
  bool reading; // whether it had to wait for reads
  std::vector<int64_t> candidates = {};
};

class Fetching {
public:
  using Known = std::vector<KnownExperts *>; // by MoE layer

  // `unread` [layers, experts]: not 0 where an expert is nowhere in memory and may be read without being checked. The
  // queue and what is at that address outlive this.
  Fetching(ReadQueue &queue, uint8_t *unread, int64_t layers, int64_t experts);
  ~Fetching();
  Fetching(const Fetching &) = delete;
  Fetching &operator=(const Fetching &) = delete;

  // Throws std::invalid_argument when there is no such layer, or it has too many experts.
  void shelve(int64_t moe, const Shelf &shelf);

  // Slots that may be filled, and filled again once the layer has passed. Of a router's candidates for the next layer,
  // that at a rank is read ahead where fewer than `idle[rank]` were before it, `reading[rank]` after a layer that reads
  // itself; none: routers are not asked. What was fetched before is forgotten.
  void lend(std::vector<LentSlot> slots, std::vector<int> idle, std::vector<int> reading, Worths worths);

  bool lends() const { return !slots_.empty(); }
  int64_t candidates() const { return static_cast<int64_t>(idle_.size()); }

  // MoE layer `moe` has routed: asks for what is picked and not known. False, and nothing is asked for, when something
  // of it may not be read, or slots do not suffice.
  bool ask(int64_t moe, const Known &known, const RoutedRows &routed);
  // What the router of `next`, asked early, names: reads ahead what is worth it. Of the layer that asked last.
  void look(int64_t next, const Known &known, const int64_t *candidates);
  // Computes the layer that asked last, as `run_arriving`. False when a read has failed.
  bool compute(const Known &known, const RoutedRows &routed, float *outputs, float *sums,
               const std::function<void()> &look_up);
  // Nothing more is wanted: takes back what has not begun and waits for what has.
  void stop(const Known &known);

  const std::vector<Fetched> &fetched() const { return fetched_; }
  const std::vector<FetchWait> &waits() const { return waits_; }
  const std::vector<FetchVisit> &visits() const { return visits_; }

private:
  void meet(int64_t moe, const Known &known);
  void come(int64_t moe, const Known &known);
  void note(int64_t moe, int64_t expert, double begun, double ended);
  bool is_picked(int64_t expert) const;
  Fetched *find(int64_t moe, int64_t expert);
  bool is_free(const LentSlot &slot) const { return slot.needed < layer_; }
  template <class Stays> LentSlot *find_slot(const Stays &stays);
  void begin_turn(int64_t moe);
  QueuedRead read_of(const Known &known, LentSlot &slot, int64_t moe, int64_t expert, Fetched::Kind kind);
  void take_back(const Known &known, Fetched &one, int64_t id);
  void give_up(const Known &known, int64_t moe);
  std::array<int64_t, kPlanes> planes_at(int64_t moe, int64_t address) const;

  static constexpr int64_t kStays = std::numeric_limits<int64_t>::max();

  ReadQueue &queue_;
  uint8_t *unread_;
  int64_t experts_;
  std::vector<Shelf> shelves_;                     // by layer
  std::vector<std::unique_ptr<Arrivals>> arrivals_; // by layer
  std::vector<LentSlot> slots_;
  Worths worths_;
  std::vector<int> idle_, reading_;
  int64_t reads_ = 0, turn_ = 0, turn_of_ = -1, layer_ = -1;
  size_t ahead_ = 0;            // in `fetched_`: the first that was read ahead for layer `turn_of_`
  std::vector<int64_t> picked_; // of `layer_`, distinct, ascending
  bool waits_for_ = false;      // whether something of it is on its way
  std::vector<Fetched> fetched_;
  std::vector<int64_t> ids_;     // of the reads of `fetched_`
  std::vector<LentSlot> before_; // what they have taken
  std::vector<FetchWait> waits_;
  std::vector<FetchVisit> visits_;
};

} // namespace moestro
