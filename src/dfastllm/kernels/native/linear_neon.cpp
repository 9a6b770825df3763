#include "linear_isa.h"

namespace dfk {
const LinearOps linear_neon = neon::kOps;
}
