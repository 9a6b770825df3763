// What the head's statistics keep of one row while panels go by. Private to linear_head.cpp and the kernels.
#pragma once

#include <cstdint>

namespace dfk {

struct HeadPart {
  float sum[16];       // lane sums of exp(logit - best); a NaN among them: the row is not finite
  float weighted[16];  // lane sums of exp(logit - best) * (logit - best), where the entropy is asked for
  float best, second;  // so far; -inf before the first
  int32_t token;       // of best, -1 before the first
};

}  // namespace dfk
