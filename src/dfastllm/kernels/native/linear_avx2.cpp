#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "linear.h"
#include "linear_head.h"
#include "low_rank.h"

namespace dfk {
namespace avx2 {
#include "linear_isa.h"
}
const LinearOps linear_avx2 = avx2::kOps;
}  // namespace dfk
