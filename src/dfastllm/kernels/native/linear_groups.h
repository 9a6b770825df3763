// What a walk over the groups of a panel begins with and adds up to, whether of many rows (linear_tiles.h) or of few
// (linear_few.h).
#pragma once

#include <cstdint>

#include "linear.h"
#include "linear_codes.h"
#include "simd.h"
#include "unroll.h"

#if defined(DFK_SIMD_MATRIX)
#include "linear_sums_matrix.h"
#elif defined(DFK_SIMD_DOT)
#include "linear_sums_dot.h"
#else
#include "linear_sums_pairs.h"
#endif

namespace dfk::DFK_ISA::tiles {

// Where the integer sums start, and what minima are multiplied with (less than zero), for the slice, by part of a group.
template <class Codes, bool mins, int R> struct SumStarts {
  alignas(64) int32_t sum[kStartsAtZero<Codes, mins> ? 1 : R][16];
  alignas(64) float weighted[mins ? R : 1][16];

  // x_scales [R][..], `stride` apart, x_sums [R][..], 2 * stride apart: at the slice, of `groups` groups.
  SumStarts(const float* x_scales, int64_t stride, const int32_t* x_sums, int groups) {
    static_assert(2 * kSlice <= 16, "the sums of a slice fill sixteen lanes");
    if (kStartsAtZero<Codes, mins> && !mins) return;
    for (int r = 0; r < R; ++r) {
      Ints16 sums = load_ints(x_sums + r * 2 * stride, 2 * groups);
      if (Codes::parts == 1) sums = neighbours_added(sums);
      if (mins) {
        const Floats16 scales = load(x_scales + r * stride, groups);
        store(weighted[r], (Codes::parts == 2 ? doubled(scales) : scales) * to_float(sums) * floats16(-1.0f));
      }
      if (!kStartsAtZero<Codes, mins>) store(sum[r], start_of<Codes>(sums));
    }
  }
};

// The integer sums of part `p` of group `g`. data: the group's, at the first channel.
template <class Codes, bool mins, int R, int C>
DFK_INLINE Sums<R, C> group_part(const uint8_t* data, const Inputs<Codes, R>& in, const SumStarts<Codes, mins, R>& starts, int g,
                                 int p) {
  if constexpr (kStartsAtZero<Codes, mins>) return part_sums<Codes, mins, R, C>(data, in, {}, g, p);
  else return part_sums<Codes, mins, R, C>(data, in, starts.sum, g, p);
}

// The outputs of R rows x C times 16 channels while a slice is walked: in registers where they fit, else in the tile.
template <int R, int C, bool held = kFloatsHeld> struct Outputs {
  Floats16 kept[held ? R : 1][held ? C : 1];
  float* tile;
  explicit DFK_INLINE Outputs(float* at) : tile(at) {
    if constexpr (held) {
      DFK_EACH(r, R) {
        DFK_EACH(c, C) kept[r][c] = load(tile + r * kPanel + 16 * c);
      }
    }
  }
  DFK_INLINE Floats16 get(int r, int c) const {
    if constexpr (held) return kept[r][c];
    else return load(tile + r * kPanel + 16 * c);
  }
  DFK_INLINE void put(int r, int c, Floats16 y) {
    if constexpr (held) kept[r][c] = y;
    else store(tile + r * kPanel + 16 * c, y);
  }
  DFK_INLINE void finish() {
    if constexpr (held) {
      DFK_EACH(r, R) {
        DFK_EACH(c, C) store(tile + r * kPanel + 16 * c, kept[r][c]);
      }
    }
  }
};

// y -= minima * weighted sums, for group `g`. minima: float16, at the first channel.
template <class Codes, bool mins, int R, int C, bool held>
DFK_INLINE void take_minima(const uint16_t* minima, const SumStarts<Codes, mins, R>& starts, int g, Outputs<R, C, held>& y) {
  DFK_EACH(p, Codes::parts) {
    Floats16 low[C];
    DFK_EACH(c, C) low[c] = load_half(minima + p * kPanel + 16 * c);
    DFK_EACH(r, R) {
      const Floats16 weighted = floats16(starts.weighted[r][g * Codes::parts + p]);
      DFK_EACH(c, C) y.put(r, c, fma(low[c], weighted, y.get(r, c)));
    }
  }
}

}  // namespace dfk::DFK_ISA::tiles
