// Reads that wait for a thread, and the system calls that carry them out.
//
// Threads of the queue read without the interpreter: whoever asks for a read does not have to give way for it to begin,
// nor whoever waits for it until it has been put down.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "arrivals.h"

namespace moestro {

struct QueuedRead {
  int64_t id; // up to `ReadQueue::kNobodys`: nobody puts it down
  int file; // descriptor; negative: who takes it has to open it
  int64_t offset, bytes;
  uint64_t address;
  bool urgent;
  Arrivals *arrivals = nullptr; // if there are any: told of `arrival` when the bytes are there
  Arrival arrival = {};
};

// Urgent reads before the others, first come first served among equals. Reads that lie one after another in a file, and
// are as urgent, share a request of up to `request_bytes`; of those that nobody waits for there is one request at a
// time, of up to `piece_bytes`, so that a thread is free for what becomes urgent. Safe to use from many threads.
class ReadQueue {
public:
  // What a thread has taken. Times are seconds of the steady clock.
  struct Request {
    std::vector<int64_t> ids;
    bool filled = false; // all of their bytes are where they belong
    double begun = 0, ended = 0;
  };
  struct Stats {
    int64_t requests = 0; // carried out here, whole
    double busy = 0;      // seconds in which at least one was under way
    double slowest = 0;
    int64_t others = 0; // reads that are not urgent and that nobody has taken
  };

  // From this id downwards reads are nobody's who waits for `tried`: `arrivals` hear of them also when they fail, and
  // they share requests with their like only.
  static constexpr int64_t kNobodys = -2;

  ReadQueue(int64_t request_bytes, int64_t piece_bytes);
  ~ReadQueue();
  ReadQueue(const ReadQueue &) = delete;
  ReadQueue &operator=(const ReadQueue &) = delete;

  // All at once: neighbours among them share requests. Ids ascend from call to call but for those of nobody, which are
  // not used twice; what has been pushed before, or after `close`, is passed over (nobody's fail).
  void push(const std::vector<QueuedRead> &reads);
  // The greatest id that has been pushed; -1: none.
  int64_t newest();
  // Makes a read urgent, behind those that are, if it has not been taken.
  void promote(int64_t id);
  // Takes back a read that has not been taken; whether that was so.
  bool remove(int64_t id);
  // Has one more thread read.
  void start();
  // Waits for a request that the queue's threads have tried to carry out. Nothing when it is closed and all have been
  // handed out.
  std::optional<Request> tried();
  // Waits for a request that is not begun, for a thread of the caller's. Nothing after `close`.
  std::optional<Request> next();
  // The caller has read what was not `filled`.
  void done(const Request &request);
  // Waits until nobody's reads have all been carried out, or taken back.
  void settle();
  // Ends all waiting. Returns the reads that nobody has taken, which leave.
  std::vector<int64_t> close();
  // Waits for the queue's threads to end, after `close`.
  void join();
  Stats stats();

private:
  using Place = std::pair<int, int64_t>; // file and offset
  using Line = std::map<int64_t, QueuedRead>; // by when they came

  struct Waiting {
    Line line;
    std::map<Place, int64_t> places; // of reads in the line
  };
  struct Where {
    bool urgent;
    int64_t turn;
  };

  bool has_work() const;
  static bool is_nobodys(const QueuedRead &read) { return read.id <= kNobodys; }
  void enter(const QueuedRead &read, bool urgent);
  QueuedRead leave(Where where);
  std::vector<QueuedRead> take();
  std::optional<std::vector<QueuedRead>> take_next(Request &request);
  void work();
  static void tell(std::vector<QueuedRead> &reads, const Request &request);
  void put_down(int64_t reads);

  std::mutex mutex_;
  std::condition_variable changed_, tried_one_, settled_;
  std::vector<std::thread> threads_;
  const int process_; // in a forked child there are no threads
  std::deque<Request> tried_;
  const int64_t request_bytes_, piece_bytes_;
  Waiting urgent_, others_;
  std::map<int64_t, Where> where_; // by id
  int64_t turns_ = 0, newest_ = -1;
  int64_t nobodys_ = 0; // reads that wait, or are under way
  int under_way_ = 0, at_work_ = 0; // requests; threads of the queue that have not ended
  static constexpr int64_t kNone = -1; // no read has this id
  int64_t ahead_ = kNone;              // first read of the request that nobody waits for, if there is one
  bool closed_ = false;
  double busy_since_ = 0;
  Stats stats_;
};

} // namespace moestro
