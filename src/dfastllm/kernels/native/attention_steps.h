// The three steps of a tile of keys (attention_impl.h): scores, softmax, weighted V.
#include <cmath>
#include <cstring>

#include "unroll.h"

namespace dfk {
namespace {

constexpr int kTileBlocks = 8;
constexpr int64_t kTile = kTileBlocks * kBlock;
static_assert(kRange % kTile == 0, "a tile must not cross ranges");

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kNone = -INFINITY;  // maximum of no keys

constexpr int64_t padded(int64_t dim) { return (dim + 15) / 16 * 16; }

constexpr int kVecs = 16 / Vec::width;  // registers of a block's 16 keys

// Whether the products of K,V of type T are of bfloat16 pairs (attention_pairs.h).
template <class T>
constexpr bool paired() {
#if defined(DFK_PAIRS)
  return sizeof(T) == 2;
#else
  return false;
#endif
}

// Nearest, ties to even; a NaN stays a NaN.
inline uint16_t to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

constexpr int kAhead = 4;  // blocks fetched from memory ahead of use: the CPU's own prefetching ends at pages

// Where the blocks of a tile lie, and for K and V the next ones (the last one again where there are none).
template <class T>
struct TileKeys {
  const T *k[kTileBlocks + kAhead], *v[kTileBlocks + kAhead];
  const float *ks[kTileBlocks], *vs[kTileBlocks];
};

// 2^x to about 1 ulp, x <= 0 (2^0 is exactly 1; below 2^-125 it may be 0). A NaN stays a NaN.
inline Vec power2(Vec x) {
  x = at_least(x, -160.0f);
  const Vec n = nearest(x), r = sub(x, n);
  Vec p = set1(0x1.41fbbcp-13f);  // minimax of 2^r in [-1/2, 1/2], relative error 2e-9
  p = fma(p, r, set1(0x1.5f3e52p-10f));
  p = fma(p, r, set1(0x1.3b2d4cp-7f));
  p = fma(p, r, set1(0x1.c6aee8p-5f));
  p = fma(p, r, set1(0x1.ebfbdcp-3f));
  p = fma(p, r, set1(0x1.62e430p-1f));
  p = fma(p, r, set1(1.0f));
  return scale_by_power(p, n);
}

// tanh(x), by 2^(2 x log2 e): its error is absolute, about 1e-7. A NaN stays a NaN.
inline Vec tanh_of(Vec x) {
  const Vec zero = set1(0.0f), one = set1(1.0f);
  x = sub(zero, at_least(sub(zero, at_least(x, -10.0f)), -10.0f));  // beyond, it is 1 to the last bit
  const Vec e = power2(mul(x, set1(2.0f * kLog2e)));
  return div(sub(e, one), add(e, one));
}

// 16 values.
inline void power2(const float* x, float* out) {
  for (int i = 0; i < 16; i += Vec::width) store(out + i, power2(load(x + i)));
}

// The 16 lanes added up, always in this order.
inline float lane_sum(const float* x) {
  float sums[8];
  for (int i = 0; i < 8; ++i) sums[i] = x[i] + x[i + 8];
  for (int i = 0; i < 4; ++i) sums[i] += sums[i + 4];
  return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

constexpr int clamp_tile(int n) { return n < 1 ? 1 : n > 4 ? 4 : n; }

// s[r][16 b + i] = sum over d of q[d][r] * k[b][d][i], for B blocks.
template <int R, int B, class T>
inline void scores_of(const float* q, const T* const* k, int64_t dim, float* s) {
  Vec sum[R][B * kVecs];
  DFK_EACH(r, R) {
    DFK_EACH(j, B * kVecs) sum[r][j] = set1(0.0f);
  }
  for (int64_t d = 0; d < dim; ++d) {
    Vec key[B * kVecs];
    DFK_EACH(j, B * kVecs) key[j] = load(k[j / kVecs] + d * kBlock + j % kVecs * Vec::width);
    DFK_EACH(b, B) __builtin_prefetch(k[b + B] + d * kBlock);
    DFK_EACH(r, R) {
      const Vec x = set1(q[d * R + r]);
      DFK_EACH(j, B * kVecs) sum[r][j] = fma(x, key[j], sum[r][j]);
    }
  }
  DFK_EACH(r, R) {
    DFK_EACH(j, B * kVecs) store(s + r * kTile + j * Vec::width, sum[r][j]);
  }
}

// out[r][i] = out[r][i] * scale[r] + sum over keys of s[r][key] * v[key][i], for C registers of dims from `column` on.
// part: dims in the last of them, if not all.
template <int R, int C, bool Part, class T>
inline void weigh_of(const TileKeys<T>& tile, int64_t keys, const float* s, const float* scale, int64_t dim,
                     int64_t column, int64_t part, float* out) {
  Vec sum[R][C];
  DFK_EACH(r, R) {
    const Vec x = set1(scale[r]);
    DFK_EACH(c, C) sum[r][c] = mul(load(out + r * padded(dim) + column + c * Vec::width), x);
  }
  for (int64_t first = 0; first < keys; first += kBlock) {
    const T* v = tile.v[first / kBlock] + column;
    const T* next = tile.v[first / kBlock + 1] + column;
    const int64_t count = keys - first < kBlock ? keys - first : kBlock;
    for (int64_t i = 0; i < count; ++i, v += dim, next += dim) {
      Vec value[C];
      DFK_EACH(c, C) {
        value[c] = Part && c == C - 1 ? load_part(v + c * Vec::width, part) : load(v + c * Vec::width);
        __builtin_prefetch(next + c * Vec::width);
      }
      DFK_EACH(r, R) {
        const Vec x = set1(s[r * kTile + first + i]);
        DFK_EACH(c, C) sum[r][c] = fma(x, value[c], sum[r][c]);
      }
    }
  }
  DFK_EACH(r, R) {
    DFK_EACH(c, C) store(out + r * padded(dim) + column + c * Vec::width, sum[r][c]);
  }
}

// The visible keys from `from` on of one row, whose weighted V has been scaled already.
template <class T>
void weigh_rest(const TileKeys<T>& tile, int64_t from, int blocks, const uint32_t* bits, const float* s, int64_t dim,
                float* out) {
  constexpr int C = 4, W = Vec::width;
  for (int64_t b = from / kBlock; b < blocks; ++b) {
    uint32_t seen = bits[b];
    if (b == from / kBlock) seen &= ~0u << (from % kBlock);
    if (seen == 0) continue;
    for (int64_t column = 0; column < dim; column += C * W) {
      Vec sum[C];
      DFK_EACH(c, C) {
        sum[c] = column + c * W < dim ? load(out + column + c * W) : set1(0.0f);
      }
      for (uint32_t left = seen; left != 0; left &= left - 1) {
        const int i = __builtin_ctz(left);
        const T* v = tile.v[b] + i * dim + column;
        const Vec x = set1(s[b * kBlock + i]);
        DFK_EACH(c, C) {
          const int64_t n = dim - column - c * W;
          if (n >= W) sum[c] = fma(x, load(v + c * W), sum[c]);
          else if (n > 0) sum[c] = fma(x, load_part(v + c * W, n), sum[c]);
        }
      }
      DFK_EACH(c, C) {
        if (column + c * W < dim) store(out + column + c * W, sum[c]);
      }
    }
  }
}

}  // namespace
}  // namespace dfk

#if defined(DFK_PAIRS)
#include "attention_pairs.h"  // overloads for bfloat16
#endif

namespace dfk {
namespace {

template <int R, class T>
void scores_rows(const float* q, const TileKeys<T>& tile, int blocks, int64_t dim, float* s) {
  constexpr int B = clamp_tile(Vec::accumulators / (R * kVecs));
  int b = 0;
  for (; b + B <= blocks; b += B) scores_of<R, B>(q, tile.k + b, dim, s + b * kBlock);
  for (; b < blocks; ++b) scores_of<R, 1>(q, tile.k + b, dim, s + b * kBlock);
}

template <int R, class T>
void weigh_rows(const TileKeys<T>& tile, int64_t keys, const float* s, const float* scale, int64_t dim, float* out) {
  constexpr int C = clamp_tile(Vec::accumulators / R);
  constexpr int W = Vec::width;
  int64_t i = 0;
  for (; i + C * W <= dim; i += C * W) weigh_of<R, C, false>(tile, keys, s, scale, dim, i, 0, out);
  for (; i + W <= dim; i += W) weigh_of<R, 1, false>(tile, keys, s, scale, dim, i, 0, out);
  if (i < dim) weigh_of<R, 1, true>(tile, keys, s, scale, dim, i, dim - i, out);
}

// Calls f<rows>(...) with the number of rows as a constant.
#define DFK_BY_ROWS(f, ...)                                     \
  switch (rows) {                                               \
    case 1: return f<1>(__VA_ARGS__);                           \
    case 2: return f<2>(__VA_ARGS__);                           \
    case 3: if constexpr (Vec::max_rows >= 3) return f<3>(__VA_ARGS__); break; \
    case 4: if constexpr (Vec::max_rows >= 4) return f<4>(__VA_ARGS__); break; \
    case 5: if constexpr (Vec::max_rows >= 5) return f<5>(__VA_ARGS__); break; \
    case 6: if constexpr (Vec::max_rows >= 6) return f<6>(__VA_ARGS__); break; \
    case 7: if constexpr (Vec::max_rows >= 7) return f<7>(__VA_ARGS__); break; \
    case 8: if constexpr (Vec::max_rows >= 8) return f<8>(__VA_ARGS__); break; \
  }

template <class T>
void scores(int rows, const float* q, const TileKeys<T>& tile, int blocks, int64_t dim, float* s) {
  DFK_BY_ROWS(scores_rows, q, tile, blocks, dim, s)
}

template <class T>
void weigh(int rows, const TileKeys<T>& tile, int64_t keys, const float* s, const float* scale, int64_t dim, float* out) {
  DFK_BY_ROWS(weigh_rows, tile, keys, s, scale, dim, out)
}

#undef DFK_BY_ROWS

// Scores -> weights 2^(score - maximum), in place; maxima and lane sums brought up to date. scale [16]: what the rows'
// weighted V so far must be multiplied by. bits [rows][kTileBlocks]: the visible keys; the weights of others are 0.
// All: every row sees every key, and bits is not read.
// Paired: the weights are rounded to bfloat16 and stored as such, [kTile] in the first half of the row's memory.
// cap > 0: scores x become cap * tanh(x) first of all, but for
// int8: scores are multiplied by the keys' scales before that, and the weights by those of V (not in the sums).
template <bool All, class T>
void soften(int rows, const TileKeys<T>& tile, int blocks, const uint32_t* bits, float cap, float* s, float* top, float* lanes,
            float* scale) {
  const Vec none = set1(kNone);
  float now[16] = {};
  for (int i = 0; i < 16; ++i) scale[i] = 0.0f;
  for (int r = 0; r < rows; ++r) {
    Vec most = none;
    uint32_t any = All;
    for (int b = 0; b < blocks; ++b) {
      const uint32_t seen = All ? 0xffffu : bits[r * kTileBlocks + b];
      any |= seen;
      DFK_EACH(j, kVecs) {
        float* at = s + r * kTile + b * kBlock + j * Vec::width;
        Vec x = load(at);
        if constexpr (sizeof(T) == 1) x = mul(x, load(tile.ks[b] + j * Vec::width));
        if (cap > 0.0f) x = mul(tanh_of(x), set1(cap));
        if constexpr (!All) x = select(seen >> (j * Vec::width), x, none);
        if (!All || sizeof(T) == 1 || cap > 0.0f) store(at, x);
        most = max(most, x);
      }
    }
    const float high = highest(most);
    // A row that sees keys but no score above -infinity (NaN ones are lost in a maximum) has met values that are not
    // finite, and is NaN from here on: kNone is for rows that have seen nothing.
    const float next = any == 0 ? top[r] : !(high > kNone) ? NAN : high > top[r] ? high : top[r];
    now[r] = next == kNone ? 0.0f : next;  // so that nothing is subtracted from itself at infinity
    scale[r] = top[r] - now[r];
    top[r] = next;
  }
  power2(scale, scale);
  for (int r = 0; r < rows; ++r) {
    const Vec high = set1(now[r]);
    Vec sum[kVecs];
    DFK_EACH(j, kVecs) sum[j] = set1(0.0f);
    for (int b = 0; b < blocks; ++b) {
      const uint32_t seen = All ? 0xffffu : bits[r * kTileBlocks + b];
      DFK_EACH(j, kVecs) {
        float* at = s + r * kTile + b * kBlock + j * Vec::width;
        Vec p = power2(sub(load(at), high));
        if constexpr (!All) p = select(seen >> (j * Vec::width), p, set1(0.0f));
#if defined(DFK_PAIRS)
        if constexpr (paired<T>()) {
          sum[j] = add(sum[j], store_rounded(reinterpret_cast<char*>(s + r * kTile) + b * kBlock * 2, p));
          continue;
        }
#endif
        sum[j] = add(sum[j], p);
        if constexpr (sizeof(T) == 1) p = mul(p, load(tile.vs[b] + j * Vec::width));
        store(at, p);
      }
    }
    DFK_EACH(j, kVecs) {
      float* at = lanes + r * kBlock + j * Vec::width;
      store(at, fma(load(at), set1(scale[r]), sum[j]));
    }
  }
}

}  // namespace
}  // namespace dfk
