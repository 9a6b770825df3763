// AVX2 tiles; see linear_tiles.h. One register holds 4 consecutive inputs of 8 channels.
//
// vpmaddubsw (u8 x s8, pairs added) saturates at 16 bits. 4-bit codes stay below: 8 products of pairs, a whole group,
// fit (8 * 2 * 15 * 127 = 30,480). 6-bit codes: two (2 * 2 * 63 * 127 = 32,004). 8-bit codes do not fit, so bytes are
// widened: the even and the odd inputs of a register as 16-bit numbers, times activations widened the same way.
//
// Row blocks are R rows x C registers of channels; outputs wait in the tile (L1).

// GCC regroups the additions of an unrolled sum into a tree that does not fit the registers.
#if defined(__clang__)
#define DFK_ROLLED
#else
#define DFK_ROLLED _Pragma("GCC unroll 1")
#endif

inline __m256 half8(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline __m256i load_codes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

inline __m256i broadcast4(const int8_t* p) {
  int32_t v;
  std::memcpy(&v, p, sizeof v);
  return _mm256_set1_epi32(v);
}

template <int R, int C> struct Sums { __m256i at[R][C]; };
template <int R, int C> struct Floats { __m256 at[R][C]; };

template <int R, int C> inline void zero(Sums<R, C>& sum) {
  DFK_EACH(r, R) {
    DFK_EACH(c, C) sum.at[r][c] = _mm256_setzero_si256();
  }
}

// Every 16-bit lane's neighbours added: int32 sums.
template <int R, int C> inline Sums<R, C> widened(const Sums<R, C>& sum) {
  Sums<R, C> out;
  DFK_EACH(r, R) {
    DFK_EACH(c, C) out.at[r][c] = _mm256_madd_epi16(sum.at[r][c], _mm256_set1_epi16(1));
  }
  return out;
}

// Activation codes of 32 inputs as 16-bit numbers: [8] pairs (4 i, 4 i + 2), then [8] pairs (4 i + 1, 4 i + 3).
inline void widen_codes(const int8_t* x, int8_t* out) {
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8), odd = _mm256_srai_epi16(v, 8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), even);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32), odd);
}

// One step of bytes: 4 inputs. x: widened codes at the step.
template <int R, int C> inline void add_bytes(const uint8_t* data, const int8_t* x, int64_t stride, Sums<R, C>& sum) {
  __m256i even[C], odd[C];
  DFK_EACH(c, C) {
    const __m256i v = load_codes(data + 32 * c);
    even[c] = _mm256_and_si256(v, _mm256_set1_epi16(255));
    odd[c] = _mm256_srli_epi16(v, 8);
  }
  DFK_EACH(r, R) {
    const __m256i x_even = broadcast4(x + r * stride), x_odd = broadcast4(x + r * stride + 32);
    DFK_EACH(c, C) {
      const __m256i both = _mm256_add_epi32(_mm256_madd_epi16(even[c], x_even), _mm256_madd_epi16(odd[c], x_odd));
      sum.at[r][c] = _mm256_add_epi32(sum.at[r][c], both);
    }
  }
}

// Where weight codes come from. sums(): int32 sums of part p of a group for R rows x C registers; data, x: the group's.
struct Bytes {  // w8g
  using Unpacked = Bytes;
  using Whole = Bytes;
  static constexpr int offset = 128, parts = 1, bytes = 2048, x_bytes = 64;
  template <int R, int C> static inline Sums<R, C> sums(const uint8_t* data, const int8_t* x, int64_t stride, int) {
    Sums<R, C> sum;
    zero(sum);
    DFK_ROLLED
    for (int i = 0; i < 8; ++i) add_bytes<R, C>(data + 256 * i, x + 4 * i, stride, sum);
    return sum;
  }
};

// sum16 += codes * activations of one step.
template <int R, int C>
inline void add_step(const __m256i (&w)[C], const int8_t* x, int64_t stride, Sums<R, C>& sum16) {
  DFK_EACH(r, R) {
    const __m256i codes = broadcast4(x + r * stride);
    DFK_EACH(c, C) sum16.at[r][c] = _mm256_add_epi16(sum16.at[r][c], _mm256_maddubs_epi16(w[c], codes));
  }
}

struct Nibbles {  // w4g
  using Unpacked = Nibbles;
  using Whole = Nibbles;
  static constexpr int offset = 8, parts = 1, bytes = 1024, x_bytes = 32;
  template <int R, int C> static inline Sums<R, C> sums(const uint8_t* data, const int8_t* x, int64_t stride, int) {
    Sums<R, C> sum16;
    zero(sum16);
    DFK_ROLLED
    for (int i = 0; i < 4; ++i) {
      __m256i low[C], high[C];
      DFK_EACH(c, C) {
        const __m256i both = load_codes(data + 256 * i + 32 * c);
        low[c] = _mm256_and_si256(both, _mm256_set1_epi8(15));
        high[c] = _mm256_and_si256(_mm256_srli_epi16(both, 4), _mm256_set1_epi8(15));
      }
      add_step<R, C>(low, x + 8 * i, stride, sum16);
      add_step<R, C>(high, x + 8 * i + 4, stride, sum16);
    }
    return widened(sum16);
  }
};

// Inputs [4 i, 4 i + 4) of a group of w6g. p: the group's data at the first of 8 channels.
inline __m256i six_codes(const uint8_t* p, int i) {
  p += 768 * (i / 4);
  const __m256i both = load_codes(p + 256 * (i % 4 / 2));
  const __m256i low = _mm256_and_si256(i % 2 ? _mm256_srli_epi16(both, 4) : both, _mm256_set1_epi8(15));
  __m256i high = load_codes(p + 512);
  if (i % 4 == 0) high = _mm256_slli_epi16(high, 4);
  if (i % 4 == 1) high = _mm256_slli_epi16(high, 2);
  if (i % 4 == 3) high = _mm256_srli_epi16(high, 2);
  return _mm256_or_si256(low, _mm256_and_si256(high, _mm256_set1_epi8(0x30)));
}

// Part p of a group of w6g. Codes::at gives the codes of a step.
template <class Codes, int R, int C>
inline Sums<R, C> six_sums(const uint8_t* data, const int8_t* x, int64_t stride, int p) {
  Sums<R, C> pairs[2];
  DFK_EACH(i, 4) {
    __m256i w[C];
    DFK_EACH(c, C) w[c] = Codes::at(data + 32 * c, 4 * p + i);
    if (i % 2 == 0) zero(pairs[i / 2]);
    add_step<R, C>(w, x + 4 * (4 * p + i), stride, pairs[i / 2]);
  }
  Sums<R, C> sum = widened(pairs[0]);
  const Sums<R, C> more = widened(pairs[1]);
  DFK_EACH(r, R) {
    DFK_EACH(c, C) sum.at[r][c] = _mm256_add_epi32(sum.at[r][c], more.at[r][c]);
  }
  return sum;
}

struct UnpackedSixes {  // w6g after unpack_sixes: a byte a code
  static constexpr int offset = 32, parts = 2, bytes = 2048, x_bytes = 32;
  static inline __m256i at(const uint8_t* p, int i) { return load_codes(p + 256 * i); }
  template <int R, int C> static inline Sums<R, C> sums(const uint8_t* data, const int8_t* x, int64_t stride, int p) {
    return six_sums<UnpackedSixes, R, C>(data, x, stride, p);
  }
};

struct Sixes {  // w6g
  using Unpacked = UnpackedSixes;
  using Whole = Sixes;
  static constexpr int offset = 32, parts = 2, bytes = 1536, x_bytes = 32;
  static inline __m256i at(const uint8_t* p, int i) { return six_codes(p, i); }
  template <int R, int C> static inline Sums<R, C> sums(const uint8_t* data, const int8_t* x, int64_t stride, int p) {
    return six_sums<Sixes, R, C>(data, x, stride, p);
  }
};

inline const uint8_t* unpack_sixes(const uint8_t* data, int64_t groups, void* scratch) {
  uint8_t* out = static_cast<uint8_t*>(scratch);
  for (int64_t g = 0; g < groups; ++g, data += Sixes::bytes, out += UnpackedSixes::bytes) {
    for (int c = 0; c < 8; ++c) {
      DFK_EACH(i, 8) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(out + 256 * i + 32 * c), six_codes(data + 32 * c, i));
      }
    }
  }
  return static_cast<const uint8_t*>(scratch);
}

// Floats of a whole group, activation scales still to come. x_sums: of the block's first row and this group.
template <class Codes, bool mins, int R, int C>
inline Floats<R, C> group_floats(const uint8_t* data, const uint16_t* scales, const int8_t* x, int64_t stride,
                                 const int32_t* x_sums, int64_t sums_stride) {
  Floats<R, C> out;
  DFK_EACH(p, Codes::parts) {
    const Sums<R, C> sum = Codes::template sums<R, C>(data, x, stride, p);
    DFK_EACH(r, R) {
      const int32_t* s = x_sums + r * sums_stride;
      const __m256i start = _mm256_set1_epi32(-Codes::offset * (Codes::parts == 2 ? s[p] : s[0] + s[1]));
      DFK_EACH(c, C) {
        const __m256 f = _mm256_cvtepi32_ps(mins ? sum.at[r][c] : _mm256_add_epi32(sum.at[r][c], start));
        const __m256 scale = half8(scales + p * kPanel + 8 * c);
        out.at[r][c] = p ? _mm256_fmadd_ps(f, scale, out.at[r][c]) : _mm256_mul_ps(f, scale);
      }
    }
  }
  return out;
}

// R rows x C registers of channels from `channel` on, over the slice. x: the rows' codes as Codes wants them.
template <class Codes, bool mins, int R, int C>
inline void group_columns(const Block& b, const int8_t* x, int64_t stride, int channel, Ahead& ahead) {
  constexpr int side = Codes::parts * kPanel;
  const bool first = b.first;
  for (int g = 0; g < b.groups; ++g) {
    ahead.turn();
    const uint16_t* scales = b.scales + channel + g * side;
    const int32_t* x_sums = b.x_sums + 2 * g;
    const Floats<R, C> group = group_floats<Codes, mins, R, C>(b.data + channel * 4 + g * Codes::bytes, scales,
                                                               x + g * Codes::x_bytes, stride, x_sums,
                                                               2 * b.x_scales_stride);
    DFK_EACH(r, R) {
      const float x_scale = b.x_scales[r * b.x_scales_stride + g];
      const int32_t* s = x_sums + 2 * r * b.x_scales_stride;
      DFK_EACH(c, C) {
        float* at = b.tile + r * kPanel + channel + 8 * c;
        __m256 y = first && g == 0 ? _mm256_setzero_ps() : _mm256_loadu_ps(at);
        y = _mm256_fmadd_ps(group.at[r][c], _mm256_set1_ps(x_scale), y);
        DFK_EACH(p, mins ? Codes::parts : 0) {
          const float weighted = x_scale * static_cast<float>(Codes::parts == 2 ? s[p] : s[0] + s[1]);
          const uint16_t* low = b.mins + channel + g * side + p * kPanel + 8 * c;
          y = _mm256_fnmadd_ps(half8(low), _mm256_set1_ps(weighted), y);
        }
        _mm256_storeu_ps(at, y);
      }
    }
  }
}

constexpr int kBlockRows = 4;   // at most
// One row of w8g and w4g walks all 64 channels in one pass, see linear_tiles_avx512.h.
template <class Codes> constexpr bool is_single(int64_t rows) { return rows == 1 && Codes::parts == 1; }

template <class Codes> constexpr int width(int rows) { return rows > 2 ? 2 : rows == 2 || Codes::parts == 2 ? 4 : 8; }
template <class Codes> constexpr int passes(int rows, bool) { return 8 / width<Codes>(rows); }

template <class Codes, bool mins, int R> void group_rows(const Block& b, Ahead& ahead) {
  constexpr int C = width<Codes>(R);
  constexpr int64_t wide_stride = kSlice * Bytes::x_bytes;
  alignas(32) int8_t wide[Codes::x_bytes == 64 ? R * wide_stride : 1];
  const int8_t* x = b.x;
  int64_t stride = b.stride;
  if (Codes::x_bytes == 64) {
    for (int r = 0; r < R; ++r) {
      for (int g = 0; g < b.groups; ++g) widen_codes(b.x + r * b.stride + 32 * g, wide + r * wide_stride + 64 * g);
    }
    x = wide;
    stride = wide_stride;
  }
  for (int channel = 0; channel < kPanel; channel += 8 * C) {
    group_columns<Codes, mins, R, C>(b, x, stride, channel, ahead);
  }
}

// Only AVX-512 has the next two.
inline bool equal_parts(const uint16_t*, int64_t) { return false; }
template <class Codes> inline const float* scale_table(const uint16_t*, int64_t, void*) { return nullptr; }

template <class Codes, bool mins, bool> void group_block(int rows, const Block& b, Ahead& ahead) {
  switch (rows) {
    case 1: return group_rows<Codes, mins, 1>(b, ahead);
    case 2: return group_rows<Codes, mins, 2>(b, ahead);
    case 3: return group_rows<Codes, mins, 3>(b, ahead);
    default: return group_rows<Codes, mins, 4>(b, ahead);
  }
}

// Per-channel weights: R rows x C registers of channels over `steps` registers of 4 inputs. The int32 sums wait in the
// tile's memory between slices.
template <int R>
inline void channel_rows(const uint8_t* data, const int8_t* x, int64_t stride, int64_t steps, bool first,
                         const int32_t* x_sums, float* tile, Ahead& ahead) {
  constexpr int C = width<Bytes>(R);
  constexpr int64_t wide_stride = kSlice * Bytes::x_bytes;
  alignas(32) int8_t wide[R * wide_stride];
  for (int r = 0; r < R; ++r) {
    for (int64_t g = 0; g < (steps + 7) / 8; ++g) widen_codes(x + r * stride + 32 * g, wide + r * wide_stride + 64 * g);
  }
  for (int channel = 0; channel < kPanel; channel += 8 * C) {
    __m256i* out = reinterpret_cast<__m256i*>(tile + channel);
    Sums<R, C> sum;
    DFK_EACH(r, R) {
      DFK_EACH(c, C) {
        sum.at[r][c] = first ? _mm256_set1_epi32(-128 * x_sums[r]) : _mm256_loadu_si256(out + r * 8 + c);
      }
    }
    for (int64_t i = 0; i < steps; ++i) {
      if (i % 8 == 0) ahead.turn();
      add_bytes<R, C>(data + 256 * i + 4 * channel, wide + i / 8 * 64 + i % 8 * 4, wide_stride, sum);
    }
    DFK_EACH(r, R) {
      DFK_EACH(c, C) _mm256_storeu_si256(out + r * 8 + c, sum.at[r][c]);
    }
  }
}

constexpr bool is_channel_single(int64_t rows) { return rows == 1; }
constexpr int channel_passes(int rows) { return passes<Bytes>(rows, false); }

inline void channel_block(int rows, const uint8_t* data, const int8_t* x, int64_t stride, int64_t steps, bool first,
                          const int32_t* x_sums, float* tile, Ahead& ahead) {
  switch (rows) {
    case 1: return channel_rows<1>(data, x, stride, steps, first, x_sums, tile, ahead);
    case 2: return channel_rows<2>(data, x, stride, steps, first, x_sums, tile, ahead);
    case 3: return channel_rows<3>(data, x, stride, steps, first, x_sums, tile, ahead);
    default: return channel_rows<4>(data, x, stride, steps, first, x_sums, tile, ahead);
  }
}
