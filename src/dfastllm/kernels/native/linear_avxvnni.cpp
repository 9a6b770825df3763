#include "linear_isa.h"

namespace dfk {
const LinearOps linear_avxvnni = avxvnni::kOps;
}
