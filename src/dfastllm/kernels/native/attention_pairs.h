// The steps of attention_steps.h for bfloat16 K,V on a CPU that multiplies bfloat16 pairs (twice the products of a float
// instruction): q and the softmax weights are rounded to bfloat16 too, sums stay float32. The weights are rounded before
// they are added up, so each row still mixes V with weights that sum to 1. The error is that of K and V having been
// rounded, once more; neither is larger than 2^-9 of a factor.
//
// Pairs are dims (2i, 2i + 1) in scores and positions (2i, 2i + 1) in weighted V, whatever else is computed; the half of
// a pair that a row does not see is 0 times 0.
namespace dfk {
namespace {

constexpr uint16_t kZeros[16] = {};

// s[r][16 b + i] = sum over d of q[d][r] * k[b][d][i], q as pairs [dim / 2][R].
template <int R, int B>
inline void scores_of(const float* q, const uint16_t* const* k, int64_t dim, float* s) {
  const char* pairs = reinterpret_cast<const char*>(q);
  Vec sum[R][B];
  DFK_EACH(r, R) {
    DFK_EACH(b, B) sum[r][b] = set1(0.0f);
  }
  const auto add_products = [&](const Pairs* key, const char* at) {
    DFK_EACH(r, R) {
      const Pairs x = set1_pair(at + 4 * r);
      DFK_EACH(b, B) sum[r][b] = dot(sum[r][b], x, key[b]);
    }
  };
  int64_t d = 0;
  for (; d + 2 <= dim; d += 2, pairs += 4 * R) {
    Pairs key[B];
    DFK_EACH(b, B) {
      key[b] = zip_halves(k[b] + d * kBlock);
      __builtin_prefetch(k[b + B] + d * kBlock);
    }
    add_products(key, pairs);
  }
  if (d < dim) {
    Pairs key[B];
    for (int b = 0; b < B; ++b) key[b] = zip(k[b] + d * kBlock, kZeros, 16);
    add_products(key, pairs);
  }
  DFK_EACH(r, R) {
    DFK_EACH(b, B) store(s + r * kTile + b * kBlock, sum[r][b]);
  }
}

// As the general one, for an even number of keys; s [r]: bfloat16 [kTile] in a row of kTile floats.
template <int R, int C, bool Part>
inline void weigh_of(const TileKeys<uint16_t>& tile, int64_t keys, const float* s, const float* scale, int64_t dim,
                     int64_t column, int64_t part, float* out) {
  const char* weights = reinterpret_cast<const char*>(s);
  Vec sum[R][C];
  DFK_EACH(r, R) {
    const Vec x = set1(scale[r]);
    DFK_EACH(c, C) sum[r][c] = mul(load(out + r * padded(dim) + column + c * Vec::width), x);
  }
  for (int64_t first = 0; first < keys; first += kBlock) {
    const uint16_t* v = tile.v[first / kBlock] + column;
    const uint16_t* next = tile.v[first / kBlock + 1] + column;
    const int64_t count = keys - first < kBlock ? keys - first : kBlock;
    for (int64_t i = 0; i < count; i += 2, v += 2 * dim, next += 2 * dim, weights += 4) {
      Pairs value[C];
      DFK_EACH(c, C) {
        value[c] = zip(v + c * Vec::width, v + dim + c * Vec::width, Part && c == C - 1 ? part : Vec::width);
        __builtin_prefetch(next + c * Vec::width);
        __builtin_prefetch(next + dim + c * Vec::width);
      }
      DFK_EACH(r, R) {
        const Pairs x = set1_pair(weights + r * kTile * 4);
        DFK_EACH(c, C) sum[r][c] = dot(sum[r][c], x, value[c]);
      }
    }
  }
  DFK_EACH(r, R) {
    DFK_EACH(c, C) store(out + r * padded(dim) + column + c * Vec::width, sum[r][c]);
  }
}

// The visible keys from `from` (even) on of one row, whose weighted V has been scaled already.
inline void weigh_rest(const TileKeys<uint16_t>& tile, int64_t from, int blocks, const uint32_t* bits, const float* s,
                       int64_t dim, float* out) {
  for (int64_t b = from / kBlock; b < blocks; ++b) {
    uint32_t seen = bits[b];
    if (b == from / kBlock) seen &= ~0u << (from % kBlock);
    const char* weights = reinterpret_cast<const char*>(s) + b * kBlock * 2;
    for (int64_t i = 0; i < kBlock; i += 2) {
      const uint32_t both = seen >> i & 3;
      if (both == 0) continue;
      const Pairs x = set1_pair(weights + 2 * i);
      const uint16_t* v = tile.v[b] + i * dim;
      for (int64_t column = 0; column < dim; column += Vec::width) {
        const int64_t n = dim - column < Vec::width ? dim - column : Vec::width;
        const Pairs value = zip(both & 1 ? v + column : kZeros, both & 2 ? v + dim + column : kZeros, n);
        store(out + column, dot(load(out + column), x, value));
      }
    }
  }
}

}  // namespace
}  // namespace dfk
