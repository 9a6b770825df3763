// The best of a row's logits, of panels that many threads reduce in any order.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <mutex>

#include "linear.h"

namespace dfk {

constexpr float kNone = -std::numeric_limits<float>::infinity();

// A row's best logits so far: descending, of equal ones the lowest id first. That order is total, so what remains in the
// end does not depend on the order in which threads offer theirs.
struct Best {
  float* values = nullptr;
  int32_t* ids = nullptr;
  int64_t room = 0, count = 0;
  std::atomic<float> least{kNone};  // once it is full: the last one
  std::mutex guard;

  void offer(float value, int32_t id) {
    const auto before = [&](int64_t at) { return value > values[at] || (value == values[at] && id < ids[at]); };
    if (count == room && !before(room - 1)) return;
    int64_t at = count < room ? count++ : room - 1;
    for (; at > 0 && before(at - 1); --at) {
      values[at] = values[at - 1];
      ids[at] = ids[at - 1];
    }
    values[at] = value;
    ids[at] = id;
    if (count == room) least.store(values[room - 1], std::memory_order_relaxed);
  }

  // One panel's logits, the highest of which is known.
  void offer_panel(float highest, const float* logits, int64_t first_id) {
    if (!(highest >= least.load(std::memory_order_relaxed)) || highest == kNone) return;
    std::lock_guard<std::mutex> lock(guard);
    for (int64_t c = 0; c < kPanel; ++c) {
      if (logits[c] > kNone) offer(logits[c], static_cast<int32_t>(first_id + c));
    }
  }

  void finish(bool finite) {
    if (!finite) count = 0;
    std::fill(values + count, values + room, finite ? kNone : std::numeric_limits<float>::quiet_NaN());
    std::fill(ids + count, ids + room, -1);
  }
};

}  // namespace dfk
