// The linear kernels of the instruction set that this unit is compiled for.
#pragma once

#include "linear.h"
#include "linear_hadamard.h"
#include "linear_head_rows.h"
#include "linear_prepare.h"
#include "linear_tiles.h"
#include "low_rank_rows.h"

namespace dfk::DFK_ISA {

constexpr LinearOps kOps = {
    prepare_row, prepare_32, hadamard, tiles::kByFormat, tiles::kPairedRows, {gate_mul<silu_mul_16>, gate_mul<gelu_mul_16>}, softcap, write_tile, head_rows,
    low_rank::dots, low_rank::widen, low_rank::spread,
};

}  // namespace dfk::DFK_ISA
