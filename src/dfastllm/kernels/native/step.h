// One forward pass as the engine describes it: one contiguous array of int32, kernels/step.py defines its layout.
//
// `read_step` checks all of it once: counts against the array's length, rows in order, limits within the keys of their
// span. What depends on a model and on its K,V (ids, blocks, slots) is kept as maxima, which a forward compares once.
#pragma once

#include <cstdint>
#include <vector>

#include "attention.h"

namespace dfk {

struct Extent {
  int64_t least = 0, most = -1;
};

struct Step {
  int64_t rows = 0, wanted = 0;
  const int32_t* ids = nullptr;           // [rows]
  const int32_t* positions = nullptr;     // [rows]
  const int32_t* slot = nullptr;          // [rows] where K,V are kept: block * 16 + offset, or -1
  const int32_t* own_slot = nullptr;      // [rows] where K,V of this pass only go, or -1
  const int32_t* cached_limit = nullptr;  // [rows] sees the first so many cached keys
  const int32_t* own_limit = nullptr;     // [rows] and the first so many own keys
  const int32_t* adapter = nullptr;       // [rows] 0: none
  const int32_t* want = nullptr;          // [wanted] rows
  std::vector<SpanKeys> spans;
  // Smallest and largest of what only a model and its K,V can judge.
  Extent id, slot_extent, own_slot_extent, block, own_block;
  bool adapted = false;                   // some row has an adapter
};

// Throws std::invalid_argument with a sentence that says what does not fit. The array must outlive the step.
Step read_step(const int32_t* words, int64_t count);

// Throws std::invalid_argument unless every block and slot of the step lies within caches of so many blocks.
void require_blocks(const Step& step, int64_t cache_blocks, int64_t own_blocks);

}  // namespace dfk
