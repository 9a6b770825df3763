// The attention kernels of the instruction set that this unit is compiled for.
#pragma once

#include "attention.h"
#include "attention_rope.h"
#include "attention_walk.h"

namespace dfk::DFK_ISA {

constexpr AttentionOps kAttentionOps = {spans::rope_store_row, spans::scratch_bytes, spans::attend, spans::merge};

}  // namespace dfk::DFK_ISA
