// What Python holds of a step and of K,V.
#pragma once

#include <optional>

#include "bind_arrays.h"
#include "step.h"

namespace dfk {

struct BoundStep {
  explicit BoundStep(AnyArray words);

  AnyArray words;
  Step step;
};

// K,V of some layers: k [layers][blocks][kv_heads][dim][16], v [layers][blocks][kv_heads][16][dim], scales
// [layers][blocks][kv_heads][16] of int8.
struct BoundKv : KvMemory {
  BoundKv(AnyArray k, AnyArray v, std::optional<AnyArray> k_scales, std::optional<AnyArray> v_scales);

  AnyArray k, v;
  std::optional<AnyArray> k_scales, v_scales;
};

// Throws std::invalid_argument unless the step's blocks and slots lie in these, which are of one shape.
void require_kv(const Step& step, const BoundKv& cache, const BoundKv& own);

}  // namespace dfk
