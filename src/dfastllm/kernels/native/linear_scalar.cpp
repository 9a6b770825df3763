#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "linear.h"
#include "linear_head.h"
#include "low_rank.h"

namespace dfk {
namespace scalar {
#include "linear_isa.h"
}
const LinearOps linear_scalar = scalar::kOps;
}  // namespace dfk
