// What the kernels must compute, written once more in the plainest way: from natural codes instead of panels, one number
// after another, without a line of the kernels' own. Slow.
#pragma once

#include <cstdint>

#include "attention.h"
#include "weights.h"

namespace driver {

// y [rows][n] of a linear layer, bias not added. Integer formats: the kernels' law to the last bit (linear_tiles.h). f32 and
// bf16: in double, to be met within rounding.
void linear_law(const Weights& w, const dfk::Acts& x, float* y);

// Codes, scale(s) and sums of one row x [k] as row8 or group8 wants it, beside prepared ones. Returns what differs, or null.
const char* quantise_law(const float* x, const dfk::Acts& prepared, int64_t row);

// Attention in double over stored K,V: out [rows][heads * dim].
void attention_law(const dfk::Attention& a, float* out);

}  // namespace driver
