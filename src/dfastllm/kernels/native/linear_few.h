// Integer tiles of few rows, which wait for weights from memory. See linear_tiles.h for what is computed.
//
// Two panels at a time, a turn of each (a few KB) in turn. A core's hardware prefetchers run only so far ahead of one
// stream that the time to unpack and multiply comes on top of the memory's; with two streams one is fetched while the
// other is computed. Measured on Zen 4, one core, 4-bit weights, one row: 26 GB/s of one panel after another, 33 of two,
// which is what a loop that only reads gets; turns of 1 to 4 KB do it, of 8 KB do not, nor four streams; prefetch
// instructions make it slower (they top out near 20 GB/s a core). The two panels are best far apart, each followed by the
// one behind it: a stream that begins anew costs as much as a few KB.
//
// An activation scale is factor * 2^p with 3 bits of factor, and a group's sum has 19: their product is exact, so
// fma(sum * act_scale, scale, y) has the bits of the many rows' fma(sum * 2^p, factor * scale, y), up to where sum *
// act_scale overflows (inputs past 1e33). No table of scales is needed, which few rows would not pay for.
#pragma once

#include <cstdint>
#include <cstring>

#include "linear.h"
#include "linear_codes.h"
#include "linear_groups.h"
#include "linear_walk.h"
#include "simd.h"
#include "unroll.h"

namespace dfk::DFK_ISA::tiles {

// Groups of a panel before it is the other's turn: 2 or 3 KB.
template <class Codes> constexpr int kTurnGroups = Codes::bytes == 2048 ? 1 : 2;

// A panel at a slice, and its outputs.
struct Lane {
  const uint8_t* data;
  const uint16_t* scales;  // [groups][64] float16 bits
  const uint16_t* mins;
  float* tile;
};

// The rows at a slice: of `groups` groups.
struct FewRows {
  const int8_t* x;
  int64_t stride;
  const float* scales;
  int64_t scales_stride;
  const int32_t* sums;  // [..][2 * groups]
  int groups;
};

// R rows x C times 16 channels from `channel` on, over groups [first, last) of the slice.
template <class Codes, bool mins, int R, int C>
inline void few_columns(const Lane& lane, const FewRows& rows, const Inputs<Codes, R>& in, const SumStarts<Codes, mins, R>& starts,
                        int channel, int first, int last) {
  Outputs<R, C, kFewHeld<R, C>> y(lane.tile + channel);
  for (int g = first; g < last; ++g) {
    const uint8_t* const data = lane.data + channel * 4 + g * Codes::bytes;
    DFK_EACH(p, Codes::parts) {
      const Sums<R, C> sum = group_part<Codes, mins, R, C>(data, in, starts, g, p);
      Floats16 scale[C];
      DFK_EACH(c, C) scale[c] = load_half(lane.scales + channel + g * Codes::side + p * kPanel + 16 * c);
      DFK_EACH(r, R) {
        const Floats16 x_scale = floats16(rows.scales[r * rows.scales_stride + g]);
        DFK_EACH(c, C) y.put(r, c, fma(to_float(sum.at[r][c]) * x_scale, scale[c], y.get(r, c)));
      }
    }
    if (mins) take_minima<Codes, mins>(lane.mins + channel + g * Codes::side, starts, g, y);
  }
  y.finish();
}

template <class Codes, bool mins, int R> void few_slice(const Lane* lanes, int count, const FewRows& rows) {
  constexpr int C = few_width<Codes>(R), turn = kTurnGroups<Codes>;
  const SumStarts<Codes, mins, R> starts(rows.scales, rows.scales_stride, rows.sums, rows.groups);
  const Inputs<Codes, R> in(rows.x, rows.stride, rows.groups);
  for (int g = 0; g < rows.groups; g += turn) {
    const int end = g + turn < rows.groups ? g + turn : rows.groups;
    for (int i = 0; i < count; ++i) {
      // All channels of a group before the next, as they lie in memory.
      for (int at = g; at < end; at += 16 * C < kPanel ? 1 : turn) {
        const int last = 16 * C < kPanel ? at + 1 : end;
        for (int channel = 0; channel < kPanel; channel += 16 * C) {
          few_columns<Codes, mins, R, C>(lanes[i], rows, in, starts, channel, at, last);
        }
      }
    }
  }
}

// The slice of `count` panels for so many rows, at most kFewRows.
template <class Codes, bool mins, int R = 1>
void few_block(int64_t rows, const Lane* lanes, int count, const FewRows& x) {
  if constexpr (R < kFewRows<Codes, mins>) {
    if (rows > R) return few_block<Codes, mins, R + 1>(rows, lanes, count, x);
  }
  few_slice<Codes, mins, R>(lanes, count, x);
}

// tiles [panels][rows][64].
template <class Codes, bool mins>
void few_tiles(const Linear& w, const Acts& x, const Panels& panels, int64_t row0, int64_t rows, float* tiles) {
  using Whole = typename Codes::Whole;
  constexpr int64_t slice = kSlice / Codes::parts;  // that of many rows, for `whole` is decided by the slice
  const int64_t groups = w.k / 32, x_groups = x.stride / 32;
  const int count = panels.count();
  std::memset(tiles, 0, static_cast<size_t>(count * rows * kPanel) * sizeof(float));
  for (int64_t g = 0; g < groups; g += slice) {
    const int64_t here = groups - g < slice ? groups - g : slice, row = row0 * x_groups + g;
    const FewRows at{static_cast<const int8_t*>(x.data) + row0 * x.stride + g * 32, x.stride, x.scales + row, x_groups,
                     x.sums + 2 * row, static_cast<int>(here)};
    Lane lanes[2];
    bool whole[2] = {};
    for (int i = 0; i < count; ++i) {
      const int64_t group = panels.at[i] * groups + g;
      lanes[i] = {static_cast<const uint8_t*>(w.data) + group * Codes::bytes,
                  static_cast<const uint16_t*>(w.scales) + group * Codes::side,
                  mins ? w.mins + group * Codes::side : nullptr, tiles + i * rows * kPanel};
      whole[i] = Codes::parts == 2 && equal_parts(lanes[i].scales, here) && (!mins || equal_parts(lanes[i].mins, here));
    }
    const int together = whole[0] == whole[count - 1] ? count : 1;
    for (int i = 0; i < count; i += together) {
      if (whole[i]) few_block<Whole, mins>(rows, lanes + i, together, at);
      else few_block<Codes, mins>(rows, lanes + i, together, at);
    }
  }
}

}  // namespace dfk::DFK_ISA::tiles
