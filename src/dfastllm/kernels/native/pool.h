// The kernels' own threads. A forward pass is hundreds of short parallel regions, so a worker that has just worked spins
// for a moment before it sleeps; tasks are taken one by one, so a thread that loses its core to a neighbour holds up
// nobody for longer than one task. Which thread runs a task never changes a result.
#pragma once

#include <cstdint>
#include <type_traits>

namespace dfk {

// Threads including the caller's. At least 1.
int thread_count();

// Joins or starts workers. Throws std::invalid_argument below 1 or above 1024. Not while a region runs. A forked process
// has one thread until it sets another number.
void set_thread_count(int count);

using Task = void (*)(void* context, int64_t task, int worker);

// Runs task 0 .. count-1, the caller's thread taking part as worker 0; returns when all are done. Regions of several
// callers take turns. Tasks must not throw and must not start a region.
void run_tasks(int64_t count, Task task, void* context);

// f(task, worker): worker is below thread_count() and no two tasks run at once with the same worker, so it may index
// per-thread scratch memory.
template <class F>
void parallel(int64_t count, F&& f) {
  using Body = std::remove_reference_t<F>;
  run_tasks(
      count, [](void* context, int64_t task, int worker) { (*static_cast<Body*>(context))(task, worker); }, &f);
}

}  // namespace dfk
