// Integer tiles: one panel (64 output channels) times rows of int8 codes -> float [rows][64]. Included inside a
// translation unit's own namespace, after <immintrin.h> (x86), <cstring> and linear.h; tiles::w8, w8g, w4g and w6g are
// of type Tile, and tiles::kByFormat holds those of every format.
//
// Weights are the unsigned operand of the dot product (u8 x s8), so their codes are stored with an offset (128, 8 or
// 32). Integer sums start at -offset * sum(activation codes) instead of zero, which takes it off again, exactly.
//
// What is computed, in this order whatever the number of rows (each line one rounding; fma where the instruction set
// has it, else two):
//   w8          y = (float(sum) * scale[n]) * act_scale[m]                          sum over the whole k
//   w8g, w4g    y = fma(float(sum_g) * act_scale[m, g], scale[g, n], y)             g = 0, 1, 2, ... from y = 0
//   w6g         the same for each half of 16 inputs of group g; for the whole of it in slices of a panel whose halves
//               share their scales and minima (AVX-512)
//   with minima, after each group: y = fma(-min[g, n], act_scale[m, g] * float(code_sum[m, g]), y), each half of w6g
// Group activation scales are 1, 1.25, 1.5 or 1.75 times a power of two (linear_prepare.h), which takes 3 bits, and a
// group's sum takes at most 20, so their product is exact. (AVX2 and the portable kernels multiply in another order,
// with a rounding more.)
// w8 sums fit 32 bits for k up to 133,152 (2^31 / 127^2), past any model's.
//
// The panel is walked in slices of 256 inputs (at most 16 KB, half of the L1 cache) and all row blocks of the call pass
// over a slice. With more than one row block the slice after it is prefetched meanwhile, a little at a time. Panels lie
// one after another, so the prefetch runs on into the next one; at the end of the matrix it runs past it, which is
// allowed (prefetches never fault).
#include "unroll.h"

namespace tiles {

constexpr int kSlice = 8;  // groups of 32 inputs

// One row block's walk over one slice.
struct Block {
  const uint8_t* data;      // panel, at the slice
  const uint16_t* scales;   // [groups][64] float16 bits, at the slice
  const float* table;       // AVX-512: of scale_table, unless there are few rows
  const uint16_t* mins;
  const int8_t* x;          // codes, at the block's first row and the slice
  int64_t stride;
  const float* x_scales;    // at the block's first row and the slice
  int64_t x_scales_stride;
  const int32_t* x_sums;    // the same, [..][2 * groups]
  int groups;
  bool first;               // of the panel: the tile starts at zero
  float* tile;
};

// The int32 sums of w8 in a tile's memory -> floats with both scales.
inline void scale_sums(const Linear& w, const Acts& x, int64_t panel, int64_t row0, int64_t rows, float* tile) {
  const float* scales = static_cast<const float*>(w.scales) + panel * kPanel;
  for (int64_t r = 0; r < rows; ++r, tile += kPanel) {
    int32_t sum[kPanel];
    std::memcpy(sum, tile, sizeof sum);
    for (int c = 0; c < kPanel; ++c) tile[c] = static_cast<float>(sum[c]) * scales[c] * x.scales[row0 + r];
  }
}

#if defined(__AVX512VNNI__)
#include "linear_tiles_avx512.h"
#elif defined(__AVX2__)
#include "linear_tiles_avx2.h"
#else
#include "linear_tiles_scalar.h"
#endif

#if defined(__AVX2__)  // the walk over a panel with the kernels above

// Per-channel weights: the int32 sums wait in the tile's memory between slices.
inline void w8(const Linear& w, const Acts& x, int64_t panel, int64_t row0, int64_t rows, float* tile, void*) {
  const int64_t steps = (w.k + 3) / 4, blocks = (rows + kBlockRows - 1) / kBlockRows;
  const uint8_t* data = static_cast<const uint8_t*>(w.data) + panel * steps * 256;
  for (int64_t s = 0; s < steps; s += 8 * kSlice) {
    const int64_t here = steps - s < 8 * kSlice ? steps - s : 8 * kSlice;
    const int64_t turns = (here + 7) / 8 * blocks * channel_passes(static_cast<int>(rows / blocks));
    Ahead ahead(data + (s + here) * 256, is_channel_single(rows) ? 0 : 8 * kSlice * 256, turns);
    for (int64_t i = 0; i < blocks; ++i) {
      const RowBlock block = row_block(rows, blocks, i);
      const int64_t row = row0 + block.first;
      const int8_t* codes = static_cast<const int8_t*>(x.data) + row * x.stride + 4 * s;
      channel_block(block.rows, data + s * 256, codes, x.stride, here, s == 0, x.sums + row, tile + block.first * kPanel, ahead);
    }
  }
  scale_sums(w, x, panel, row0, rows, tile);
}

// Groups of the slice after [g, g + here): the panel's next or the first of the next panel.
inline int64_t groups_ahead(int64_t groups, int64_t g, int64_t here, int64_t slice) {
  const int64_t left = groups - g - here, most = left > 0 ? left : groups;
  return most < slice ? most : slice;
}

template <class Codes, bool mins> void group_slice(int rows, const Block& b, bool single, bool unpacked, Ahead& ahead) {
  if (single) group_block<Codes, mins, true>(rows, b, ahead);
  else if (unpacked) group_block<typename Codes::Unpacked, mins, false>(rows, b, ahead);
  else group_block<Codes, mins, false>(rows, b, ahead);
}

template <class Codes, bool mins>
void group_tile(const Linear& w, const Acts& x, int64_t panel, int64_t row0, int64_t rows, float* tile, void* scratch) {
  constexpr int64_t side = Codes::parts * kPanel;  // scales of 32 inputs
  constexpr int64_t slice = kSlice / Codes::parts;  // w6g: its unpacked codes and two scales a group fill the L1 cache sooner
  const int64_t groups = w.k / 32, x_groups = x.stride / 32, blocks = (rows + kBlockRows - 1) / kBlockRows;
  const bool single = is_single<Codes>(rows), unpack = Codes::parts == 2 && blocks > 2;
  using Whole = typename Codes::Whole;
  Block b;
  b.table = nullptr;
  b.stride = x.stride;
  b.x_scales_stride = x_groups;
  for (int64_t g = 0; g < groups; g += slice) {
    const int64_t here = groups - g < slice ? groups - g : slice, at = panel * groups + g;
    const int64_t fetch = single ? 0 : groups_ahead(groups, g, here, slice);
    const uint8_t* data = static_cast<const uint8_t*>(w.data) + at * Codes::bytes;
    b.groups = static_cast<int>(here);
    b.first = g == 0;
    b.data = unpack ? unpack_sixes(data, here, scratch) : data;
    b.scales = static_cast<const uint16_t*>(w.scales) + at * side;
    b.mins = mins ? w.mins + at * side : nullptr;
    // Depends on the weights alone, so it is the same for every row.
    const bool whole = Codes::parts == 2 && equal_parts(b.scales, here) && (!mins || equal_parts(b.mins, here));
    if (!single) b.table = whole ? scale_table<Whole>(b.scales, here, scratch) : scale_table<Codes>(b.scales, here, scratch);
    Ahead(b.scales + here * side, fetch * side * 2, 1).turn();
    if (mins) Ahead(b.mins + here * side, fetch * side * 2, 1).turn();
    Ahead ahead(data + here * Codes::bytes, fetch * Codes::bytes,
                here * blocks * passes<Codes>(static_cast<int>(rows / blocks), single));
    for (int64_t i = 0; i < blocks; ++i) {
      const RowBlock block = row_block(rows, blocks, i);
      const int64_t row = row0 + block.first;
      b.x = static_cast<const int8_t*>(x.data) + row * x.stride + g * 32;
      b.x_scales = x.scales + row * x_groups + g;
      b.x_sums = x.sums + 2 * (row * x_groups + g);
      b.tile = tile + block.first * kPanel;
      if (whole) group_slice<Whole, mins>(block.rows, b, single, unpack, ahead);
      else group_slice<Codes, mins>(block.rows, b, single, unpack, ahead);
    }
  }
}

inline void w8g(const Linear& w, const Acts& x, int64_t panel, int64_t row0, int64_t rows, float* tile, void* scratch) {
  group_tile<Bytes, false>(w, x, panel, row0, rows, tile, scratch);
}

inline void w4g(const Linear& w, const Acts& x, int64_t panel, int64_t row0, int64_t rows, float* tile, void* scratch) {
  if (w.mins) group_tile<Nibbles, true>(w, x, panel, row0, rows, tile, scratch);
  else group_tile<Nibbles, false>(w, x, panel, row0, rows, tile, scratch);
}

inline void w6g(const Linear& w, const Acts& x, int64_t panel, int64_t row0, int64_t rows, float* tile, void* scratch) {
  if (w.mins) group_tile<Sixes, true>(w, x, panel, row0, rows, tile, scratch);
  else group_tile<Sixes, false>(w, x, panel, row0, rows, tile, scratch);
}

#endif

static const Tile kByFormat[] = {float_tile<float>, float_tile<uint16_t>, w8, w8g, w4g, w6g};

}  // namespace tiles
