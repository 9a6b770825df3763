// Many tiny regions of the thread pool: what ThreadSanitizer should watch. Two callers take turns, tasks write plain
// memory that the caller then reads without a lock, and now and then the number of threads changes.
#include <atomic>
#include <cstdio>
#include <thread>
#include <vector>

#include "modes.h"
#include "numbers.h"
#include "pool.h"

namespace driver {
namespace {

// Regions of 0 to 5 tasks; each adds its number to a cell of its own and uses its worker's memory.
int64_t run_regions(uint64_t seed, int64_t count) {
  Numbers numbers(seed);
  int64_t wrong = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t tasks = numbers.below(6);
    int64_t cells[6] = {};
    std::vector<int64_t> of_worker(8, 0);
    dfk::parallel(tasks, [&](int64_t task, int worker) {
      cells[task] += task + 1;
      ++of_worker[static_cast<size_t>(worker)];
    });
    int64_t done = 0;
    for (const int64_t each : of_worker) done += each;
    for (int64_t task = 0; task < 6; ++task) wrong += cells[task] != (task < tasks ? task + 1 : 0);
    wrong += done != tasks;
  }
  return wrong;
}

}  // namespace

int regions(int64_t count) {
  int64_t wrong = 0;
  for (const int threads : {2, 4, 1, 3, 8}) {
    dfk::set_thread_count(threads);
    std::atomic<int64_t> other{0};
    std::thread second([&] { other = run_regions(2, count / 10); });
    wrong += run_regions(1, count / 10);
    second.join();
    wrong += other;
  }
  dfk::set_thread_count(1);
  std::printf("regions: %lld of %lld are wrong\n", static_cast<long long>(wrong), static_cast<long long>(count / 10 * 10));
  return wrong > 0 ? 1 : 0;
}

}  // namespace driver
