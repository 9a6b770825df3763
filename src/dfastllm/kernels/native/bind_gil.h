// Calls without Python's lock, that survive the end of the interpreter.
//
// When Python ends, a daemon thread that comes back for the lock is killed by unwinding its stack, and a C++ frame that
// may not be unwound ends the whole process with an abort. So from the moment that Python's exit handlers run, threads
// that come back from a call stay there instead.
#pragma once

#include <Python.h>

#include <atomic>
#include <chrono>
#include <thread>

namespace dfk {

class Unlocked {
 public:
  Unlocked() {
    inside().fetch_add(1, std::memory_order_seq_cst);
    state_ = PyEval_SaveThread();
  }

  ~Unlocked() {
    if (closing().load(std::memory_order_seq_cst) && std::this_thread::get_id() != closer()) {
      inside().fetch_sub(1, std::memory_order_seq_cst);
      for (;;) std::this_thread::sleep_for(std::chrono::hours(24));
    }
    PyEval_RestoreThread(state_);
    inside().fetch_sub(1, std::memory_order_seq_cst);
  }

  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

  // An exit handler: waits until every other thread has come back or stays. Called with the lock, by the last thread.
  static void close() {
    closer() = std::this_thread::get_id();
    closing().store(true, std::memory_order_seq_cst);
    PyThreadState* state = PyEval_SaveThread();
    while (inside().load(std::memory_order_seq_cst) > 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    PyEval_RestoreThread(state);
  }

 private:
  static std::atomic<int>& inside() {
    static std::atomic<int> count{0};
    return count;
  }
  static std::atomic<bool>& closing() {
    static std::atomic<bool> flag{false};
    return flag;
  }
  static std::thread::id& closer() {
    static std::thread::id id;
    return id;
  }

  PyThreadState* state_;
};

}  // namespace dfk
