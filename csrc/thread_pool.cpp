#include "thread_pool.h"

#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#define MOESTRO_HAS_MXCSR 1
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace moestro {
namespace {

constexpr uint64_t kOpen = uint64_t{1} << 31;
constexpr uint64_t kInside = kOpen - 1;
constexpr int kJobShift = 32;
constexpr size_t kAlignment = 64;
// Between the layers of a decode step the next job comes within tens of microseconds; waking a sleeper costs as much.
constexpr std::chrono::microseconds kSpin{30};
constexpr int kPausesPerClockRead = 32;

void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#else
  std::this_thread::yield();
#endif
}

// Spins until `done()` or the time is over; returns whether it was done.
template <class Done> bool spin_until(Done done) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < kPausesPerClockRead; ++i) {
      if (done()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

// Rounding to nearest and no flushing of denormals, whatever the caller has set: results must not depend on the thread.
class StandardFloats {
public:
#ifdef MOESTRO_HAS_MXCSR
  StandardFloats() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~StandardFloats() { _mm_setcsr(saved_); }

private:
  unsigned saved_;
#else
  ~StandardFloats() {} // not trivial, so that a variable of this type counts as used
#endif
};

ThreadPool *g_pool = nullptr;

size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Null for no bytes.
char *allocated(size_t bytes) {
  if (bytes == 0) return nullptr;
  char *memory = static_cast<char *>(std::aligned_alloc(kAlignment, aligned(bytes)));
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

} // namespace

ThreadPool &pool() {
  // Never destroyed: at exit the workers may still sleep on its condition variable.
  static const bool made = [] {
    g_pool = new ThreadPool(1);
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, [] { g_pool = new ThreadPool(g_pool->threads()); });
#endif
    return true;
  }();
  (void)made;
  return *g_pool;
}

void run_here(int64_t tasks, size_t scratch_bytes, ThreadPool::Task task, void *context) {
  const std::unique_ptr<char, decltype(&std::free)> scratch(allocated(scratch_bytes), &std::free);
  const StandardFloats floats;
  for (int64_t i = 0; i < tasks; ++i) task(context, i, scratch.get());
}

ThreadPool::~ThreadPool() {
  stop_workers();
  for (Scratch &scratch : scratch_) std::free(scratch.memory);
  std::free(shared_.memory);
}

void ThreadPool::set_threads(int threads) {
  const auto lock = turn();
  if (threads == threads_) return;
  stop_workers();
  for (size_t i = threads; i < scratch_.size(); ++i) std::free(scratch_[i].memory);
  if (scratch_.size() > static_cast<size_t>(threads)) scratch_.resize(threads);
  threads_ = threads;
}

size_t ThreadPool::scratch_bytes() {
  const auto lock = turn();
  size_t total = shared_.bytes;
  for (const Scratch &scratch : scratch_) total += scratch.bytes;
  return total;
}

void ThreadPool::start_workers() {
  while (workers_.size() + 1 < static_cast<size_t>(threads_)) {
    workers_.emplace_back(&ThreadPool::work, this, static_cast<int>(workers_.size()) + 1);
  }
}

void ThreadPool::stop_workers() {
  {
    std::lock_guard<std::mutex> lock(sleep_mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread &worker : workers_) worker.join();
  workers_.clear();
  stop_ = false;
}

void ThreadPool::grow(Scratch &scratch, size_t bytes) {
  if (scratch.bytes >= bytes) return;
  std::free(scratch.memory);
  scratch = Scratch{};
  scratch.memory = allocated(bytes);
  scratch.bytes = aligned(bytes);
}

void ThreadPool::reserve(size_t bytes, int threads) {
  if (scratch_.size() < static_cast<size_t>(threads)) scratch_.resize(threads);
  for (int i = 0; i < threads; ++i) grow(scratch_[i], bytes);
}

char *ThreadPool::shared(size_t bytes) {
  const auto lock = turn();
  grow(shared_, bytes);
  return shared_.memory;
}

void ThreadPool::run(int64_t tasks, size_t scratch_bytes, bool parallel, Task task, void *context) {
  if (tasks == 0) return;
  const auto lock = turn();
  const bool alone = !parallel || tasks == 1 || threads_ == 1;
  reserve(scratch_bytes, alone ? 1 : threads_.load());
  if (!alone) start_workers();

  const StandardFloats floats;
  task_ = task;
  context_ = context;
  tasks_ = tasks;
  next_.store(0, std::memory_order_relaxed);
  if (alone) {
    take_tasks(scratch_[0].memory);
    return;
  }
  const uint64_t job = (gate_.load(std::memory_order_relaxed) >> kJobShift) + 1;
  gate_.store(job << kJobShift | kOpen);
  if (sleepers_.load() > 0) {
    std::lock_guard<std::mutex> sleep_lock(sleep_mutex_);
    wake_.notify_all();
  }
  take_tasks(scratch_[0].memory);
  // Every task is taken. A worker that has not entered by now (it was asleep) is not waited for.
  gate_.fetch_and(~kOpen);
  const auto empty = [this] { return (gate_.load(std::memory_order_acquire) & kInside) == 0; };
  while (!spin_until(empty)) std::this_thread::yield();
}

void ThreadPool::take_tasks(char *scratch) {
  for (;;) {
    const int64_t i = next_.fetch_add(1, std::memory_order_relaxed);
    if (i >= tasks_) return;
    task_(context_, i, scratch);
  }
}

bool ThreadPool::joinable(uint64_t gate, uint64_t seen) const {
  return (gate & kOpen) != 0 && gate >> kJobShift != seen;
}

// Returns the number of a job that this worker has entered, or `seen` when the pool stops.
uint64_t ThreadPool::wait_for_job(uint64_t seen) {
  const auto ready = [this, seen] {
    return stop_.load(std::memory_order_relaxed) || joinable(gate_.load(std::memory_order_relaxed), seen);
  };
  for (;;) {
    if (!spin_until(ready)) {
      std::unique_lock<std::mutex> lock(sleep_mutex_);
      sleepers_.fetch_add(1);
      wake_.wait(lock, [this, seen] { return stop_.load() || joinable(gate_.load(), seen); });
      sleepers_.fetch_sub(1);
    }
    if (stop_.load()) return seen;
    uint64_t gate = gate_.load();
    while (joinable(gate, seen)) {
      if (gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acq_rel)) return gate >> kJobShift;
    }
  }
}

void ThreadPool::work(int index) {
  const StandardFloats floats;
  uint64_t seen = 0;
  for (;;) {
    const uint64_t job = wait_for_job(seen);
    if (job == seen) return;
    seen = job;
    take_tasks(scratch_[index].memory);
    gate_.fetch_sub(1, std::memory_order_release);
  }
}

} // namespace moestro
