// The kernels of one instruction set. Included inside a translation unit's own namespace, after <immintrin.h> (x86),
// linear_head.h and low_rank.h.
#include "linear_natural.h"
#include "simd.h"
#include "linear_prepare.h"
#include "linear_walk.h"
#include "linear_float.h"
#include "linear_head_rows.h"
#include "linear_tiles.h"
#include "low_rank_rows.h"

constexpr LinearOps kOps = {
    prepare_row, prepare_32, tiles::kByFormat, {gate_mul<silu_mul_16>, gate_mul<gelu_mul_16>}, softcap, write_tile, head_rows,
    low_rank::dots, low_rank::widen, low_rank::spread,
};
