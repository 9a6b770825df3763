#include "linear_isa.h"

namespace dfk {
const LinearOps linear_i8mm = i8mm::kOps;
}
