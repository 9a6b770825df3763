#if defined(__GNUC__) && !defined(__clang__)  // GCC bug 105593: the intrinsics' own undefined registers
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include "linear_isa.h"

namespace dfk {
const LinearOps linear_avx512vl = avx512vl::kOps;
}
