// Integer tiles: one panel (64 output channels) times rows of int8 codes -> float [rows][64]. tiles::w8, w8g, w4g and w6g
// are of type Tile, and tiles::kByFormat holds those of every format. This is the walk, for all formats and instruction
// sets; where codes come from is in linear_codes.h, how a group's integer sums are made, and how many rows and channels
// that takes at a time, in linear_sums_dot.h, linear_sums_pairs.h and linear_sums_matrix.h.
//
// Weights are the unsigned operand of the dot product (u8 x s8), so their codes are stored with an offset (128, 8 or
// 32). Integer sums start at -offset * sum(activation codes) instead of zero, which takes it off again, exactly.
//
// What is computed, in this order whatever the number of rows, and to the same bits on every instruction set (each line
// one rounding, for products with 2^p are exact):
//   w8          y = (float(sum) * scale[n]) * act_scale[m], one rounding more        sum over the whole k
//   w4s         the same of the codes (code - zero[g, n]) * step[g, n], which are signed bytes
//   w8g, w4g    y = fma(float(sum_g) * 2^p[m, g], factor[m, g] * scale[g, n], y)     g = 0, 1, 2, ... from y = 0
//   w6g         the same for each half of 16 inputs of group g; for the whole of it in slices of a panel whose halves
//               share their scales and minima
//   with minima, after each group: y = fma(-min[g, n], act_scale[m, g] * float(code_sum[m, g]), y), each half of w6g
// Group activation scales are act_scale = factor * 2^p with a factor of 1, 1.25, 1.5 or 1.75 (linear_prepare.h), which
// takes 3 bits: its product with a scale of float16 is exact.
// w8 sums fit 32 bits for k up to 133,152 (2^31 / 127^2), past any model's.
//
// The panel is walked in slices of 256 inputs (at most 16 KB, half of the L1 cache) and all row blocks of the call pass
// over a slice. With more than one row block the slice after it is prefetched meanwhile, a little at a time. Panels lie
// one after another, so the prefetch runs on into the next one; at the end of the matrix it runs past it, which is
// allowed (prefetches never fault). Few rows take two panels at a time, see linear_few.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "linear.h"
#include "linear_codes.h"
#include "linear_few.h"
#include "linear_float.h"
#include "linear_groups.h"
#include "linear_stepped.h"
#include "linear_walk.h"
#include "simd.h"
#include "unroll.h"

namespace dfk::DFK_ISA::tiles {

// One row block's walk over one slice.
struct Block {
  const uint8_t* data;      // panel, at the slice
  const float* table;       // of scale_table
  const uint16_t* mins;
  const int8_t* x;          // codes, at the block's first row and the slice
  int64_t stride;
  const float* x_scales;    // at the block's first row and the slice
  int64_t x_scales_stride;
  const int32_t* x_sums;    // the same, [..][2 * groups]
  int groups;
  float* tile;
};

// The starts of many rows, and by group how activation scales come in.
template <class Codes, bool mins, int R> struct Starts : SumStarts<Codes, mins, R> {
  alignas(64) float power[R][16];      // activation scales are factor * 2^power
  alignas(64) int32_t variant[R][16];  // factor is (4 + variant) / 4

  explicit Starts(const Block& b) : SumStarts<Codes, mins, R>(b.x_scales, b.x_scales_stride, b.x_sums, b.groups) {
    for (int r = 0; r < R; ++r) {
      const Floats16 x_scales = load(b.x_scales + r * b.x_scales_stride, b.groups);
      store(power[r], powers(x_scales));
      store(variant[r], shift_right<21>(bits(x_scales)) & ints16(3));
    }
  }
};

// Weight scales times each factor an activation scale may have: [groups][4][parts][64] floats. 3 bits more than float16
// has: exact.
template <class Codes> inline const float* scale_table(const uint16_t* scales, int64_t groups, void* scratch) {
  constexpr int side = Codes::parts * kPanel;  // of the table
  float* const out = reinterpret_cast<float*>(static_cast<char*>(scratch) + kSlice * UnpackedSixes::bytes);
  float* table = out;
  for (int64_t g = 0; g < groups; ++g, scales += Codes::side, table += 4 * side) {
    for (int i = 0; i < side; i += 16) {
      const Floats16 scale = load_half(scales + i), quarter = scale * floats16(0.25f);
      Floats16 value = scale;
      DFK_EACH(v, 4) {
        store(table + v * side + i, value);
        value = value + quarter;
      }
    }
  }
  return out;
}

// y += sums * activation scale * weight scale (- minima * weighted sums), for group `g`. table: its scales.
template <class Codes, bool mins, int R, int C>
DFK_INLINE void add_group(const uint8_t* data, const float* table, const uint16_t* minima, const Inputs<Codes, R>& in,
                      const Starts<Codes, mins, R>& starts, int g, Outputs<R, C>& y) {
  DFK_EACH(p, Codes::parts) {
    const Sums<R, C> sum = group_part<Codes, mins, R, C>(data, in, starts, g, p);
    DFK_EACH(r, R) {
      const Floats16 power = floats16(starts.power[r][g]);
      const float* const row = table + (starts.variant[r][g] * Codes::parts + p) * kPanel;
      DFK_EACH(c, C) y.put(r, c, fma(times_power(to_float(sum.at[r][c]), power), load(row + 16 * c), y.get(r, c)));
    }
  }
  if (mins) take_minima<Codes, mins>(minima, starts, g, y);
}

// R rows x C times 16 channels from `channel` on, over the slice.
template <class Codes, bool mins, int R, int C>
inline void group_columns(const Block& b, const Inputs<Codes, R>& in, const Starts<Codes, mins, R>& starts, int channel,
                          Ahead& ahead) {
  const uint8_t* data = b.data + channel * 4;
  const float* table = b.table + channel;
  const uint16_t* minima = mins ? b.mins + channel : nullptr;
  Outputs<R, C> y(b.tile + channel);
  for (int g = 0; g < b.groups; ++g, data += Codes::bytes, table += 4 * Codes::parts * kPanel) {
    ahead.turn();
    add_group<Codes, mins, R, C>(data, table, minima, in, starts, g, y);
    if (mins) minima += Codes::side;
  }
  y.finish();
}

template <class Codes, bool mins, int R> void group_rows(const Block& b, Ahead& ahead) {
  constexpr int C = width<Codes>(R);
  const Starts<Codes, mins, R> starts(b);
  const Inputs<Codes, R> in(b.x, b.stride, b.groups);
  for (int channel = 0; channel < kPanel; channel += 16 * C) {
    group_columns<Codes, mins, R, C>(b, in, starts, channel, ahead);
  }
}

// The kernel for `rows` rows, at most block_rows.
template <class Codes, bool mins, int R = 1> void group_block(int rows, const Block& b, Ahead& ahead) {
  if constexpr (R < block_rows<Codes>()) {
    if (rows > R) return group_block<Codes, mins, R + 1>(rows, b, ahead);
  }
  group_rows<Codes, mins, R>(b, ahead);
}

template <class Codes, bool mins> void group_slice(int rows, const Block& b, bool unpacked, Ahead& ahead) {
  if (unpacked) group_block<typename Codes::Unpacked, mins>(rows, b, ahead);
  else group_block<Codes, mins>(rows, b, ahead);
}

// Groups of the slice after [g, g + here): the panel's next or the first of the next panel.
inline int64_t groups_ahead(int64_t groups, int64_t g, int64_t here, int64_t slice) {
  const int64_t left = groups - g - here, most = left > 0 ? left : groups;
  return most < slice ? most : slice;
}

template <class Codes, bool mins>
void group_tile(const Linear& w, const Acts& x, int64_t panel, int64_t row0, int64_t rows, float* tile, void* scratch) {
  constexpr int64_t side = Codes::parts * kPanel;  // scales of 32 inputs
  constexpr int64_t slice = kSlice / Codes::parts;  // w6g: its unpacked codes and two scales a group fill the L1 cache sooner
  constexpr int64_t most = block_rows<Codes>();
  const int64_t groups = w.k / 32, x_groups = x.stride / 32, blocks = (rows + most - 1) / most;
  const bool unpack = Codes::parts == 2 && blocks > 2;
  using Whole = typename Codes::Whole;
  std::memset(tile, 0, static_cast<size_t>(rows * kPanel) * sizeof(float));
  Block b;
  b.stride = x.stride;
  b.x_scales_stride = x_groups;
  for (int64_t g = 0; g < groups; g += slice) {
    const int64_t here = groups - g < slice ? groups - g : slice, at = panel * groups + g;
    const int64_t fetch = groups_ahead(groups, g, here, slice);
    const uint8_t* data = static_cast<const uint8_t*>(w.data) + at * Codes::bytes;
    b.groups = static_cast<int>(here);
    b.data = unpack ? unpack_sixes(data, here, scratch) : data;
    const uint16_t* const scales = static_cast<const uint16_t*>(w.scales) + at * side;
    b.mins = mins ? w.mins + at * side : nullptr;
    // Depends on the weights alone, so it is the same for every row.
    const bool whole = Codes::parts == 2 && equal_parts(scales, here) && (!mins || equal_parts(b.mins, here));
    b.table = whole ? scale_table<Whole>(scales, here, scratch) : scale_table<Codes>(scales, here, scratch);
    Ahead(scales + here * side, fetch * side * 2, 1).turn();
    if (mins) Ahead(b.mins + here * side, fetch * side * 2, 1).turn();
    const int64_t passes = kPanel / 16 / width<Codes>(static_cast<int>(rows / blocks));
    Ahead ahead(data + here * Codes::bytes, fetch * Codes::bytes, here * blocks * passes);
    for (int64_t i = 0; i < blocks; ++i) {
      const RowBlock block = row_block(rows, blocks, i);
      const int64_t row = row0 + block.first;
      b.x = static_cast<const int8_t*>(x.data) + row * x.stride + g * 32;
      b.x_scales = x.scales + row * x_groups + g;
      b.x_sums = x.sums + 2 * (row * x_groups + g);
      b.tile = tile + block.first * kPanel;
      if (whole) group_slice<Whole, mins>(block.rows, b, unpack, ahead);
      else group_slice<Codes, mins>(block.rows, b, unpack, ahead);
    }
  }
}

// Per-channel weights: R rows x 64 channels over `steps` registers of 4 inputs. The int32 sums wait in the tile's memory
// between slices.
template <int R>
inline void channel_rows(const uint8_t* data, const int8_t* x, int64_t stride, int64_t steps, int32_t* tile, Ahead& ahead) {
  constexpr int C = kChannelWidth;
  const Inputs<Bytes, R> in(x, stride, (steps + 7) / 8);
  for (int channel = 0; channel < kPanel; channel += 16 * C) {
    Sums<R, C> sum;
    DFK_EACH(r, R) {
      DFK_EACH(c, C) sum.at[r][c] = load_ints(tile + r * kPanel + channel + 16 * c);
    }
    int64_t i = 0;
    for (; i + 8 <= steps; i += 8) {  // a count that GCC knows: with any other it keeps the sums in memory, at half the speed
      ahead.turn();
      add_steps<R, C>(data + 256 * i + 4 * channel, in, i / 8, 8, sum);
    }
    if (i < steps) add_steps<R, C>(data + 256 * i + 4 * channel, in, i / 8, steps - i, sum);
    DFK_EACH(r, R) {
      DFK_EACH(c, C) store(tile + r * kPanel + channel + 16 * c, sum.at[r][c]);
    }
  }
}

template <int R = 1>
void channel_block(int rows, const uint8_t* data, const int8_t* x, int64_t stride, int64_t steps, int32_t* tile,
                   Ahead& ahead) {
  if constexpr (R < block_rows<Bytes>()) {
    if (rows > R) return channel_block<R + 1>(rows, data, x, stride, steps, tile, ahead);
  }
  channel_rows<R>(data, x, stride, steps, tile, ahead);
}

// The int32 sums of w8 in a tile's memory -> floats with both scales.
inline void scale_sums(const Linear& w, const Acts& x, int64_t panel, int64_t row0, int64_t rows, float* tile) {
  const float* scales = static_cast<const float*>(w.scales) + panel * kPanel;
  for (int64_t r = 0; r < rows; ++r, tile += kPanel) {
    const Floats16 x_scale = floats16(x.scales[row0 + r]);
    for (int c = 0; c < kPanel; c += 16) {
      const Ints16 sum = load_ints(reinterpret_cast<const int32_t*>(tile + c));
      store(tile + c, to_float(sum) * load(scales + c) * x_scale);
    }
  }
}

// Where a panel's sums begin: at minus the offset times a row's sum of codes.
inline void start_sums(const Acts& x, int64_t row0, int64_t rows, int32_t* sums) {
  for (int64_t r = 0; r < rows; ++r) {
    const Ints16 start = kStartsAtZero<Bytes, false> ? ints16(0) : start_of<Bytes>(ints16(x.sums[row0 + r]));
    for (int c = 0; c < kPanel; c += 16) store(sums + r * kPanel + c, start);
  }
}

// The codes of a panel as w8's bytes, a slice after the other.
struct WholeBytes {  // w8
  static constexpr bool stepped = false;
  const uint8_t* data;
  WholeBytes(const Linear& w, int64_t panel, void*) : data(static_cast<const uint8_t*>(w.data) + panel * round_up(w.k, 4) * kPanel) {}
  const uint8_t* slice(int64_t step, int64_t) const { return data + step * 256; }
  const uint8_t* packed(int64_t step) const { return data + step * 256; }  // where it lies in memory
};

struct SteppedBytes {  // w4s
  static constexpr bool stepped = true;
  const uint8_t* data;
  void* scratch;
  SteppedBytes(const Linear& w, int64_t panel, void* memory)
      : data(static_cast<const uint8_t*>(w.data) + panel * (w.k / 32) * kSteppedBytes), scratch(memory) {}
  const uint8_t* slice(int64_t step, int64_t steps) const { return unpack_stepped(packed(step), steps / 8, scratch); }
  const uint8_t* packed(int64_t step) const { return data + step / 8 * kSteppedBytes; }
};

#if defined(DFK_SIMD_DOT)
// Few rows of w4s: the panel in one pass as it lies in memory, unpacked in registers, all channels of a group before the
// next. tile: int32 sums.
template <int R> inline void stepped_rows(const uint8_t* data, const int8_t* x, int64_t stride, int64_t groups, int32_t* tile) {
  constexpr int C = kChannelWidth;
  const Codes16 offset = codes16(static_cast<int8_t>(Bytes::offset));
  const int64_t pass = 16 * C < kPanel ? 1 : groups;  // of sums that stay in registers
  for (int64_t first = 0; first < groups; first += pass) {
    for (int channel = 0; channel < kPanel; channel += 16 * C) {
      Ints16 sum[R][C];
      DFK_EACH(r, R) {
        DFK_EACH(c, C) sum[r][c] = load_ints(tile + r * kPanel + channel + 16 * c);
      }
      const uint8_t* group = data + first * kSteppedBytes;
      for (int64_t g = first; g < first + pass; ++g, group += kSteppedBytes) {
        Stepped stepped[C];
        DFK_EACH(c, C) stepped[c] = Stepped(group + Nibbles::bytes + channel + 16 * c, offset);
        DFK_EACH(i, 8) {
          Codes16 w[C];
          DFK_EACH(c, C) w[c] = stepped[c].at(group + 4 * channel + 64 * c, i);
          DFK_EACH(r, R) {
            const Codes16 codes = four_codes(x + r * stride + 32 * g + 4 * i);
            DFK_EACH(c, C) sum[r][c] = here(dot(sum[r][c], w[c], codes));
          }
        }
      }
      DFK_EACH(r, R) {
        DFK_EACH(c, C) store(tile + r * kPanel + channel + 16 * c, sum[r][c]);
      }
    }
  }
}

template <int R = 1>
inline void stepped_few(int64_t rows, const uint8_t* data, const int8_t* x, int64_t stride, int64_t groups, int32_t* tile) {
  if constexpr (R < kSteppedRows) {
    if (rows > R) return stepped_few<R + 1>(rows, data, x, stride, groups, tile);
  }
  stepped_rows<R>(data, x, stride, groups, tile);
}

// Of panels in turns, as other formats' (linear_few.h).
inline void stepped_tiles(const Linear& w, const Acts& x, const Panels& panels, int64_t row0, int64_t rows, float* tiles) {
  constexpr int64_t turn = kTurnGroups<Nibbles>;
  const int64_t groups = w.k / 32;
  const int8_t* const codes = static_cast<const int8_t*>(x.data) + row0 * x.stride;
  int32_t* const sums = reinterpret_cast<int32_t*>(tiles);
  for (int i = 0; i < panels.count(); ++i) start_sums(x, row0, rows, sums + i * rows * kPanel);
  for (int64_t g = 0; g < groups; g += turn) {
    const int64_t here = groups - g < turn ? groups - g : turn;
    for (int i = 0; i < panels.count(); ++i) {
      const uint8_t* const data = static_cast<const uint8_t*>(w.data) + (panels.at[i] * groups + g) * kSteppedBytes;
      stepped_few(rows, data, codes + 32 * g, x.stride, here, sums + i * rows * kPanel);
    }
  }
  for (int i = 0; i < panels.count(); ++i) scale_sums(w, x, panels.at[i], row0, rows, tiles + i * rows * kPanel);
}
#endif

#if defined(DFK_SIMD_DOT)
constexpr bool kSteppedAsStored = false;
constexpr int64_t kSteppedPaired = kSteppedRows;
#else
constexpr int64_t kSteppedPaired = 0;
constexpr bool kSteppedAsStored = true;  // products of nibbles are cheaper than those of bytes
#endif

template <class Source>
inline void channel_tile(const Linear& w, const Acts& x, int64_t panel, int64_t row0, int64_t rows, float* tile, void* scratch) {
  constexpr bool as_stored = Source::stepped && kSteppedAsStored;
  constexpr int64_t most = as_stored ? block_rows<Nibbles>() : block_rows<Bytes>(), slice = 8 * kSlice;
  const int64_t steps = (w.k + 3) / 4, blocks = (rows + most - 1) / most;
  const Source source(w, panel, scratch);
  int32_t* sums = reinterpret_cast<int32_t*>(tile);
  start_sums(x, row0, rows, sums);
  for (int64_t s = 0; s < steps; s += slice) {
    const int64_t here = steps - s < slice ? steps - s : slice;
    const int64_t turns = as_stored ? blocks : (here + 7) / 8 * blocks * (kPanel / 16 / kChannelWidth);
    const uint8_t* data = as_stored ? source.packed(s) : source.slice(s, here);
    const uint8_t* next = source.packed(s + here);
    Ahead ahead(next, blocks == 1 ? 0 : source.packed(s + here + slice) - next, turns);
    for (int64_t i = 0; i < blocks; ++i) {
      const RowBlock block = row_block(rows, blocks, i);
      const int64_t row = row0 + block.first;
      const int8_t* codes = static_cast<const int8_t*>(x.data) + row * x.stride + 4 * s;
#if !defined(DFK_SIMD_DOT)
      if constexpr (as_stored) {
        ahead.turn();
        stepped_block(block.rows, data, codes, x.stride, here / 8, sums + block.first * kPanel);
        continue;
      }
#endif
      channel_block(block.rows, data, codes, x.stride, here, sums + block.first * kPanel, ahead);
    }
  }
  scale_sums(w, x, panel, row0, rows, tile);
}

// one(panel, its tile) for each.
template <class One> void each_panel(const Panels& panels, int64_t rows, float* tiles, One&& one) {
  for (int i = 0; i < panels.count(); ++i) one(panels.at[i], tiles + i * rows * kPanel);
}

template <class Codes, bool mins>
void group_tiles(const Linear& w, const Acts& x, const Panels& panels, int64_t row0, int64_t rows, float* tiles, void* scratch) {
  if (rows <= kFewRows<Codes, mins>) return few_tiles<Codes, mins>(w, x, panels, row0, rows, tiles);
  each_panel(panels, rows, tiles, [&](int64_t panel, float* tile) {
    group_tile<Codes, mins>(w, x, panel, row0, rows, tile, scratch);
  });
}

inline void w8(const Linear& w, const Acts& x, const Panels& panels, int64_t row0, int64_t rows, float* tiles, void* scratch) {
  each_panel(panels, rows, tiles, [&](int64_t panel, float* tile) {
    channel_tile<WholeBytes>(w, x, panel, row0, rows, tile, scratch);
  });
}

inline void w4s(const Linear& w, const Acts& x, const Panels& panels, int64_t row0, int64_t rows, float* tiles, void* scratch) {
#if defined(DFK_SIMD_DOT)
  if (rows <= kSteppedRows) return stepped_tiles(w, x, panels, row0, rows, tiles);
#endif
  each_panel(panels, rows, tiles, [&](int64_t panel, float* tile) {
    channel_tile<SteppedBytes>(w, x, panel, row0, rows, tile, scratch);
  });
}

inline void w8g(const Linear& w, const Acts& x, const Panels& panels, int64_t row0, int64_t rows, float* tiles, void* scratch) {
  group_tiles<Bytes, false>(w, x, panels, row0, rows, tiles, scratch);
}

inline void w4g(const Linear& w, const Acts& x, const Panels& panels, int64_t row0, int64_t rows, float* tiles, void* scratch) {
  if (w.mins) group_tiles<Nibbles, true>(w, x, panels, row0, rows, tiles, scratch);
  else group_tiles<Nibbles, false>(w, x, panels, row0, rows, tiles, scratch);
}

inline void w6g(const Linear& w, const Acts& x, const Panels& panels, int64_t row0, int64_t rows, float* tiles, void* scratch) {
  if (w.mins) group_tiles<Sixes, true>(w, x, panels, row0, rows, tiles, scratch);
  else group_tiles<Sixes, false>(w, x, panels, row0, rows, tiles, scratch);
}

template <class T>
void floats(const Linear& w, const Acts& x, const Panels& panels, int64_t row0, int64_t rows, float* tiles, void*) {
  each_panel(panels, rows, tiles, [&](int64_t panel, float* tile) { float_tile<T>(w, x, panel, row0, rows, tile); });
}

constexpr Tile kByFormat[] = {floats<float>, floats<uint16_t>, w8, w8g, w4g, w6g, w4s};

// The most rows that take two panels at once, by format. w8 has little to do between loads, and one stream is enough.
constexpr int64_t kPairedRows[] = {0, 0, 0, kFewRows<Bytes, false>, kFewRows<Nibbles, false>, kFewRows<Sixes, false>, kSteppedPaired};
static_assert(sizeof kByFormat / sizeof(Tile) == sizeof kPairedRows / sizeof(int64_t), "an entry for each format");
constexpr bool pairs_fit() {
  for (const int64_t rows : kPairedRows) {
    if (rows > kMostPaired) return false;
  }
  return true;
}
static_assert(pairs_fit(), "tiles of two panels are kept for fewer rows");

}  // namespace dfk::DFK_ISA::tiles
