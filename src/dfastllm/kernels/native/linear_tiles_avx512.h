// AVX-512 VNNI tiles; see linear_tiles.h. One register holds 4 consecutive inputs of 16 channels; vpdpbusd adds their
// products with 4 broadcast activation codes to 16 int32 sums.
//
// Row blocks are R rows x C registers of channels. Group formats keep R * C int32 sums, R * C floats, the weights and
// scales in registers: at most 6 x 2. On Zen 4 vpdpbusd shares its two pipes with float multiplication, so 32 inputs
// cost 8 + 2 issues a row and register (8 + 3 with minima): 80 % of the vpdpbusd rate at best. Unpacking, conversions
// and loads go to other pipes.

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // false alarms from GCC 12's own _mm512_undefined_*
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

// Register arrays stay in registers only when the loops over them are unrolled before GCC looks at arrays.
#if defined(__clang__)
#define DFK_UNROLL _Pragma("unroll")
#else
#define DFK_UNROLL _Pragma("GCC unroll 16")
#endif

// One row block's walk over one slice.
struct Block {
  const uint8_t* data;      // panel, at the slice
  const uint16_t* scales;   // [groups][64] float16 bits, at the slice
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

inline __m512 half16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }

inline __m512i four_codes(const int8_t* p) {
  int32_t v;
  std::memcpy(&v, p, sizeof v);
  return _mm512_set1_epi32(v);
}

// Weight codes of one register of channels: inputs [0, 32) as 8 registers, made one at a time. p: the group's data at
// the first of these channels.
template <Format format> struct Codes;

template <> struct Codes<Format::w8g> {
  static constexpr int offset = 128;
  static inline __m512i at(const uint8_t* p, int i) { return _mm512_loadu_si512(p + 256 * i); }
};

template <> struct Codes<Format::w4g> {
  static constexpr int offset = 8;
  static inline __m512i at(const uint8_t* p, int i) {
    const __m512i both = _mm512_loadu_si512(p + 256 * (i / 2));
    return _mm512_and_si512(i % 2 ? _mm512_srli_epi16(both, 4) : both, _mm512_set1_epi8(15));
  }
};

template <> struct Codes<Format::w6g> {
  static constexpr int offset = 32;
  static inline __m512i at(const uint8_t* p, int i) {
    p += 768 * (i / 4);
    const __m512i both = _mm512_loadu_si512(p + 256 * (i % 4 / 2));
    const __m512i high = _mm512_loadu_si512(p + 512);
    const __m512i low = i % 2 ? _mm512_srli_epi16(both, 4) : both;
    __m512i h = high;
    if (i % 4 == 0) h = _mm512_slli_epi16(high, 4);
    if (i % 4 == 1) h = _mm512_slli_epi16(high, 2);
    if (i % 4 == 3) h = _mm512_srli_epi16(high, 2);
    h = _mm512_and_si512(h, _mm512_set1_epi8(0x30));
    return _mm512_ternarylogic_epi64(low, _mm512_set1_epi8(15), h, 0xEA);  // (low & 15) | h
  }
};

// Where the integer sums start, and what minima are multiplied with, for the slice. Per group of 32; w6g: per half.
template <Format format, bool mins, int R> struct Starts {
  static constexpr int parts = format == Format::w6g ? 2 : 1;
  alignas(64) int32_t sum[mins ? 1 : R][parts * kSlice];
  alignas(64) float weighted[mins ? R : 1][parts * kSlice];

  explicit Starts(const Block& b) {
    const __mmask16 halves = static_cast<__mmask16>((1u << (2 * b.groups)) - 1);
    const __mmask8 whole = static_cast<__mmask8>((1u << b.groups) - 1);
    const __m512i even = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    for (int r = 0; r < R; ++r) {
      __m512i sums = _mm512_maskz_loadu_epi32(halves, b.x_sums + r * 2 * b.x_scales_stride);
      if (parts == 1) {
        sums = _mm512_add_epi32(sums, _mm512_srli_epi64(sums, 32));
        sums = _mm512_permutexvar_epi32(even, sums);
      }
      if (mins) {
        __m512 scales = _mm512_castps256_ps512(_mm256_maskz_loadu_ps(whole, b.x_scales + r * b.x_scales_stride));
        if (parts == 2) scales = _mm512_permutexvar_ps(twice, scales);
        const __m512 product = _mm512_mul_ps(scales, _mm512_cvtepi32_ps(sums));
        if (parts == 2) _mm512_store_ps(weighted[r], product);
        else _mm256_store_ps(weighted[r], _mm512_castps512_ps256(product));
      } else {
        const __m512i start = _mm512_mullo_epi32(sums, _mm512_set1_epi32(-Codes<format>::offset));
        if (parts == 2) _mm512_store_si512(sum[r], start);
        else _mm256_store_si256(reinterpret_cast<__m256i*>(sum[r]), _mm512_castsi512_si256(start));
      }
    }
  }
};

// R rows x C registers of channels: sums, floats.
template <int R, int C> struct Sums { __m512i at[R][C]; };
template <int R, int C> struct Floats { __m512 at[R][C]; };

// Integer sums of part `p` of a group.
template <Format format, bool mins, int R, int C>
inline Sums<R, C> part_sums(const uint8_t* data, const int8_t* x, int64_t stride, const Starts<format, mins, R>& starts, int g, int p) {
  constexpr int steps = 8 / Starts<format, mins, R>::parts;  // registers of weights that share a scale
  Sums<R, C> sum;
  DFK_UNROLL
  for (int r = 0; r < R; ++r) {
    const __m512i start =
        mins ? _mm512_setzero_si512() : _mm512_set1_epi32(starts.sum[r][g * Starts<format, mins, R>::parts + p]);
    DFK_UNROLL
    for (int c = 0; c < C; ++c) sum.at[r][c] = start;
  }
  DFK_UNROLL
  for (int i = 0; i < steps; ++i) {
    __m512i w[C];
    DFK_UNROLL
    for (int c = 0; c < C; ++c) w[c] = Codes<format>::at(data + 64 * c, p * steps + i);
    DFK_UNROLL
    for (int r = 0; r < R; ++r) {
      const __m512i codes = four_codes(x + r * stride + 4 * (p * steps + i));
      DFK_UNROLL
      for (int c = 0; c < C; ++c) sum.at[r][c] = _mm512_dpbusd_epi32(sum.at[r][c], w[c], codes);
    }
  }
  return sum;
}

// Floats of a whole group, activation scales still to come.
template <Format format, bool mins, int R, int C>
inline Floats<R, C> group_floats(const uint8_t* data, const uint16_t* scales, const int8_t* x, int64_t stride,
                                 const Starts<format, mins, R>& starts, int g) {
  Floats<R, C> out;
  DFK_UNROLL
  for (int p = 0; p < Starts<format, mins, R>::parts; ++p) {
    const Sums<R, C> sum = part_sums<format, mins, R, C>(data, x, stride, starts, g, p);
    __m512 scale[C];
    DFK_UNROLL
    for (int c = 0; c < C; ++c) scale[c] = half16(scales + p * kPanel + 16 * c);
    DFK_UNROLL
    for (int r = 0; r < R; ++r) {
      DFK_UNROLL
      for (int c = 0; c < C; ++c) {
        const __m512 s = _mm512_cvtepi32_ps(sum.at[r][c]);
        out.at[r][c] = p ? _mm512_fmadd_ps(s, scale[c], out.at[r][c]) : _mm512_mul_ps(s, scale[c]);
      }
    }
  }
  return out;
}

// R rows x C registers of channels from `channel` on, over the slice.
template <Format format, bool mins, int R, int C>
inline void group_columns(const Block& b, const Starts<format, mins, R>& starts, int channel, Ahead& ahead) {
  constexpr int parts = Starts<format, mins, R>::parts;
  Floats<R, C> y;
  DFK_UNROLL
  for (int r = 0; r < R; ++r) {
    DFK_UNROLL
    for (int c = 0; c < C; ++c) {
      y.at[r][c] = b.first ? _mm512_setzero_ps() : _mm512_loadu_ps(b.tile + r * kPanel + channel + 16 * c);
    }
  }
  const uint8_t* data = b.data + channel * 4;
  const int8_t* x = b.x;
  const uint16_t* scales = b.scales + channel;
  const uint16_t* minima = b.mins + (mins ? channel : 0);
  for (int g = 0; g < b.groups; ++g, data += group_bytes(format), x += 32, scales += parts * kPanel) {
    ahead.turn();
    const Floats<R, C> group = group_floats<format, mins, R, C>(data, scales, x, b.stride, starts, g);
    DFK_UNROLL
    for (int r = 0; r < R; ++r) {
      const __m512 x_scale = _mm512_set1_ps(b.x_scales[r * b.x_scales_stride + g]);
      DFK_UNROLL
      for (int c = 0; c < C; ++c) y.at[r][c] = _mm512_fmadd_ps(group.at[r][c], x_scale, y.at[r][c]);
    }
    if (!mins) continue;
    DFK_UNROLL
    for (int p = 0; p < parts; ++p, minima += kPanel) {
      __m512 low[C];
      DFK_UNROLL
      for (int c = 0; c < C; ++c) low[c] = half16(minima + 16 * c);
      DFK_UNROLL
      for (int r = 0; r < R; ++r) {
        const __m512 weighted = _mm512_set1_ps(starts.weighted[r][g * parts + p]);
        DFK_UNROLL
        for (int c = 0; c < C; ++c) y.at[r][c] = _mm512_fnmadd_ps(low[c], weighted, y.at[r][c]);
      }
    }
  }
  DFK_UNROLL
  for (int r = 0; r < R; ++r) {
    DFK_UNROLL
    for (int c = 0; c < C; ++c) _mm512_storeu_ps(b.tile + r * kPanel + channel + 16 * c, y.at[r][c]);
  }
}

template <Format format, bool mins, int R> void group_rows(const Block& b, Ahead& ahead) {
  constexpr int C = R <= 2 ? 4 : 2;
  const Starts<format, mins, R> starts(b);
  for (int channel = 0; channel < kPanel; channel += 16 * C) group_columns<format, mins, R, C>(b, starts, channel, ahead);
}

template <Format format, bool mins> void group_block(int rows, const Block& b, Ahead& ahead) {
  switch (rows) {
    case 1: return group_rows<format, mins, 1>(b, ahead);
    case 2: return group_rows<format, mins, 2>(b, ahead);
    case 3: return group_rows<format, mins, 3>(b, ahead);
    case 4: return group_rows<format, mins, 4>(b, ahead);
    case 5: return group_rows<format, mins, 5>(b, ahead);
    default: return group_rows<format, mins, 6>(b, ahead);
  }
}

template <Format format, bool mins>
void group_tile(const Linear& w, const Acts& x, int64_t panel, int64_t row0, int64_t rows, float* tile) {
  constexpr int64_t bytes = group_bytes(format);
  constexpr int64_t side = (format == Format::w6g ? 2 : 1) * kPanel;  // scales of 32 inputs
  const int64_t groups = w.k / 32, x_groups = x.stride / 32, blocks = (rows + 5) / 6;
  Block b;
  b.stride = x.stride;
  b.x_scales_stride = x_groups;
  for (int64_t g = 0; g < groups; g += kSlice) {
    const int64_t here = groups - g < kSlice ? groups - g : kSlice, at = panel * groups + g;
    b.groups = static_cast<int>(here);
    b.first = g == 0;
    b.data = static_cast<const uint8_t*>(w.data) + at * bytes;
    b.scales = static_cast<const uint16_t*>(w.scales) + at * side;
    b.mins = mins ? w.mins + at * side : nullptr;
    // The next slice is of another length only at a panel's end.
    const int64_t next = groups - g - here, fetch = next == 0 || next > kSlice ? (groups < kSlice ? groups : kSlice) : next;
    Ahead(b.scales + here * side, fetch * side * 2, 1).turn();
    if (mins) Ahead(b.mins + here * side, fetch * side * 2, 1).turn();
    const int64_t turns = here * (rows <= 2 ? 1 : 2 * blocks);
    Ahead ahead(b.data + here * bytes, fetch * bytes, turns);
    for (int64_t i = 0; i < blocks; ++i) {
      const RowBlock block = row_block(rows, blocks, i);
      const int64_t row = row0 + block.first;
      b.x = static_cast<const int8_t*>(x.data) + row * x.stride + g * 32;
      b.x_scales = x.scales + row * x_groups + g;
      b.x_sums = x.sums + 2 * (row * x_groups + g);
      b.tile = tile + block.first * kPanel;
      group_block<format, mins>(block.rows, b, ahead);
    }
  }
}

template <Format format>
void group(const Linear& w, const Acts& x, int64_t panel, int64_t row0, int64_t rows, float* tile, void*) {
  if (format != Format::w8g && w.mins) group_tile<format, format != Format::w8g>(w, x, panel, row0, rows, tile);
  else group_tile<format, false>(w, x, panel, row0, rows, tile);
}

inline void w8g(const Linear& w, const Acts& x, int64_t panel, int64_t row0, int64_t rows, float* tile, void* scratch) {
  group<Format::w8g>(w, x, panel, row0, rows, tile, scratch);
}

inline void w4g(const Linear& w, const Acts& x, int64_t panel, int64_t row0, int64_t rows, float* tile, void* scratch) {
  group<Format::w4g>(w, x, panel, row0, rows, tile, scratch);
}

inline void w6g(const Linear& w, const Acts& x, int64_t panel, int64_t row0, int64_t rows, float* tile, void* scratch) {
  group<Format::w6g>(w, x, panel, row0, rows, tile, scratch);
}

// Per-channel weights: R rows x 64 channels over `steps` registers of 4 inputs. The int32 sums wait in the tile's
// memory between slices.
template <int R>
inline void channel_rows(const uint8_t* data, const int8_t* x, int64_t stride, int64_t steps, bool first,
                         const int32_t* x_sums, float* tile, Ahead& ahead) {
  __m512i sum[R][4];
  DFK_UNROLL
  for (int r = 0; r < R; ++r) {
    DFK_UNROLL
    for (int c = 0; c < 4; ++c) {
      sum[r][c] = first ? _mm512_set1_epi32(-128 * x_sums[r]) : _mm512_loadu_si512(tile + r * kPanel + 16 * c);
    }
  }
  for (int64_t i = 0; i < steps; ++i, data += 256, x += 4) {
    if (i % 8 == 0) ahead.turn();
    __m512i w[4];
    DFK_UNROLL
    for (int c = 0; c < 4; ++c) w[c] = _mm512_loadu_si512(data + 64 * c);
    DFK_UNROLL
    for (int r = 0; r < R; ++r) {
      const __m512i codes = four_codes(x + r * stride);
      DFK_UNROLL
      for (int c = 0; c < 4; ++c) sum[r][c] = _mm512_dpbusd_epi32(sum[r][c], w[c], codes);
    }
  }
  DFK_UNROLL
  for (int r = 0; r < R; ++r) {
    DFK_UNROLL
    for (int c = 0; c < 4; ++c) _mm512_storeu_si512(tile + r * kPanel + 16 * c, sum[r][c]);
  }
}

inline void w8(const Linear& w, const Acts& x, int64_t panel, int64_t row0, int64_t rows, float* tile, void*) {
  const int64_t steps = (w.k + 3) / 4, blocks = (rows + 5) / 6;
  const uint8_t* data = static_cast<const uint8_t*>(w.data) + panel * steps * 256;
  for (int64_t s = 0; s < steps; s += 8 * kSlice) {
    const int64_t here = steps - s < 8 * kSlice ? steps - s : 8 * kSlice;
    Ahead ahead(data + (s + here) * 256, 8 * kSlice * 256, (here + 7) / 8 * blocks);
    for (int64_t i = 0; i < blocks; ++i) {
      const RowBlock block = row_block(rows, blocks, i);
      const int64_t row = row0 + block.first;
      const int8_t* codes = static_cast<const int8_t*>(x.data) + row * x.stride + 4 * s;
      float* out = tile + block.first * kPanel;
      const uint8_t* d = data + s * 256;
      switch (block.rows) {
        case 1: channel_rows<1>(d, codes, x.stride, here, s == 0, x.sums + row, out, ahead); break;
        case 2: channel_rows<2>(d, codes, x.stride, here, s == 0, x.sums + row, out, ahead); break;
        case 3: channel_rows<3>(d, codes, x.stride, here, s == 0, x.sums + row, out, ahead); break;
        case 4: channel_rows<4>(d, codes, x.stride, here, s == 0, x.sums + row, out, ahead); break;
        case 5: channel_rows<5>(d, codes, x.stride, here, s == 0, x.sums + row, out, ahead); break;
        default: channel_rows<6>(d, codes, x.stride, here, s == 0, x.sums + row, out, ahead);
      }
    }
  }
  const float* scales = static_cast<const float*>(w.scales) + panel * kPanel;
  for (int64_t r = 0; r < rows; ++r) {
    const __m512 x_scale = _mm512_set1_ps(x.scales[row0 + r]);
    for (int c = 0; c < 4; ++c) {
      float* at = tile + r * kPanel + 16 * c;
      const __m512 sum = _mm512_cvtepi32_ps(_mm512_loadu_si512(at));
      _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_mul_ps(sum, _mm512_loadu_ps(scales + 16 * c)), x_scale));
    }
  }
}

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
