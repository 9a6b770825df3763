#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "linear.h"
#include "linear_head.h"

namespace dfk {
namespace scalar {

#include "simd.h"
#include "linear_prepare.h"
#include "linear_float.h"
#include "linear_head_rows.h"
#include "linear_tiles.h"

}  // namespace scalar

const LinearOps linear_scalar = {
    scalar::prepare_row,
    scalar::prepare_32,
    scalar::tiles::kByFormat,
    {scalar::gate_mul<scalar::silu_mul_16>, scalar::gate_mul<scalar::gelu_mul_16>},
    scalar::softcap,
    scalar::write_tile,
    scalar::head_rows,
};

}  // namespace dfk
