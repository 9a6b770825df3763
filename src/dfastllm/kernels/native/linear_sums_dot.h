// Integer sums of a group by dot(): instruction sets with a dot product of bytes, and the portable code. See
// linear_tiles.h; R rows x C times 16 channels.
//
// AVX-512: group formats keep R * C int32 sums, R * C floats, the weights and scales in registers: at most 6 x 2. On
// Zen 4 vpdpbusd shares its two pipes with every multiplication, of floats and of integers, so 32 inputs cost 8 + 1
// issues a row and register (w6g and minima: 1 more each): 89 % of the vpdpbusd rate at best. Unpacking, conversions,
// vscalefps (which is how activation scales come in) and loads go to other pipes.
// 16 registers of 256 bits: 6 x 1, twelve registers of sums; the floats wait in the tile, and 2^p is a multiplication.
#pragma once

#include <cstdint>

#include "linear_codes.h"

namespace dfk::DFK_ISA::tiles {

template <int R, int C> struct Sums { Ints16 at[R][C]; };

#if defined(DFK_SIMD_AVX512)
constexpr bool kFloatsHeld = true;  // in registers while a slice is walked
template <class Codes> constexpr int block_rows() { return 6; }
template <class Codes> constexpr int width(int rows) { return rows <= 2 ? 4 : 2; }
// Of few rows (linear_few.h): what measured best. They walk all 64 channels, as these lie in memory: passes over 32 of them
// come to 12 GB/s a core, and one row more of outputs than fits the registers costs as much as two.
template <class Codes, bool mins> constexpr int kFewRows = Codes::parts == 2 ? 1 : mins ? 2 : 3;
template <class Codes> constexpr int few_width(int) { return 4; }
template <int R, int C> constexpr bool kFewHeld = R * C <= 8;
constexpr int kChannelWidth = 4;
#elif defined(DFK_SIMD_AVX2)
constexpr bool kFloatsHeld = false;
template <class Codes> constexpr int block_rows() { return 6; }
template <class Codes> constexpr int width(int rows) { return rows <= 2 ? 2 : 1; }
template <class Codes, bool mins> constexpr int kFewRows = 4;
constexpr int kChannelWidth = 1;
#elif defined(DFK_SIMD_DOT_TWICE)  // 32 registers of 128 bits: 4 x 4 of sums, 8 of weights, 4 of 16-bit products
constexpr bool kFloatsHeld = false;
template <class Codes> constexpr int block_rows() { return 4; }
template <class Codes> constexpr int width(int) { return 1; }
template <class Codes, bool mins> constexpr int kFewRows = 4;
constexpr int kChannelWidth = 1;
#elif defined(DFK_SIMD_NEON)  // 6 x 4 of sums, 4 of weights
constexpr bool kFloatsHeld = false;
template <class Codes> constexpr int block_rows() { return 6; }
template <class Codes> constexpr int width(int rows) { return rows == 1 && Codes::offset != 32 ? 4 : rows <= 2 ? 2 : 1; }
template <class Codes, bool mins> constexpr int kFewRows = 4;
constexpr int kChannelWidth = 1;
#else
constexpr bool kFloatsHeld = false;
template <class Codes> constexpr int block_rows() { return 2; }
template <class Codes> constexpr int width(int) { return 1; }
template <class Codes, bool mins> constexpr int kFewRows = 2;
constexpr int kChannelWidth = 1;
#endif
#if !defined(DFK_SIMD_AVX512)
template <class Codes> constexpr int few_width(int rows) { return width<Codes>(rows); }
template <int R, int C> constexpr bool kFewHeld = kFloatsHeld;
#endif

constexpr int kSteppedRows = 4;  // most rows for which w4s is unpacked in registers

// Where a part's sums start, of the sums of its activation codes.
template <class Codes, bool mins> constexpr bool kStartsAtZero = mins || Codes::offset == 0;
template <class Codes> inline Ints16 start_of(Ints16 sums) {
  if (Codes::offset == 0) return ints16(0);
  constexpr int power = Codes::offset == 128 ? 7 : Codes::offset == 32 ? 5 : 3;
  static_assert(Codes::offset == 0 || Codes::offset == 1 << power, "an offset of another size");
  return ints16(0) - shift_left<power>(sums);
}

// Clang moves a row's products to where its sums are read, and keeps all weights of the part in memory until then.
#if !defined(DFK_SIMD_NEON)
inline Ints16 here(Ints16 sum) { return sum; }
#endif

// The rows' codes over a slice.
template <class Codes, int R> struct Inputs {
  const int8_t* x;
  int64_t stride;
  Inputs(const int8_t* codes, int64_t from_row_to_row, int64_t) : x(codes), stride(from_row_to_row) {}
  const int8_t* at(int r, int64_t group) const { return x + r * stride + 32 * group; }
};

// sum += codes * activations of 4 inputs, register `i` of group g. data: the group's, at the first channel.
template <class Codes, int R, int C>
DFK_INLINE void add_step(const uint8_t* data, const Inputs<Codes, R>& in, int64_t g, int i, Sums<R, C>& sum) {
  Codes16 w[C];
  DFK_EACH(c, C) w[c] = Codes::at(data + 64 * c, i);
  DFK_EACH(r, R) {
    const Codes16 codes = four_codes(in.at(r, g) + 4 * i);
    DFK_EACH(c, C) sum.at[r][c] = here(dot(sum.at[r][c], w[c], codes));
  }
}

// The same of as many registers as go together.
#if defined(DFK_SIMD_DOT_TWICE)
constexpr int kTogether = 2;
template <class Codes, int R, int C>
DFK_INLINE void add_together(const uint8_t* data, const Inputs<Codes, R>& in, int64_t g, int i, Sums<R, C>& sum) {
  Codes16 w[C], next[C];
  DFK_EACH(c, C) w[c] = Codes::at(data + 64 * c, i);
  DFK_EACH(c, C) next[c] = Codes::at(data + 64 * c, i + 1);
  DFK_EACH(r, R) {
    const Codes16 codes = four_codes(in.at(r, g) + 4 * i), more = four_codes(in.at(r, g) + 4 * i + 4);
    DFK_EACH(c, C) sum.at[r][c] = here(dot(sum.at[r][c], w[c], codes, next[c], more));
  }
}
#else
constexpr int kTogether = 1;
template <class Codes, int R, int C>
DFK_INLINE void add_together(const uint8_t* data, const Inputs<Codes, R>& in, int64_t g, int i, Sums<R, C>& sum) {
  add_step(data, in, g, i, sum);
}
#endif

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
  DFK_EACH(i, steps / kTogether) add_together(data, in, g, p * steps + kTogether * i, sum);
  return sum;
}

// sum += codes * activations over `steps` registers of w8 (at most 8) of group g.
template <int R, int C>
DFK_INLINE void add_steps(const uint8_t* data, const Inputs<Bytes, R>& in, int64_t g, int64_t steps, Sums<R, C>& sum) {
  int i = 0;
  for (; i + kTogether <= steps; i += kTogether) add_together(data, in, g, i, sum);
  for (; i < steps; ++i) add_step(data, in, g, i, sum);
}

}  // namespace dfk::DFK_ISA::tiles
