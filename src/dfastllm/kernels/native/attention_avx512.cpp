#if defined(__GNUC__) && !defined(__clang__)  // GCC bug 105593: the intrinsics' own undefined registers
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include "attention_isa.h"

namespace dfk {
const AttentionOps attention_avx512 = avx512::kAttentionOps;
}
