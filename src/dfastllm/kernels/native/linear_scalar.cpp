#define DFK_PORTABLE
#include "linear_isa.h"

namespace dfk {
const LinearOps linear_scalar = scalar::kOps;
}
