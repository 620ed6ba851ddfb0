#include "read_queue.h"

#include <pthread.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <climits>

#include "clock.h"

namespace moestro {
namespace {

// Whether one system call has filled all of them, which lie one after another in their file.
bool fill(const std::vector<QueuedRead> &reads) {
  if (reads.size() > IOV_MAX) return false;
  std::vector<iovec> parts;
  int64_t bytes = 0;
  for (const QueuedRead &read : reads) {
    parts.push_back({reinterpret_cast<void *>(read.address), static_cast<size_t>(read.bytes)});
    bytes += read.bytes;
  }
  ssize_t count = 0;
  do {
    count = preadv(reads[0].file, parts.data(), static_cast<int>(parts.size()), reads[0].offset);
  } while (count < 0 && errno == EINTR);
  return count == bytes;
}

} // namespace

ReadQueue::ReadQueue(int64_t request_bytes, int64_t piece_bytes)
    : process_(getpid()), request_bytes_(request_bytes), piece_bytes_(piece_bytes) {}

ReadQueue::~ReadQueue() {
  if (getpid() == process_) {
    close();
    join();
  }
  for (std::thread &thread : threads_) thread.detach();
}

bool ReadQueue::has_work() const {
  return !urgent_.line.empty() || (!others_.line.empty() && ahead_ == kNone);
}

void ReadQueue::enter(const QueuedRead &read, bool urgent) {
  Waiting &waiting = urgent ? urgent_ : others_;
  waiting.line.emplace(turns_, read);
  waiting.places[{read.file, read.offset}] = turns_;
  where_[read.id] = {urgent, turns_++};
}

QueuedRead ReadQueue::leave(Where where) {
  Waiting &waiting = where.urgent ? urgent_ : others_;
  const auto found = waiting.line.find(where.turn);
  const QueuedRead read = found->second;
  waiting.line.erase(found);
  waiting.places.erase({read.file, read.offset});
  where_.erase(read.id);
  return read;
}

void ReadQueue::push(const std::vector<QueuedRead> &reads) {
  bool work;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const QueuedRead &read : reads) {
      const bool nobodys = is_nobodys(read);
      const bool ended = closed_ || getpid() != process_;
      if (nobodys && ended) read.arrivals->fail();
      if (ended || (!nobodys && read.id <= newest_)) continue;
      if (nobodys) ++nobodys_;
      if (!nobodys) newest_ = read.id;
      enter(read, read.urgent);
    }
    work = has_work();
  }
  if (work) changed_.notify_one();
}

int64_t ReadQueue::newest() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return newest_;
}

void ReadQueue::promote(int64_t id) {
  bool work;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = where_.find(id);
    if (found == where_.end() || found->second.urgent) return;
    enter(leave(found->second), true);
    work = has_work();
  }
  if (work) changed_.notify_one();
}

bool ReadQueue::remove(int64_t id) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = where_.find(id);
  if (found == where_.end()) return false;
  if (is_nobodys(leave(found->second)) && --nobodys_ == 0) settled_.notify_all();
  return true;
}

std::vector<QueuedRead> ReadQueue::take() {
  const bool urgent = !urgent_.line.empty();
  Waiting &waiting = urgent ? urgent_ : others_;
  const int64_t most = urgent ? request_bytes_ : std::min(request_bytes_, piece_bytes_);
  std::vector<QueuedRead> taken{leave({urgent, waiting.line.begin()->first})};
  int64_t bytes = taken[0].bytes;
  for (;;) {
    const QueuedRead &last = taken.back();
    if (last.file < 0) return taken;
    const auto next = waiting.places.find({last.file, last.offset + last.bytes});
    if (next == waiting.places.end()) return taken;
    const QueuedRead &found = waiting.line.at(next->second);
    bytes += found.bytes;
    if (bytes > most || is_nobodys(found) != is_nobodys(last)) return taken;
    taken.push_back(leave({urgent, next->second}));
  }
}

std::optional<std::vector<QueuedRead>> ReadQueue::take_next(Request &request) {
  std::vector<QueuedRead> taken;
  bool more;
  {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return closed_ || has_work(); });
    if (closed_) return {};
    const bool urgent = !urgent_.line.empty();
    taken = take();
    if (!urgent) ahead_ = taken[0].id;
    request.begun = now();
    if (under_way_++ == 0) busy_since_ = request.begun;
    more = has_work();
  }
  if (more) changed_.notify_one();
  for (const QueuedRead &read : taken) request.ids.push_back(read.id);
  return taken;
}

std::optional<ReadQueue::Request> ReadQueue::next() {
  Request request;
  if (!take_next(request)) return {};
  return request;
}

void ReadQueue::start() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) return;
  threads_.emplace_back(&ReadQueue::work, this); // which waits for the lock before anything else
  ++at_work_;
}

void ReadQueue::work() {
#if defined(__linux__)
  pthread_setname_np(pthread_self(), "moestro-read");
#endif
  for (;;) {
    Request request;
    auto taken = take_next(request);
    if (taken) {
      request.filled = fill(*taken);
      request.ended = now();
      tell(*taken, request);
      const bool nobodys = is_nobodys(taken->front());
      if (request.filled || nobodys) done(request);
      if (nobodys) {
        put_down(static_cast<int64_t>(taken->size()));
        continue;
      }
    }
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (taken) tried_.push_back(std::move(request));
      if (!taken) --at_work_;
    }
    tried_one_.notify_one();
    if (!taken) return;
  }
}

void ReadQueue::tell(std::vector<QueuedRead> &reads, const Request &request) {
  for (QueuedRead &read : reads) {
    read.arrival.begun = request.begun;
    read.arrival.ended = request.ended;
    if (request.filled && read.arrivals != nullptr) read.arrivals->come(read.arrival);
    if (!request.filled && is_nobodys(read)) read.arrivals->fail();
  }
}

// So many of nobody's reads have been carried out.
void ReadQueue::put_down(int64_t reads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if ((nobodys_ -= reads) == 0) settled_.notify_all();
}

void ReadQueue::settle() {
  if (getpid() != process_) return;
  std::unique_lock<std::mutex> lock(mutex_);
  settled_.wait(lock, [this] { return nobodys_ == 0; });
}

std::optional<ReadQueue::Request> ReadQueue::tried() {
  std::unique_lock<std::mutex> lock(mutex_);
  tried_one_.wait(lock, [this] { return !tried_.empty() || (closed_ && at_work_ == 0); });
  if (tried_.empty()) return {};
  Request request = std::move(tried_.front());
  tried_.pop_front();
  return request;
}

void ReadQueue::done(const Request &request) {
  const double ended = now();
  bool work;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (--under_way_ == 0) stats_.busy += ended - busy_since_;
    if (ahead_ == request.ids[0]) ahead_ = kNone;
    stats_.requests += request.filled ? 1 : 0;
    stats_.slowest = std::max(stats_.slowest, ended - request.begun);
    work = has_work();
  }
  if (work) changed_.notify_one();
}

std::vector<int64_t> ReadQueue::close() {
  std::vector<int64_t> left;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
    for (const Waiting *waiting : {&urgent_, &others_}) {
      for (const auto &[turn, read] : waiting->line) {
        if (is_nobodys(read)) {
          read.arrivals->fail();
          --nobodys_;
        } else {
          left.push_back(read.id);
        }
      }
    }
    urgent_ = others_ = {};
    where_.clear();
  }
  changed_.notify_all();
  tried_one_.notify_all();
  settled_.notify_all();
  return left;
}

void ReadQueue::join() {
  std::vector<std::thread> threads;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    threads.swap(threads_);
  }
  for (std::thread &thread : threads) thread.join();
}

ReadQueue::Stats ReadQueue::stats() {
  const std::lock_guard<std::mutex> lock(mutex_);
  Stats stats = stats_;
  stats.others = static_cast<int64_t>(others_.line.size());
  if (under_way_ > 0) stats.busy += now() - busy_since_;
  return stats;
}

} // namespace moestro
