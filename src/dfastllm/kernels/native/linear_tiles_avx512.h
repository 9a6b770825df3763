// AVX-512 VNNI tiles; see linear_tiles.h. One register holds 4 consecutive inputs of 16 channels; vpdpbusd adds their
// products with 4 broadcast activation codes to 16 int32 sums.
//
// Row blocks are R rows x C registers of channels. Group formats keep R * C int32 sums, R * C floats, the weights and
// scales in registers: at most 6 x 2. On Zen 4 vpdpbusd shares its two pipes with every multiplication, of floats and of
// integers, so 32 inputs cost 8 + 1 issues a row and register (w6g and minima: 1 more each): 89 % of the vpdpbusd rate at
// best. Unpacking, conversions, vscalefps (which is how activation scales come in) and loads go to other pipes.

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // false alarms from GCC 12's own _mm512_undefined_*
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

inline __m512 half16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

inline __m512i four_codes(const int8_t* p) {
  int32_t v;
  std::memcpy(&v, p, sizeof v);
  return _mm512_set1_epi32(v);
}

// Where weight codes come from: at() is inputs [4 i, 4 i + 4) of a group of 32 for 16 channels; p: the group's data at
// the first of these channels. parts: how many scales a group has; side: how many are stored for the panel's 64 channels.
// Whole: the same codes where both parts of every group share their scale.
struct Bytes {  // w8g
  using Unpacked = Bytes;
  using Whole = Bytes;
  static constexpr int offset = 128, parts = 1, side = kPanel, bytes = 2048;
  static inline __m512i at(const uint8_t* p, int i) { return _mm512_loadu_si512(p + 256 * i); }
};

struct Nibbles {  // w4g
  using Unpacked = Nibbles;
  using Whole = Nibbles;
  static constexpr int offset = 8, parts = 1, side = kPanel, bytes = 1024;
  static inline __m512i at(const uint8_t* p, int i) {
    const __m512i both = _mm512_loadu_si512(p + 256 * (i / 2));
    return _mm512_and_si512(i % 2 ? _mm512_srli_epi16(both, 4) : both, _mm512_set1_epi8(15));
  }
};

// w6g after unpack_sixes: a byte a code. Two instructions a register are saved on every row block.
struct UnpackedSixes {
  static constexpr int offset = 32, parts = 2, side = 2 * kPanel, bytes = 2048;
  static inline __m512i at(const uint8_t* p, int i) { return Bytes::at(p, i); }
};
struct UnpackedWhole : UnpackedSixes { static constexpr int parts = 1; };
struct WholeSixes;

struct Sixes {  // w6g
  using Unpacked = UnpackedSixes;
  using Whole = WholeSixes;
  static constexpr int offset = 32, parts = 2, side = 2 * kPanel, bytes = 1536;
  static inline __m512i at(const uint8_t* p, int i) {
    p += 768 * (i / 4);
    const __m512i both = _mm512_loadu_si512(p + 256 * (i % 4 / 2));
    const __m512i low = i % 2 ? _mm512_srli_epi16(both, 4) : both;
    __m512i high = _mm512_loadu_si512(p + 512);
    if (i % 4 == 0) high = _mm512_slli_epi16(high, 4);
    if (i % 4 == 1) high = _mm512_slli_epi16(high, 2);
    if (i % 4 == 3) high = _mm512_srli_epi16(high, 2);
    high = _mm512_and_si512(high, _mm512_set1_epi8(0x30));
    return _mm512_ternarylogic_epi64(low, _mm512_set1_epi8(15), high, 0xEA);  // (low & 15) | high
  }
};

struct WholeSixes : Sixes {  // Q5_0 and other types with groups of 32, held as w6g
  using Unpacked = UnpackedWhole;
  static constexpr int parts = 1;
};

// Whether both parts of each group have the same values, of 64 channels.
inline bool equal_parts(const uint16_t* values, int64_t groups) {
  __mmask16 differ = 0;
  for (int64_t i = 0; i < groups; ++i, values += 2 * kPanel) {
    for (int c = 0; c < kPanel; c += 32) {
      differ |= _mm512_cmpneq_epi32_mask(_mm512_loadu_si512(values + c), _mm512_loadu_si512(values + kPanel + c));
    }
  }
  return differ == 0;
}

inline const uint8_t* unpack_sixes(const uint8_t* data, int64_t groups, void* scratch) {
  uint8_t* out = static_cast<uint8_t*>(scratch);
  for (int64_t g = 0; g < groups; ++g, data += Sixes::bytes, out += UnpackedSixes::bytes) {
    for (int c = 0; c < 4; ++c) {
      DFK_EACH(i, 8) _mm512_store_si512(out + 256 * i + 64 * c, Sixes::at(data + 64 * c, i));
    }
  }
  return static_cast<const uint8_t*>(scratch);
}

// Where the integer sums start, and what minima are multiplied with, for the slice. Per part of a group.
template <class Codes, bool mins, int R> struct Starts {
  static constexpr int parts = Codes::parts;
  alignas(64) int32_t sum[mins ? 1 : R][parts * kSlice];
  alignas(64) float weighted[mins ? R : 1][parts * kSlice];
  alignas(64) float power[R][kSlice];      // activation scales are factor * 2^power, power of 0: -inf
  alignas(64) int32_t variant[R][kSlice];  // factor is (4 + variant) / 4

  explicit Starts(const Block& b) {
    const __mmask16 halves = static_cast<__mmask16>((1u << (2 * b.groups)) - 1);
    const __mmask8 whole = static_cast<__mmask8>((1u << b.groups) - 1);
    const __m512i even = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    for (int r = 0; r < R; ++r) {
      const __m256 x_scales = _mm256_maskz_loadu_ps(whole, b.x_scales + r * b.x_scales_stride);
      _mm256_store_ps(power[r], _mm256_getexp_ps(x_scales));
      const __m256i fraction = _mm256_srli_epi32(_mm256_castps_si256(x_scales), 21);
      _mm256_store_si256(reinterpret_cast<__m256i*>(variant[r]), _mm256_and_si256(fraction, _mm256_set1_epi32(3)));
      __m512i sums = _mm512_maskz_loadu_epi32(halves, b.x_sums + r * 2 * b.x_scales_stride);
      if (parts == 1) {
        sums = _mm512_add_epi32(sums, _mm512_srli_epi64(sums, 32));
        sums = _mm512_permutexvar_epi32(even, sums);
      }
      if (mins) {
        __m512 scales = _mm512_castps256_ps512(x_scales);
        if (parts == 2) scales = _mm512_permutexvar_ps(twice, scales);
        const __m512 product = _mm512_mul_ps(scales, _mm512_cvtepi32_ps(sums));
        if (parts == 2) _mm512_store_ps(weighted[r], product);
        else _mm256_store_ps(weighted[r], _mm512_castps512_ps256(product));
      } else {
        const __m512i start = _mm512_mullo_epi32(sums, _mm512_set1_epi32(-Codes::offset));
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
template <class Codes, bool mins, int R, int C>
inline Sums<R, C> part_sums(const uint8_t* data, const int8_t* x, int64_t stride, const Starts<Codes, mins, R>& starts,
                            int g, int p) {
  constexpr int steps = 8 / Codes::parts;  // registers of weights that share a scale
  Sums<R, C> sum;
  DFK_EACH(r, R) {
    const __m512i start =
        mins ? _mm512_setzero_si512() : _mm512_set1_epi32(starts.sum[r][g * Codes::parts + p]);
    DFK_EACH(c, C) sum.at[r][c] = start;
  }
  DFK_EACH(i, steps) {
    __m512i w[C];
    DFK_EACH(c, C) w[c] = Codes::at(data + 64 * c, p * steps + i);
    DFK_EACH(r, R) {
      const __m512i codes = four_codes(x + r * stride + 4 * (p * steps + i));
      DFK_EACH(c, C) sum.at[r][c] = _mm512_dpbusd_epi32(sum.at[r][c], w[c], codes);
    }
  }
  return sum;
}

// Weight scales times each factor an activation scale may have: [groups][4][parts][64] floats. 3 bits more than float16
// has: exact.
template <class Codes> inline const float* scale_table(const uint16_t* scales, int64_t groups, void* scratch) {
  constexpr int side = Codes::parts * kPanel;  // of the table
  float* const out = reinterpret_cast<float*>(static_cast<char*>(scratch) + kSlice * UnpackedSixes::bytes);
  float* table = out;
  for (int64_t g = 0; g < groups; ++g, scales += Codes::side, table += 4 * side) {
    for (int i = 0; i < side; i += 16) {
      const __m512 scale = half16(scales + i), quarter = _mm512_mul_ps(scale, _mm512_set1_ps(0.25f));
      __m512 value = scale;
      DFK_EACH(v, 4) {
        _mm512_store_ps(table + v * side + i, value);
        value = _mm512_add_ps(value, quarter);
      }
    }
  }
  return out;
}

// y += sums * activation scale * weight scale (- minima * weighted sums), for one group. `side`: its scales, float16
// (single) or the table's.
template <class Codes, bool mins, int R, int C, bool single>
inline void add_group(const uint8_t* data, const void* side, const uint16_t* minima, const int8_t* x, int64_t stride,
                      const Starts<Codes, mins, R>& starts, int g, Floats<R, C>& y) {
  DFK_EACH(p, Codes::parts) {
    const Sums<R, C> sum = part_sums<Codes, mins, R, C>(data, x, stride, starts, g, p);
    __m512 scale[C];
    if (single) {
      DFK_EACH(c, C) scale[c] = half16(static_cast<const uint16_t*>(side) + p * kPanel + 16 * c);
    }
    DFK_EACH(r, R) {
      const __m512 power = _mm512_set1_ps(starts.power[r][g]);
      const int32_t variant = starts.variant[r][g];
      const float* row = single ? nullptr : static_cast<const float*>(side) + (variant * Codes::parts + p) * kPanel;
      const __m512 factor = _mm512_set1_ps(single ? 1.0f + 0.25f * static_cast<float>(variant) : 0.0f);
      DFK_EACH(c, C) {
        const __m512 s = _mm512_scalef_ps(_mm512_cvtepi32_ps(sum.at[r][c]), power);
        const __m512 both = single ? _mm512_mul_ps(scale[c], factor) : _mm512_load_ps(row + 16 * c);
        y.at[r][c] = _mm512_fmadd_ps(s, both, y.at[r][c]);
      }
    }
  }
  if (!mins) return;
  DFK_EACH(p, Codes::parts) {
    __m512 low[C];
    DFK_EACH(c, C) low[c] = half16(minima + p * kPanel + 16 * c);
    DFK_EACH(r, R) {
      const __m512 weighted = _mm512_set1_ps(starts.weighted[r][g * Codes::parts + p]);
      DFK_EACH(c, C) y.at[r][c] = _mm512_fnmadd_ps(low[c], weighted, y.at[r][c]);
    }
  }
}

template <int R, int C> inline Floats<R, C> load_tile(const float* tile, bool zero) {
  Floats<R, C> y;
  DFK_EACH(r, R) {
    DFK_EACH(c, C) y.at[r][c] = zero ? _mm512_setzero_ps() : _mm512_loadu_ps(tile + r * kPanel + 16 * c);
  }
  return y;
}

template <int R, int C> inline void store_tile(float* tile, const Floats<R, C>& y) {
  DFK_EACH(r, R) {
    DFK_EACH(c, C) _mm512_storeu_ps(tile + r * kPanel + 16 * c, y.at[r][c]);
  }
}

// R rows x C registers of channels from `channel` on, over the slice.
template <class Codes, bool mins, int R, int C, bool single>
inline void group_columns(const Block& b, const Starts<Codes, mins, R>& starts, int channel, Ahead& ahead) {
  float* tile = b.tile + channel;
  const uint8_t* data = b.data + channel * 4;
  const uint16_t* scales = b.scales + channel;
  const float* table = single ? nullptr : b.table + channel;
  const uint16_t* minima = mins ? b.mins + channel : nullptr;
  const int8_t* x = b.x;
  const int64_t stride = b.stride;
  const int groups = b.groups;
  Floats<R, C> y = load_tile<R, C>(tile, b.first);
  for (int g = 0; g < groups; ++g) {
    ahead.turn();
    const void* factors =
        single ? static_cast<const void*>(scales + g * Codes::side) : table + 4 * g * Codes::parts * kPanel;
    add_group<Codes, mins, R, C, single>(data, factors, minima, x, stride, starts, g, y);
    data += Codes::bytes;
    if (mins) minima += Codes::side;
    x += 32;
  }
  store_tile<R, C>(tile, y);
}

constexpr int kBlockRows = 6;   // at most
// Few rows (then there is no other row block) wait for weights from memory.
template <class Codes> constexpr bool is_single(int64_t rows) { return rows <= 4; }

// Registers of channels for R rows: what measured best of what fits. `single` walks weights in one sequential pass: the
// hardware prefetchers then bring 25 to 31 GB/s to a core (Zen 4), prefetch instructions 20, and two passes over
// 32 channels without them 12.
template <class Codes> constexpr int width(int rows, bool single) {
  return single || rows <= 2 ? 4 : 2;
}
template <class Codes> constexpr int passes(int rows, bool single) { return 4 / width<Codes>(rows, single); }

template <class Codes, bool mins, int R, bool single> void group_rows(const Block& b, Ahead& ahead) {
  constexpr int C = width<Codes>(R, single);
  const Starts<Codes, mins, R> starts(b);
  for (int channel = 0; channel < kPanel; channel += 16 * C) {
    group_columns<Codes, mins, R, C, single>(b, starts, channel, ahead);
  }
}

template <class Codes, bool mins, bool single> void group_block(int rows, const Block& b, Ahead& ahead) {
  switch (rows) {
    case 1: return group_rows<Codes, mins, 1, true>(b, ahead);
    case 2: return group_rows<Codes, mins, 2, true>(b, ahead);
    case 3: return group_rows<Codes, mins, 3, single>(b, ahead);
    case 4: return group_rows<Codes, mins, 4, single>(b, ahead);
    case 5: return group_rows<Codes, mins, 5, false>(b, ahead);
    default: return group_rows<Codes, mins, 6, false>(b, ahead);
  }
}

// Per-channel weights: R rows x 64 channels over `steps` registers of 4 inputs. The int32 sums wait in the tile's
// memory between slices.
template <int R>
inline void channel_rows(const uint8_t* data, const int8_t* x, int64_t stride, int64_t steps, bool first,
                         const int32_t* x_sums, float* tile, Ahead& ahead) {
  __m512i sum[R][4];
  DFK_EACH(r, R) {
    DFK_EACH(c, 4) {
      sum[r][c] = first ? _mm512_set1_epi32(-128 * x_sums[r]) : _mm512_loadu_si512(tile + r * kPanel + 16 * c);
    }
  }
  for (int64_t i = 0; i < steps; ++i, data += 256, x += 4) {
    if (i % 8 == 0) ahead.turn();
    __m512i w[4];
    DFK_EACH(c, 4) w[c] = _mm512_loadu_si512(data + 64 * c);
    DFK_EACH(r, R) {
      const __m512i codes = four_codes(x + r * stride);
      DFK_EACH(c, 4) sum[r][c] = _mm512_dpbusd_epi32(sum[r][c], w[c], codes);
    }
  }
  DFK_EACH(r, R) {
    DFK_EACH(c, 4) _mm512_storeu_si512(tile + r * kPanel + 16 * c, sum[r][c]);
  }
}

constexpr bool is_channel_single(int64_t rows) { return rows <= kBlockRows; }
constexpr int channel_passes(int) { return 1; }

inline void channel_block(int rows, const uint8_t* data, const int8_t* x, int64_t stride, int64_t steps, bool first,
                          const int32_t* x_sums, float* tile, Ahead& ahead) {
  switch (rows) {
    case 1: return channel_rows<1>(data, x, stride, steps, first, x_sums, tile, ahead);
    case 2: return channel_rows<2>(data, x, stride, steps, first, x_sums, tile, ahead);
    case 3: return channel_rows<3>(data, x, stride, steps, first, x_sums, tile, ahead);
    case 4: return channel_rows<4>(data, x, stride, steps, first, x_sums, tile, ahead);
    case 5: return channel_rows<5>(data, x, stride, steps, first, x_sums, tile, ahead);
    default: return channel_rows<6>(data, x, stride, steps, first, x_sums, tile, ahead);
  }
}

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
