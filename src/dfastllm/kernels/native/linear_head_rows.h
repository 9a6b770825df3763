// Reduces tiles of logits.
#pragma once

#include <cstdint>

#include "linear.h"
#include "linear_head.h"
#include "simd.h"

namespace dfk::DFK_ISA {

// Best and second of a panel that has something better than the second so far; sums move on to the new best.
inline void better(const float* tile, int32_t first_id, HeadPart& part, Floats16& sum, Floats16& weighted) {
  const float before = part.best;
  for (int32_t c = 0; c < kPanel; ++c) {
    if (tile[c] > part.best) {
      part.second = part.best;
      part.best = tile[c];
      part.token = first_id + c;
    } else if (tile[c] > part.second) {
      part.second = tile[c];
    }
  }
  if (part.best == before || part.token < 0) return;
  const Floats16 lower = floats16(before > part.best + kLowestExponent ? before - part.best : kLowestExponent);
  const Floats16 factor = exp_inside(lower);
  weighted = factor * (weighted + lower * sum);
  sum = factor * sum;
}

// One panel's 64 logits of each row into parts[rows]. first_id: token of channel 0. check: look for NaN and infinity
// (otherwise someone else did, and excluded channels hold -inf). maxima [rows]: the panel's best logit per row, or null.
inline void head_rows(const float* tile, int64_t rows, int32_t first_id, bool check, bool entropy, HeadPart* parts,
                      float* maxima) {
  for (int64_t r = 0; r < rows; ++r, tile += kPanel) {
    HeadPart& part = parts[r];
    const Floats16 x[4] = {load(tile), load(tile + 16), load(tile + 32), load(tile + 48)};
    Floats16 sum = load(part.sum), weighted = load(part.weighted);
    if (check) {  // 0 * x is NaN where x is not finite
      const Floats16 zero = floats16(0.0f);
      sum = sum + fma(x[0], zero, fma(x[1], zero, fma(x[2], zero, x[3] * zero)));
    }
    const Floats16 high = max(max(x[0], x[1]), max(x[2], x[3]));
    if (any_greater(high, floats16(part.second))) better(tile, first_id, part, sum, weighted);  // rare after a few panels
    if (maxima) maxima[r] = highest(high);
    if (part.token >= 0) {
      const Floats16 best = floats16(part.best);
      for (const Floats16& value : x) {
        const Floats16 below = max(value - best, floats16(kLowestExponent));  // what is excluded adds 2e-38
        const Floats16 e = exp_inside(below);
        sum = sum + e;
        if (entropy) weighted = fma(e, below, weighted);
      }
    }
    store(part.sum, sum);
    store(part.weighted, weighted);
  }
}

}  // namespace dfk::DFK_ISA
