#if defined(__GNUC__) && !defined(__clang__)  // GCC bug 105593: the intrinsics' own undefined registers
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "linear.h"
#include "linear_head.h"
#include "low_rank.h"

namespace dfk {
namespace avx512 {
#include "linear_isa.h"
}
const LinearOps linear_avx512 = avx512::kOps;
}  // namespace dfk
