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

namespace dfk {
namespace avx512 {

#include "simd.h"
#include "linear_prepare.h"
#include "linear_float.h"
#include "linear_head_rows.h"
#include "linear_tiles.h"

}  // namespace avx512

const LinearOps linear_avx512 = {
    avx512::prepare_row,
    avx512::prepare_32,
    avx512::tiles::kByFormat,
    {avx512::gate_mul<avx512::silu_mul_16>, avx512::gate_mul<avx512::gelu_mul_16>},
    avx512::softcap,
    avx512::write_tile,
    avx512::head_rows,
};

}  // namespace dfk
