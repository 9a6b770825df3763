// How tiles walk over a panel: row blocks, and what is fetched ahead meanwhile.
#pragma once

#include <cstdint>

#include "isa_here.h"
#include "linear.h"

namespace dfk::DFK_ISA {

// Lines to fetch ahead while a slice is worked on, shared out evenly over the `turns` (groups x passes) of it. Numbers,
// not pointers: they may leave the array.
struct Ahead {
  uintptr_t at, end, step;  // step: bytes a turn, a multiple of 64
  Ahead(const void* from, int64_t bytes, int64_t turns)
      : at(reinterpret_cast<uintptr_t>(from)),
        end(at + static_cast<uintptr_t>(bytes)),
        step(static_cast<uintptr_t>(round_up((bytes + turns - 1) / turns, 64))) {}
  inline void turn() {
    const uintptr_t stop = at + step < end ? at + step : end;
    for (; at < stop; at += 64) __builtin_prefetch(reinterpret_cast<const void*>(at), 0, 2);
  }
};

// Row block `i` of `count` blocks as even as possible over `rows`: [first, first + rows).
struct RowBlock {
  int64_t first;
  int rows;
};
inline RowBlock row_block(int64_t rows, int64_t count, int64_t i) {
  const int64_t first = rows * i / count;
  return {first, static_cast<int>(rows * (i + 1) / count - first)};
}

}  // namespace dfk::DFK_ISA
