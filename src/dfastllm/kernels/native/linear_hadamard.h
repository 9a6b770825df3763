// The Walsh-Hadamard transform of stretches of a row.
//
// Stages of butterflies (a, b) -> (a + b, a - b), partners 1, 2, 4 ... apart, then one factor: every operation rounds once
// and their order follows from the length alone, so all instruction sets and kernels/linear_plain.py give the same bits.
#pragma once

#include <cmath>
#include <cstdint>

#include "simd.h"

namespace dfk::DFK_ISA {

// 1 where the lane is the first of its pair, -1 where it is the second.
template <int distance>
inline Floats16 pair_signs() {
  constexpr float s = -1.0f, a = distance & 1 ? s : 1.0f, b = distance & 2 ? s : 1.0f, c = distance & 4 ? s : 1.0f,
                  d = distance & 8 ? s : 1.0f;
  alignas(64) static constexpr float lane[16] = {1.0f, a, b, a * b, c, a * c, b * c, a * b * c,
                                                 d, a * d, b * d, a * b * d, c * d, a * c * d, b * c * d, a * b * c * d};
  return load(lane);
}

// A product by 1 or -1 is exact, so a fused multiplication changes nothing.
template <int distance>
inline Floats16 butterfly(Floats16 x) {
  return crossed<distance>(x) + x * pair_signs<distance>();
}

// The stages whose partners lie in one register; the rest of a short one is zero.
inline Floats16 hadamard_16(Floats16 x, int64_t block) {
  if (block > 1) x = butterfly<1>(x);
  if (block > 2) x = butterfly<2>(x);
  if (block > 4) x = butterfly<4>(x);
  if (block > 8) x = butterfly<8>(x);
  return x;
}

// x [k] -> out [k], which is other memory: each stretch of `block` (a power of two that divides k) times the Hadamard
// matrix, over sqrt(block).
inline void hadamard(const float* x, int64_t k, int64_t block, float* out) {
  const Floats16 factor = floats16(1.0f / std::sqrt(static_cast<float>(block)));
  for (int64_t i = 0; i < k; i += 16) {
    const Floats16 v = hadamard_16(load_up_to(x + i, k - i), block);
    store_up_to(out + i, block <= 16 ? v * factor : v, k - i);
  }
  int64_t apart = 16;
  for (; 2 * apart < block; apart *= 4) {  // two stages at once, for fewer passes over the row
    const bool last = 4 * apart >= block;
    for (int64_t first = 0; first < k; first += 4 * apart) {
      for (float* p = out + first; p < out + first + apart; p += 16) {
        const Floats16 a = load(p), b = load(p + apart), c = load(p + 2 * apart), d = load(p + 3 * apart);
        const Floats16 s = a + b, t = a - b, u = c + d, v = c - d;
        const Floats16 done[4] = {s + u, t + v, s - u, t - v};
        for (int j = 0; j < 4; ++j) store(p + j * apart, last ? done[j] * factor : done[j]);
      }
    }
  }
  if (apart >= block) return;
  for (int64_t first = 0; first < k; first += 2 * apart) {
    for (float* p = out + first; p < out + first + apart; p += 16) {
      const Floats16 a = load(p), b = load(p + apart);
      store(p, (a + b) * factor);
      store(p + apart, (a - b) * factor);
    }
  }
}

}  // namespace dfk::DFK_ISA
