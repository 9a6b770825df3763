// Integer sums of a group by products of 2 channels and 2 rows (DFK_SIMD_MATRIX), 8 inputs at once: twice the products
// of an instruction of dot(). Weights lie 4 inputs of a channel together, so two registers are interleaved for all rows
// of a block, and the sums of two rows are taken apart at the end of a part. A single row takes dot(). See
// linear_tiles.h; R rows x C times 16 channels: 32 registers, 3 x 8 of sums of two rows, 2 of weights at a time.
#pragma once

#include <cstdint>
#include <cstring>

#include "linear_codes.h"

namespace dfk::DFK_ISA::tiles {

template <int R, int C> struct Sums { Ints16 at[R][C]; };

constexpr bool kFloatsHeld = false;
template <class Codes> constexpr int block_rows() { return 6; }
template <class Codes> constexpr int width(int rows) { return rows == 1 && Codes::offset != 32 ? 4 : rows <= 2 ? 2 : 1; }
template <class Codes, bool mins> constexpr int kFewRows = 4;
template <class Codes> constexpr int few_width(int rows) { return width<Codes>(rows); }
template <int R, int C> constexpr bool kFewHeld = kFloatsHeld;
constexpr int kChannelWidth = 1;

constexpr int kSteppedRows = 1;  // most rows for which w4s is unpacked in registers

template <class Codes, bool mins> constexpr bool kStartsAtZero = mins;
template <class Codes> inline Ints16 start_of(Ints16 sums) {
  constexpr int power = Codes::offset == 128 ? 7 : Codes::offset == 32 ? 5 : 3;
  static_assert(Codes::offset == 1 << power, "an offset of another size");
  return ints16(0) - shift_left<power>(sums);
}

// The rows' codes over a slice, of two rows 8 by 8; an odd last row goes with zeros.
template <class Codes, int R> struct Inputs {
  static constexpr int both = R / 2 + R % 2;
  const int8_t* x;
  alignas(64) int8_t pairs[R == 1 ? 1 : both][4 * kSlice][16];
  Inputs(const int8_t* codes, int64_t stride, int64_t groups) : x(codes) {
    for (int r = 0; R > 1 && r < 2 * both; ++r) {
      for (int64_t i = 0; i < 4 * groups; ++i) {
        int8_t* const to = pairs[r / 2][i] + 8 * (r % 2);
        if (r < R) std::memcpy(to, codes + r * stride + 8 * i, 8);
        else std::memset(to, 0, 8);
      }
    }
  }
};

template <int R, int C> struct RunningPairs { RowPairs16 at[R / 2 + R % 2][C]; };

// sum += codes * activations of registers i and i + 1 of group g; odd: register i + 1 does not exist.
template <class Codes, int R, int C>
DFK_INLINE void add_eight(const uint8_t* data, const Inputs<Codes, R>& in, int64_t g, int i, bool odd,
                          RunningPairs<R, C>& sum) {
  DFK_EACH(c, C) {
    const Codes16 w = Codes::at(data + 64 * c, i), next = odd ? codes16(0) : Codes::at(data + 64 * c, i + 1);
    DFK_EACH(q, 4) {
      const Eights4 eights = eight_inputs(w, next, q);
      DFK_EACH(r, R / 2 + R % 2) add_matrix(sum.at[r][c], eights, in.pairs[r][4 * g + i / 2], q);
    }
  }
}

template <int R, int C> DFK_INLINE RunningPairs<R, C> together(const Sums<R, C>& sum) {
  RunningPairs<R, C> out;
  DFK_EACH(r, R / 2 + R % 2) {
    DFK_EACH(c, C) out.at[r][c] = row_pairs(sum.at[2 * r][c], sum.at[2 * r + 1 < R ? 2 * r + 1 : 2 * r][c]);
  }
  return out;
}

template <int R, int C> DFK_INLINE Sums<R, C> apart(const RunningPairs<R, C>& sum) {
  Sums<R, C> out;
  DFK_EACH(r, R) {
    DFK_EACH(c, C) out.at[r][c] = r % 2 ? second_row(sum.at[r / 2][c]) : first_row(sum.at[r / 2][c]);
  }
  return out;
}

// One row: register `i` of group g.
template <class Codes, int C>
DFK_INLINE void add_step(const uint8_t* data, const Inputs<Codes, 1>& in, int64_t g, int i, Sums<1, C>& sum) {
  const Codes16 codes = four_codes(in.x + 32 * g + 4 * i);
  DFK_EACH(c, C) sum.at[0][c] = here(dot(sum.at[0][c], Codes::at(data + 64 * c, i), codes));
}

// Part `p` of group `g` from the starts [row][...] on. data: the group's, at the first channel.
template <class Codes, bool mins, int R, int C>
DFK_INLINE Sums<R, C> part_sums(const uint8_t* data, const Inputs<Codes, R>& in, const int32_t (&starts)[R][16], int g,
                                int p) {
  constexpr int steps = 8 / Codes::parts;  // registers of weights that share a scale
  Sums<R, C> sum;
  DFK_EACH(r, R) {
    const Ints16 start = kStartsAtZero<Codes, mins> ? ints16(0) : ints16(starts[r][g * Codes::parts + p]);
    DFK_EACH(c, C) sum.at[r][c] = start;
  }
  if constexpr (R == 1) {
    DFK_EACH(i, steps) add_step(data, in, g, p * steps + i, sum);
    return sum;
  } else {
    RunningPairs<R, C> pairs = together(sum);
    DFK_EACH(i, steps / 2) add_eight(data, in, g, p * steps + 2 * i, false, pairs);
    return apart(pairs);
  }
}

// sum += codes * activations over `steps` registers of w8 (at most 8) of group g.
template <int R, int C>
DFK_INLINE void add_steps(const uint8_t* data, const Inputs<Bytes, R>& in, int64_t g, int64_t steps, Sums<R, C>& sum) {
  if constexpr (R == 1) {
    for (int i = 0; i < steps; ++i) add_step(data, in, g, i, sum);
  } else {
    RunningPairs<R, C> pairs = together(sum);
    for (int i = 0; i < steps; i += 2) add_eight(data, in, g, i, i + 1 == steps, pairs);
    sum = apart(pairs);
  }
}

}  // namespace dfk::DFK_ISA::tiles
