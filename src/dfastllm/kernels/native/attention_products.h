// The two products of attention, over panels (attention_panels.h): scores = q K, and weighted V. One code for all
// instruction sets and types of K,V; what a lane of 4 bytes holds is said by Singles or Pairs.
//
// A step is what one instruction multiplies: one dim of 16 keys (scores), or 16 dims of one key (weighted V). Of Pairs
// it is two of them, (2i, 2i + 1). Every sum is one chain over the steps in order; the register tile (rows x 16 keys, rows
// x 16 dims) only says which independent sums are interleaved, so it never shows in the bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "attention.h"
#include "simd.h"
#include "unroll.h"

namespace dfk::DFK_ISA::spans {

constexpr int kTileBlocks = 8;
constexpr int64_t kTile = kTileBlocks * kBlock;  // keys between two updates of a row's maximum
static_assert(kRange % kTile == 0, "a tile must not cross ranges");

constexpr int64_t padded(int64_t dim) { return (dim + 15) / 16 * 16; }

// A lane is a float.
struct Singles {
  static constexpr int kTogether = 1;  // dims or keys of a step
  using Lanes = Floats16;
  static Lanes lanes(const char* p) { return load(reinterpret_cast<const float*>(p)); }
  static Lanes everywhere(const char* p) {
    float x;
    std::memcpy(&x, p, sizeof x);
    return floats16(x);
  }
  static Floats16 add(Floats16 sum, const Lanes& many, const Lanes& one) { return multiply_add(one, many, sum); }
};

#if defined(DFK_SIMD_PAIRS)
// A lane is two bfloat16, on a CPU that multiplies them twice as fast as floats. q and the softmax weights are rounded to
// bfloat16 too, sums stay float32; codes of int8 are bfloat16 numbers as they are. Weights of bfloat16 V are rounded before
// they are added up, so each row still mixes V with weights that sum to 1; those of int8 V are rounded after they have
// been multiplied by its scales. The error is that of K and V having been rounded, once more: 2^-9 of a factor.
// The half of a pair that a row does not see is 0 times 0.
struct Pairs {
  static constexpr int kTogether = 2;
  using Lanes = Bf16Pairs;
  static Lanes lanes(const char* p) { return bf16_pairs(reinterpret_cast<const uint16_t*>(p)); }
  static Lanes everywhere(const char* p) { return two_bf16(reinterpret_cast<const uint16_t*>(p)); }
  static Floats16 add(Floats16 sum, const Lanes& many, const Lanes& one) { return add_bf16_pairs(sum, many, one); }
};
#endif

template <class T> struct ProductsOf { using Type = Singles; };
#if defined(DFK_SIMD_PAIRS)
template <> struct ProductsOf<uint16_t> { using Type = Pairs; };
template <> struct ProductsOf<int8_t> { using Type = Pairs; };
#endif
template <class T> using Products = typename ProductsOf<T>::Type;

// Query rows of a register tile, and its sums.
#if defined(DFK_SIMD_AVX512)
constexpr int kMaxRows = 8, kSums = 24;
#elif defined(DFK_SIMD_AVX2) || defined(DFK_SIMD_NEON)
constexpr int kMaxRows = 6, kSums = 6;
#else
constexpr int kMaxRows = 2, kSums = 2;
#endif

// Registers of keys or dims beside so many rows.
constexpr int tile_width(int rows) { return kSums / rows >= 4 ? 4 : kSums / rows >= 2 ? 2 : 1; }

// What is fetched from memory meanwhile: `bytes` a step and register. Into the second cache: the first has too few
// outstanding misses (Zen 4, one core, one row of 14 heads over 8,192 keys: 9.9 GB/s so, 15.4 into the second; with no
// prefetches 7.7).
struct Fetch {
  const char* at[4];  // of up to four blocks
  int64_t bytes;
};

// s[r][16 b + i] = sum over steps of q[step][r] * k[b][step][i], for B blocks.
template <class P, int R, int B>
DFK_INLINE void scores_of(const char* q, const char* const* k, int64_t steps, const Fetch& fetch, int first, float* s) {
  Floats16 sum[R][B];
  DFK_EACH(r, R) {
    DFK_EACH(b, B) sum[r][b] = floats16(0.0f);
  }
  for (int64_t step = 0; step < steps; ++step, q += 4 * R) {
    typename P::Lanes key[B];
    DFK_EACH(b, B) {
      key[b] = P::lanes(k[b] + 64 * step);
      __builtin_prefetch(fetch.at[first + b] + step * fetch.bytes, 0, 2);
    }
    DFK_EACH(r, R) {
      const typename P::Lanes x = P::everywhere(q + 4 * r);
      DFK_EACH(b, B) sum[r][b] = P::add(sum[r][b], key[b], x);
    }
  }
  DFK_EACH(r, R) {
    DFK_EACH(b, B) store(s + r * kTile + 16 * b, sum[r][b]);
  }
}

// out[r][i] = out[r][i] * scale[r] + sum over steps of w[r][step] * v[step][i], for C registers of dims from `column` on.
// v: blocks of `per_block` steps.
template <class P, int R, int C>
DFK_INLINE void weigh_of(const char* w, const char* const* v, int64_t steps, const Fetch& fetch, const float* scale,
                         int64_t width, int64_t column, float* out) {
  constexpr int64_t per_block = kBlock / P::kTogether;
  Floats16 sum[R][C];
  DFK_EACH(r, R) {
    const Floats16 x = floats16(scale[r]);
    DFK_EACH(c, C) sum[r][c] = load(out + r * width + column + 16 * c) * x;
  }
  for (int64_t first = 0, b = 0; first < steps; first += per_block, ++b) {
    const char* value = v[b] + 4 * column;
    const char* next = fetch.at[b] + column / 16 * fetch.bytes;
    const int64_t count = steps - first < per_block ? steps - first : per_block;
    for (int64_t i = 0; i < count; ++i, w += 4, value += 4 * width, next += width / 16 * fetch.bytes) {
      typename P::Lanes x[C];
      DFK_EACH(c, C) {
        x[c] = P::lanes(value + 64 * c);
        __builtin_prefetch(next + c * fetch.bytes, 0, 2);
      }
      DFK_EACH(r, R) {
        const typename P::Lanes weight = P::everywhere(w + r * kTile * 4);
        DFK_EACH(c, C) sum[r][c] = P::add(sum[r][c], x[c], weight);
      }
    }
  }
  DFK_EACH(r, R) {
    DFK_EACH(c, C) store(out + r * width + column + 16 * c, sum[r][c]);
  }
}

template <class P, int R>
inline void scores_rows(const char* q, const char* const* k, int blocks, int64_t steps, const Fetch& fetch, float* s) {
  constexpr int B = tile_width(R);
  int b = 0;
  for (; b + B <= blocks; b += B) scores_of<P, R, B>(q, k + b, steps, fetch, b, s + b * kBlock);
  for (; b < blocks; ++b) scores_of<P, R, 1>(q, k + b, steps, fetch, b, s + b * kBlock);
}

template <class P, int R>
inline void weigh_rows(const char* w, const char* const* v, int64_t steps, const Fetch& fetch, const float* scale,
                       int64_t width, float* out) {
  constexpr int C = tile_width(R);
  int64_t i = 0;
  for (; i + 16 * C <= width; i += 16 * C) weigh_of<P, R, C>(w, v, steps, fetch, scale, width, i, out);
  for (; i < width; i += 16) weigh_of<P, R, 1>(w, v, steps, fetch, scale, width, i, out);
}

// For at most kMaxRows rows.
template <class P, int R = 1>
void scores(int rows, const char* q, const char* const* k, int blocks, int64_t steps, const Fetch& fetch, float* s) {
  if constexpr (R < kMaxRows) {
    if (rows > R) return scores<P, R + 1>(rows, q, k, blocks, steps, fetch, s);
  }
  scores_rows<P, R>(q, k, blocks, steps, fetch, s);
}

template <class P, int R = 1>
void weigh(int rows, const char* w, const char* const* v, int64_t steps, const Fetch& fetch, const float* scale,
           int64_t width, float* out) {
  if constexpr (R < kMaxRows) {
    if (rows > R) return weigh<P, R + 1>(rows, w, v, steps, fetch, scale, width, out);
  }
  weigh_rows<P, R>(w, v, steps, fetch, scale, width, out);
}

// One row's step of which it sees the keys in `seen` (not none): the others count as zeros, whatever lies there.
inline void weigh_step(Singles, uint32_t, const char* w, const char* v, int64_t width, float* out) {
  for (int64_t i = 0; i < width; i += 16) {
    store(out + i, Singles::add(load(out + i), Singles::lanes(v + 4 * i), Singles::everywhere(w)));
  }
}
#if defined(DFK_SIMD_PAIRS)
inline void weigh_step(Pairs, uint32_t seen, const char* w, const char* v, int64_t width, float* out) {
  const uint16_t shown[2] = {static_cast<uint16_t>(seen & 1 ? 0xffff : 0), static_cast<uint16_t>(seen & 2 ? 0xffff : 0)};
  const Codes16 mask = four_codes(shown);
  for (int64_t i = 0; i < width; i += 16) {
    store(out + i, Pairs::add(load(out + i), Pairs::lanes(v + 4 * i) & mask, Pairs::everywhere(w)));
  }
}
#endif

// The keys of a block that one row sees, whose weighted V has been scaled already.
template <class P>
void weigh_some(uint32_t seen, const char* w, const char* v, int64_t width, float* out) {
  for (; seen != 0; seen >>= P::kTogether, w += 4, v += 4 * width) {
    const uint32_t here = seen & ((1u << P::kTogether) - 1);
    if (here != 0) weigh_step(P{}, here, w, v, width, out);
  }
}

}  // namespace dfk::DFK_ISA::spans
