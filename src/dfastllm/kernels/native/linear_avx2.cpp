#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "linear.h"
#include "linear_head.h"

namespace dfk {
namespace avx2 {

#include "simd.h"
#include "linear_prepare.h"
#include "linear_float.h"
#include "linear_head_rows.h"
#include "linear_tiles.h"

}  // namespace avx2

const LinearOps linear_avx2 = {
    avx2::prepare_row,
    avx2::prepare_32,
    avx2::tiles::kByFormat,
    {avx2::gate_mul<avx2::silu_mul_16>, avx2::gate_mul<avx2::gelu_mul_16>},
    avx2::softcap,
    avx2::write_tile,
    avx2::head_rows,
};

}  // namespace dfk
