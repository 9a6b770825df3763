// Integer sums of a group on AVX2 without VNNI, by vpmaddubsw: two products of an unsigned and a signed byte, added up and
// saturated at 16 bits. No sum here saturates, so that the sums are exact. See linear_tiles.h; R rows x C times 16
// channels.
//
// 8-bit codes: 255 * 127 * 2 does not fit 16 bits. The activations are cut once a row block, x = low + 16 * high with low
// in [-8, 7] and high in [-8, 8]; products with each fit, and so do sums over a group: 8 * 2 * 255 * 8 = 32,640. The high
// sums start at -8 times the sum of the codes x that this 16-bit number adds up, which takes 128 off the weights; 16-bit
// additions wrap around, so only the end must fit, and it does: 16 * (128 * 8 + 8 * 8) = 17,408.
// Two multiplications and two additions for 32 products, nothing to unpack; no way with fewer is known to us (widened to
// 16 bits: the same, and 1/2 for unpacking; the absolute value of one side with the sign on the other: the same).
// 4-bit codes: sums over a group fit as they are, 8 * 2 * 15 * 127 = 30,480. They start at half of the part's start in
// each 16-bit number, and end within the same 30,480.
// w4s, whose codes are 4-bit ones: the same, from minus the zero times the sum of the codes x on, so that the sums of a
// group end within 8 * 2 * 15 * 127 again; widening multiplies with the step.
// 6-bit codes: 2 * 63 * 127 fits, a sum of 4 need not. It starts at minus 32 times the sum of the codes that this 16-bit
// number adds up, and so ends within 4 * 2 * 32 * 127 = 32,512. For minima the 32 comes in again as a 32-bit number.
#pragma once

#include <cstdint>

#include "linear_codes.h"

namespace dfk::DFK_ISA::tiles {

template <int R, int C> struct Sums { Ints16 at[R][C]; };
template <int R, int C> struct PairSums { Pairs16 at[R][C]; };

constexpr bool kFloatsHeld = false;
template <class Codes> constexpr bool is_bytes() { return Codes::offset == 128; }
template <class Codes> constexpr int block_rows() { return is_bytes<Codes>() ? 3 : 5; }
template <class Codes> constexpr int width(int rows) { return rows == 1 && !is_bytes<Codes>() ? 2 : 1; }
template <class Codes, bool mins> constexpr int kFewRows = 3;
template <class Codes> constexpr int few_width(int rows) { return width<Codes>(rows); }
template <int R, int C> constexpr bool kFewHeld = kFloatsHeld;
constexpr int kChannelWidth = 1;

template <class Codes, bool mins> constexpr bool kStartsAtZero = Codes::offset == 32 ? !mins : mins || is_bytes<Codes>();
template <class Codes> inline Ints16 start_of(Ints16 sums) {
  if (Codes::offset == 32) return shift_left<5>(sums);
  const Ints16 half = ints16(0) - shift_left<2>(sums);  // of -8 * sums: twice in 16 bits
  return (half & ints16(0xffff)) + shift_left<16>(half);
}

// The rows' codes over a slice, cut for 8-bit weights; for 8- and 6-bit ones also where their sums start.
template <class Codes, int R> struct Inputs {
  const int8_t* x;
  int64_t stride;
  alignas(32) int8_t cut[is_bytes<Codes>() ? R : 1][kSlice][64];  // 32 low parts, 32 high ones
  int32_t starts[Codes::offset == 8 ? 1 : R][2 * kSlice];         // two 16-bit numbers, by group or half of a group
  Inputs(const int8_t* codes, int64_t from_row_to_row, int64_t groups) : x(codes), stride(from_row_to_row) {
    for (int r = 0; r < R; ++r) {
      for (int64_t g = 0; g < groups; ++g) {
        if (is_bytes<Codes>()) {
          split_codes(at(r, g), cut[r][g], cut[r][g] + 32);
          starts[r][g] = group_starts(at(r, g));
        }
        if (Codes::offset == 32) half_starts(at(r, g), starts[r] + 2 * g);
      }
    }
  }
  const int8_t* at(int r, int64_t group) const { return x + r * stride + 32 * group; }
};

// 16-bit sums of 8-bit weights with both parts of the activations, over `steps` registers of 4 inputs (at most 8) of group
// g. data: the group's; all: steps is 8.
template <bool all, int R, int C>
inline Sums<R, C> byte_sums(const uint8_t* data, const Inputs<Bytes, R>& in, int64_t g, int64_t steps) {
  PairSums<R, C> low, high;
  const auto add = [&](int64_t i) {
    Codes16 w[C];
    DFK_EACH(c, C) w[c] = load_codes(data + 256 * i + 64 * c);
    DFK_EACH(r, R) {
      const Codes16 l = four_codes(in.cut[r][g] + 4 * i);
      DFK_EACH(c, C) low.at[r][c] = add_products(low.at[r][c], w[c], l);
      const Codes16 h = four_codes(in.cut[r][g] + 32 + 4 * i);
      DFK_EACH(c, C) high.at[r][c] = add_products(high.at[r][c], w[c], h);
    }
  };
  DFK_EACH(r, R) {
    DFK_EACH(c, C) {
      low.at[r][c] = pairs16(0);
      high.at[r][c] = two_shorts(in.starts[r][g]);
    }
  }
  if constexpr (all) {
    DFK_EACH(i, 8) add(i);
  } else {
    for (int64_t i = 0; i < steps; ++i) add(i);
  }
  Sums<R, C> sum;
  DFK_EACH(r, R) {
    DFK_EACH(c, C) sum.at[r][c] = widened(low.at[r][c], pairs16(1)) + widened(high.at[r][c], pairs16(16));
  }
  return sum;
}

// sum += codes * activations over `steps` registers of w8 (at most 8) of group g.
template <int R, int C>
inline void add_steps(const uint8_t* data, const Inputs<Bytes, R>& in, int64_t g, int64_t steps, Sums<R, C>& sum) {
  const Sums<R, C> more = steps == 8 ? byte_sums<true, R, C>(data, in, g, 8) : byte_sums<false, R, C>(data, in, g, steps);
  DFK_EACH(r, R) {
    DFK_EACH(c, C) sum.at[r][c] = sum.at[r][c] + more.at[r][c];
  }
}

// The 16-bit sums of `steps` registers of 4- or 6-bit weights from `first` on, widened.
template <class Codes, int R, int C, int first, int steps>
inline Sums<R, C> narrow_sums(const uint8_t* data, const Inputs<Codes, R>& in, int g, const int32_t (&starts)[R]) {
  PairSums<R, C> pairs;
  DFK_EACH(r, R) {
    DFK_EACH(c, C) pairs.at[r][c] = two_shorts(starts[r]);
  }
  DFK_EACH(i, steps) {
    Codes16 w[C];
    DFK_EACH(c, C) w[c] = Codes::at(data + 64 * c, first + i);
    DFK_EACH(r, R) {
      const Codes16 codes = four_codes(in.at(r, g) + 4 * (first + i));
      DFK_EACH(c, C) pairs.at[r][c] = add_products(pairs.at[r][c], w[c], codes);
    }
  }
  Sums<R, C> sum;
  DFK_EACH(r, R) {
    DFK_EACH(c, C) sum.at[r][c] = widened(pairs.at[r][c], pairs16(1));
  }
  return sum;
}

// Part `p` of group `g` from the starts [row][...] on. data: the group's, at the first channel.
template <class Codes, bool mins, int R, int C>
inline Sums<R, C> part_sums(const uint8_t* data, const Inputs<Codes, R>& in, const int32_t (&starts)[R][16], int g, int p) {
  int32_t from[R];
  if constexpr (is_bytes<Codes>()) {
    return byte_sums<true, R, C>(data, in, g, 8);
  } else if constexpr (Codes::offset == 8) {
    DFK_EACH(r, R) from[r] = mins ? 0 : starts[r][g];
    return narrow_sums<Codes, R, C, 0, 8>(data, in, g, from);
  } else {
    Sums<R, C> sum;
    if (Codes::parts == 1 || p == 0) {
      DFK_EACH(r, R) from[r] = in.starts[r][2 * g];
      sum = narrow_sums<Codes, R, C, 0, 4>(data, in, g, from);
    }
    if (Codes::parts == 1 || p == 1) {
      DFK_EACH(r, R) from[r] = in.starts[r][2 * g + 1];
      const Sums<R, C> more = narrow_sums<Codes, R, C, 4, 4>(data, in, g, from);
      DFK_EACH(r, R) {
        DFK_EACH(c, C) sum.at[r][c] = Codes::parts == 1 ? sum.at[r][c] + more.at[r][c] : more.at[r][c];
      }
    }
    if (!kStartsAtZero<Codes, mins>) {
      DFK_EACH(r, R) {
        const Ints16 start = ints16(starts[r][g * Codes::parts + p]);
        DFK_EACH(c, C) sum.at[r][c] = sum.at[r][c] + start;
      }
    }
    return sum;
  }
}

// R rows of w4s over the groups of a slice, all channels of a group before the next. tile: int32 sums.
template <int R>
inline void stepped_slice(const uint8_t* data, const int8_t* x, int64_t stride, int64_t groups, int32_t* tile) {
  int32_t sums[R][kSlice];
  for (int r = 0; r < R; ++r) {
    for (int64_t g = 0; g < groups; ++g) sums[r][g] = group_sums(x + r * stride + 32 * g);
  }
  for (int64_t g = 0; g < groups; ++g, data += kSteppedBytes) {
    for (int channel = 0; channel < kPanel; channel += 16) {
      const Codes16 side = four_of_each(data + Nibbles::bytes + channel);
      const Pairs16 step = low_nibbles(side) + pairs16(1), zero = high_nibbles(side);
      Pairs16 pairs[R];
      DFK_EACH(r, R) pairs[r] = pairs16(0) - zero * two_shorts(sums[r][g]);
      DFK_EACH(i, 8) {
        const Codes16 w = Nibbles::at(data + 4 * channel, i);
        DFK_EACH(r, R) pairs[r] = add_products(pairs[r], w, four_codes(x + r * stride + 32 * g + 4 * i));
      }
      DFK_EACH(r, R) {
        int32_t* const to = tile + r * kPanel + channel;
        store(to, load_ints(to) + widened(pairs[r], step));
      }
    }
  }
}

template <int R = 1>
inline void stepped_block(int rows, const uint8_t* data, const int8_t* x, int64_t stride, int64_t groups, int32_t* tile) {
  if constexpr (R < block_rows<Nibbles>()) {
    if (rows > R) return stepped_block<R + 1>(rows, data, x, stride, groups, tile);
  }
  stepped_slice<R>(data, x, stride, groups, tile);
}

}  // namespace dfk::DFK_ISA::tiles
