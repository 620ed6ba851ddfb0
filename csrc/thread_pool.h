// A small pool: the caller and n - 1 workers take numbered tasks from one counter.
//
// Not OpenMP: torch brings a runtime of its own whose threads spin between calls, and two of them fight for the cores.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace moestro {

class ThreadPool {
public:
  // `scratch` is this thread's own memory, 64-byte aligned, of the size given to run(). Must not throw.
  using Task = void (*)(void *context, int64_t task, char *scratch);

  explicit ThreadPool(int threads) : threads_(threads) {}
  ~ThreadPool();
  ThreadPool(const ThreadPool &) = delete;
  ThreadPool &operator=(const ThreadPool &) = delete;

  // Runs task(context, i, scratch) for every i in [0, tasks). Callers from several threads take turns.
  // Throws std::bad_alloc or std::system_error before any task has begun, never after.
  // `parallel` false keeps the work on the calling thread (for work shorter than waking a worker).
  void run(int64_t tasks, size_t scratch_bytes, bool parallel, Task task, void *context);

  // A turn of several jobs: until the lock is released other callers wait; the holder's own calls run as usual.
  std::unique_lock<std::recursive_mutex> turn() { return std::unique_lock<std::recursive_mutex>(run_mutex_); }
  // Memory for what the tasks of a turn hand to each other, 64-byte aligned; the caller's until its turn ends or it
  // calls this again. Throws std::bad_alloc.
  char *shared(size_t bytes);

  void set_threads(int threads);
  int threads() const { return threads_.load(std::memory_order_relaxed); }
  // Bytes of scratch that the threads hold now, and share; they keep the most that any call has needed.
  size_t scratch_bytes();

private:
  struct Scratch {
    char *memory = nullptr;
    size_t bytes = 0;
  };

  void start_workers();
  void stop_workers();
  void reserve(size_t bytes, int threads);
  static void grow(Scratch &scratch, size_t bytes);
  void work(int index);
  uint64_t wait_for_job(uint64_t seen);
  void take_tasks(char *scratch);
  bool joinable(uint64_t gate, uint64_t seen) const;

  std::recursive_mutex run_mutex_;
  std::atomic<int> threads_;
  std::vector<std::thread> workers_;
  std::vector<Scratch> scratch_;
  Scratch shared_;

  // The job: written by the caller while the gate is closed and nobody is inside.
  Task task_ = nullptr;
  void *context_ = nullptr;
  int64_t tasks_ = 0;

  // High half: number of the job. Then one bit: whether workers may still enter. Rest: how many are inside.
  alignas(64) std::atomic<uint64_t> gate_{0};
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::mutex sleep_mutex_;
  std::condition_variable wake_;
};

// The process-wide pool. A forked child gets a fresh one (the parent's workers do not exist there).
ThreadPool &pool();

// As ThreadPool::run on the calling thread alone, with scratch of this call: for callers that are several at a time, each
// with work of its own. Throws std::bad_alloc.
void run_here(int64_t tasks, size_t scratch_bytes, ThreadPool::Task task, void *context);

} // namespace moestro
