#include "linear_isa.h"

namespace dfk {
const LinearOps linear_avx2 = avx2::kOps;
}
