// What the head's statistics keep of one row while panels go by. Private to linear_head.cpp and the kernels.
#pragma once

#include <cstdint>

namespace dfk {

struct HeadPart {
  float sum[16];       // lane sums of exp(logit - shift)
  float weighted[16];  // lane sums of exp(logit - shift) * (logit - shift), where the entropy is asked for
  float shift;         // the best logit of the panels so far; -inf before the first
  float best, second;
  int32_t token;       // of best, -1 before the first
  int32_t highest;     // |logit| as an integer, the highest so far: from 0x7f800000 on the row is not finite
};

}  // namespace dfk
