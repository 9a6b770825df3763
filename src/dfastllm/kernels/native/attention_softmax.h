// Scores of a tile of keys -> softmax weights, and each row's running maximum and sums.
//
// Scores are in log2 units: log2(e) * scale is folded into q; where they are capped, scale / softcap is, and the cap has
// the log2(e).
#pragma once

#include <cmath>
#include <cstdint>

#include "attention.h"
#include "attention_products.h"
#include "simd.h"

namespace dfk::DFK_ISA::spans {

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kNone = -INFINITY;  // maximum of no keys

// 2^x to about 1 ulp, x <= 0 (2^0 is exactly 1; below 2^-125 it may be 0). A NaN stays a NaN.
inline Floats16 power2(Floats16 x) {
  x = max(floats16(-160.0f), x);
  const Floats16 n = round_even(x), r = x - n;
  Floats16 p = floats16(0x1.41fbbcp-13f);  // minimax of 2^r in [-1/2, 1/2], relative error 2e-9
  p = multiply_add(p, r, floats16(0x1.5f3e52p-10f));
  p = multiply_add(p, r, floats16(0x1.3b2d4cp-7f));
  p = multiply_add(p, r, floats16(0x1.c6aee8p-5f));
  p = multiply_add(p, r, floats16(0x1.ebfbdcp-3f));
  p = multiply_add(p, r, floats16(0x1.62e430p-1f));
  p = multiply_add(p, r, floats16(1.0f));
  return times_two_to(p, n);
}

// tanh(x), by 2^(2 x log2 e): its error is absolute, about 1e-7. A NaN stays a NaN.
inline Floats16 tanh_of(Floats16 x) {
  const Floats16 one = floats16(1.0f), ten = floats16(10.0f);  // beyond 10 it is 1 to the last bit
  const Floats16 e = power2(min(ten, max(floats16(-10.0f), x)) * floats16(2.0f * kLog2e));
  return (e - one) / (e + one);
}

// Where a tile's keys are weighed by scales, int8 only.
struct TileScales {
  const float *k[kTileBlocks], *v[kTileBlocks];
};

// Weights of block b of a row, and what is added to its sum: p, or what p was rounded to.
inline Floats16 put_weights(Singles, Floats16 p, float* row, int b) {
  store(row + b * kBlock, p);
  return p;
}
#if defined(DFK_SIMD_PAIRS)
inline Floats16 put_weights(Pairs, Floats16 p, float* row, int b) {
  return store_bf16(reinterpret_cast<uint16_t*>(row) + b * kBlock, p);
}
#endif

// Scores s [rows][kTile] -> weights 2^(score - maximum), in place (Pairs: bfloat16 in the first half of a row); maxima
// [rows] and lane sums [rows][16] brought up to date. scale [rows]: what the rows' weighted V so far must be multiplied by.
// bits [rows][kTileBlocks]: the visible keys; the weights of others are 0. All: every row sees every key, and bits is not
// read. cap > 0: scores x become cap * tanh(x) first of all, but for
// int8: scores are multiplied by the keys' scales before that, and the weights by those of V (not in the sums).
template <bool All, class T>
void soften(int rows, const TileScales& scales, int blocks, const uint32_t* bits, float cap, float* s, float* top,
            float* lanes, float* scale) {
  constexpr bool coded = sizeof(T) == 1;
  const Floats16 none = floats16(kNone);
  float now[16] = {}, shift[16] = {};
  for (int r = 0; r < rows; ++r) {
    Floats16 most = none;
    uint32_t any = All;
    for (int b = 0; b < blocks; ++b) {
      const uint32_t seen = All ? 0xffffu : bits[r * kTileBlocks + b];
      any |= seen;
      float* at = s + r * kTile + b * kBlock;
      Floats16 x = load(at);
      if constexpr (coded) x = x * load(scales.k[b]);
      if (cap > 0.0f) x = tanh_of(x) * floats16(cap);
      if constexpr (!All) x = select(seen, x, none);
      if (!All || coded || cap > 0.0f) store(at, x);
      most = max(most, x);
    }
    const float high = highest(most);
    // A row that sees keys but no score above -infinity (NaN ones are lost in a maximum) has met values that are not
    // finite, and is NaN from here on: kNone is for rows that have seen nothing.
    const float next = any == 0 ? top[r] : !(high > kNone) ? NAN : high > top[r] ? high : top[r];
    now[r] = next == kNone ? 0.0f : next;  // so that nothing is subtracted from itself at infinity
    shift[r] = top[r] - now[r];
    top[r] = next;
  }
  store(shift, power2(load(shift)));
  for (int r = 0; r < rows; ++r) {
    const Floats16 high = floats16(now[r]);
    Floats16 sum = floats16(0.0f);
    for (int b = 0; b < blocks; ++b) {
      const uint32_t seen = All ? 0xffffu : bits[r * kTileBlocks + b];
      const auto shown = [seen](Floats16 x) { return All ? x : select(seen, x, floats16(0.0f)); };
      const Floats16 p = shown(power2(load(s + r * kTile + b * kBlock) - high));
      if constexpr (coded) {  // a hidden key's scale may be anything
        put_weights(Products<T>{}, shown(p * load(scales.v[b])), s + r * kTile, b);
        sum = sum + p;
      } else {
        sum = sum + put_weights(Products<T>{}, p, s + r * kTile, b);
      }
    }
    scale[r] = shift[r];
    store(lanes + r * kBlock, multiply_add(load(lanes + r * kBlock), floats16(shift[r]), sum));
  }
}

}  // namespace dfk::DFK_ISA::spans
