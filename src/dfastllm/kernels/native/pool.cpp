#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace dfk {
namespace {

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// Long enough to bridge the gap between two regions of one forward pass, short enough to be nothing between two passes.
constexpr auto kSpin = std::chrono::microseconds(60);

class Pool {
 public:
  ~Pool() { resize(1); }

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  void resize(int count) {
    std::lock_guard<std::mutex> region(region_);
    stop_.store(true);
    wake();
    for (auto& worker : workers_) worker.join();
    workers_.clear();
    stop_.store(false);
    const uint64_t now = turn_.load();
    for (int i = 1; i < count; ++i) workers_.emplace_back([this, i, now] { work(i, now); });
  }

  void run(int64_t count, Task task, void* context) {
    if (count <= 0) return;
    std::lock_guard<std::mutex> region(region_);
    if (workers_.empty() || count == 1) {
      for (int64_t i = 0; i < count; ++i) task(context, i, 0);
      return;
    }
    task_ = task;
    context_ = context;
    count_ = count;
    next_.store(0, std::memory_order_relaxed);
    open_.store(true, std::memory_order_seq_cst);   // publishes the region
    turn_.fetch_add(1, std::memory_order_seq_cst);  // and tells the workers
    if (asleep_.load(std::memory_order_seq_cst) > 0) wake();
    take(0);
    // Nothing is left to take: workers that have not come yet (their core is someone else's just now) are not waited
    // for. One that was descheduled in the middle of a task is, and may need this core to finish.
    open_.store(false, std::memory_order_seq_cst);
    for (int spins = 0; busy_.load(std::memory_order_seq_cst) > 0; ++spins) {
      if (spins < 2000) relax();
      else std::this_thread::yield();
    }
  }

 private:
  void take(int worker) {
    for (;;) {
      const int64_t i = next_.fetch_add(1, std::memory_order_relaxed);
      if (i >= count_) return;
      task_(context_, i, worker);
    }
  }

  void wake() {
    { std::lock_guard<std::mutex> lock(sleep_); }
    awake_.notify_all();
  }

  void work(int worker, uint64_t seen) {
    for (;;) {
      if (!wait(seen)) return;
      seen = turn_.load(std::memory_order_acquire);
      // Either this worker sees that the region is closed, or run() sees that it is busy (both in one total order): the
      // region's task is read only while run() waits for it. It may be a later region than `seen`, which is as good.
      busy_.fetch_add(1, std::memory_order_seq_cst);
      if (open_.load(std::memory_order_seq_cst)) take(worker);
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }

  // Returns when a region after `seen` is published (true) or the pool stops (false).
  bool wait(uint64_t seen) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    for (;;) {
      for (int i = 0; i < 64; ++i) {
        if (turn_.load(std::memory_order_acquire) != seen) return true;
        if (stop_.load(std::memory_order_relaxed)) return false;
        relax();
      }
      if (std::chrono::steady_clock::now() > until) break;
    }
    std::unique_lock<std::mutex> lock(sleep_);
    asleep_.fetch_add(1, std::memory_order_seq_cst);
    awake_.wait(lock, [&] { return turn_.load(std::memory_order_seq_cst) != seen || stop_.load(); });
    asleep_.fetch_sub(1, std::memory_order_relaxed);
    return turn_.load(std::memory_order_acquire) != seen;
  }

  std::mutex region_;  // one region at a time
  std::vector<std::thread> workers_;
  Task task_ = nullptr;
  void* context_ = nullptr;
  int64_t count_ = 0;
  alignas(64) std::atomic<uint64_t> turn_{0};  // regions published so far
  alignas(64) std::atomic<int64_t> next_{0};   // next task of the region
  alignas(64) std::atomic<int> busy_{0};       // workers in a region
  std::atomic<bool> open_{false};              // a region may still be entered
  alignas(64) std::atomic<int> asleep_{0};
  std::atomic<bool> stop_{false};
  std::mutex sleep_;
  std::condition_variable awake_;
};

// Never destroyed: threads of a dying process must not be joined from a static destructor.
Pool* instance = new Pool;

Pool& pool() { return *instance; }

#if defined(__unix__) || defined(__APPLE__)
// A forked process has the forking thread alone: the workers are not there to be joined, and a lock that another thread
// held is held for ever. It begins with a pool of its own, of one thread; the copy of the old one is left alone.
void begin_anew() { instance = new Pool; }

[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, begin_anew);
#endif

}  // namespace

int thread_count() { return pool().size(); }

void set_thread_count(int count) {
  if (count < 1 || count > 1024) {
    throw std::invalid_argument("the number of threads must be 1 to 1024, got " + std::to_string(count));
  }
  if (count != pool().size()) pool().resize(count);
}

void run_tasks(int64_t count, Task task, void* context) { pool().run(count, task, context); }

}  // namespace dfk
