// Panels of float and bf16 weights. Included inside a translation unit's own namespace, after simd.h.
//
// Every output is one chain of fused multiply-adds over k = 0, 1, 2, ...; which rows share a register tile changes
// nothing. bf16 on AVX-512 uses vdpbf16ps: pairs of inputs (2i, 2i + 1) are multiplied and added with one rounding each
// way of its own, and denormal inputs and sums count as zero. So bf16 results differ between instruction sets by float
// rounding (and float results where the baseline has no fused multiply-add), never between rows.
//
// As the integer tiles do (linear_tiles.h), several row blocks pass over a slice of the panel that the L1 cache holds,
// and the slice after it is prefetched meanwhile. The sums wait in the tile's memory between slices, as the floats they
// are, so slices change no bit. Few rows are one block: then the panel is read in one pass, which the hardware
// prefetchers follow.
#include "unroll.h"

constexpr int64_t kTurn = 16;  // inputs between two prefetches; a slice is a multiple of it
constexpr int kFloatRows = 6;   // of a register tile, at most
constexpr int kMemoryRows = 11;  // with no more, a product waits for memory

#if defined(__AVX512F__)

// Rows of a register tile: 6 x 4 accumulators, 4 registers of weights, 1 broadcast.
template <int rows> inline void load_sums(const float* tile, bool first, __m512 (&acc)[rows][4]) {
  DFK_EACH(r, rows) {
    DFK_EACH(c, 4) acc[r][c] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(tile + r * kPanel + 16 * c);
  }
}

template <int rows>
inline void float_rows(const float* w, const float* x, int64_t stride, int64_t k, bool first, float* tile,
                       Ahead& ahead) {
  __m512 acc[rows][4];
  load_sums<rows>(tile, first, acc);
  for (int64_t i = 0; i < k; ++i, w += kPanel) {
    if (i % kTurn == 0) ahead.turn();
    __m512 weights[4];
    DFK_EACH(c, 4) weights[c] = _mm512_loadu_ps(w + 16 * c);
    for (int r = 0; r < rows; ++r) {
      const __m512 a = _mm512_set1_ps(x[r * stride + i]);
      DFK_EACH(c, 4) acc[r][c] = _mm512_fmadd_ps(a, weights[c], acc[r][c]);
    }
  }
  for (int r = 0; r < rows; ++r) for (int c = 0; c < 4; ++c) _mm512_storeu_ps(tile + r * kPanel + 16 * c, acc[r][c]);
}

template <int rows>
inline void float_rows(const uint16_t* w, const uint16_t* x, int64_t stride, int64_t k, bool first, float* tile,
                       Ahead& ahead) {
  __m512 acc[rows][4];
  load_sums<rows>(tile, first, acc);
  for (int64_t i = 0; i < k; i += 2, w += 2 * kPanel) {
    if (i % kTurn == 0) ahead.turn();
    __m512bh weights[4];
    DFK_EACH(c, 4) weights[c] = (__m512bh)_mm512_loadu_si512(w + 32 * c);
    for (int r = 0; r < rows; ++r) {
      int32_t pair;
      std::memcpy(&pair, x + r * stride + i, sizeof pair);
      const __m512bh a = (__m512bh)_mm512_set1_epi32(pair);
      DFK_EACH(c, 4) acc[r][c] = _mm512_dpbf16_ps(acc[r][c], weights[c], a);
    }
  }
  for (int r = 0; r < rows; ++r) for (int c = 0; c < 4; ++c) _mm512_storeu_ps(tile + r * kPanel + 16 * c, acc[r][c]);
}

#elif defined(__AVX2__)

// 16 channels (a quarter of the panel) at a time: 12 accumulators, 2 registers of weights, 1 broadcast.
template <int rows> inline void load_sums(const float* tile, bool first, __m256 (&acc)[rows][2]) {
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < 2; ++c) acc[r][c] = first ? _mm256_setzero_ps() : _mm256_loadu_ps(tile + r * kPanel + 8 * c);
  }
}

template <int rows>
inline void float_rows(const float* w, const float* x, int64_t stride, int64_t k, bool first, float* tile,
                       Ahead& ahead) {
  for (int c = 0; c < kPanel; c += 16) {
    __m256 acc[rows][2];
    load_sums<rows>(tile + c, first, acc);
    for (int64_t i = 0; i < k; ++i) {
      if (c == 0 && i % kTurn == 0) ahead.turn();
      const __m256 w0 = _mm256_loadu_ps(w + i * kPanel + c), w1 = _mm256_loadu_ps(w + i * kPanel + c + 8);
      for (int r = 0; r < rows; ++r) {
        const __m256 a = _mm256_broadcast_ss(x + r * stride + i);
        acc[r][0] = _mm256_fmadd_ps(a, w0, acc[r][0]);
        acc[r][1] = _mm256_fmadd_ps(a, w1, acc[r][1]);
      }
    }
    for (int r = 0; r < rows; ++r) {
      _mm256_storeu_ps(tile + r * kPanel + c, acc[r][0]);
      _mm256_storeu_ps(tile + r * kPanel + c + 8, acc[r][1]);
    }
  }
}

// Eight channels' pairs lie in one register: the even inputs are its low halves, shifted up, the odd ones its high halves.
template <int rows>
inline void float_rows(const uint16_t* w, const uint16_t* x, int64_t stride, int64_t k, bool first, float* tile,
                       Ahead& ahead) {
  const __m256i high = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u));
  for (int c = 0; c < kPanel; c += 16) {
    __m256 acc[rows][2];
    load_sums<rows>(tile + c, first, acc);
    for (int64_t i = 0; i < k; i += 2) {
      if (c == 0 && i % kTurn == 0) ahead.turn();
      const __m256i p = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + (i / 2 * kPanel + c) * 2));
      const __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + (i / 2 * kPanel + c + 8) * 2));
      const __m256 even0 = _mm256_castsi256_ps(_mm256_slli_epi32(p, 16));
      const __m256 even1 = _mm256_castsi256_ps(_mm256_slli_epi32(q, 16));
      const __m256 odd0 = _mm256_castsi256_ps(_mm256_and_si256(p, high));
      const __m256 odd1 = _mm256_castsi256_ps(_mm256_and_si256(q, high));
      for (int r = 0; r < rows; ++r) {
        int32_t pair;
        std::memcpy(&pair, x + r * stride + i, sizeof pair);
        const __m256i both = _mm256_set1_epi32(pair);
        const __m256 a = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
        const __m256 b = _mm256_castsi256_ps(_mm256_and_si256(both, high));
        acc[r][0] = _mm256_fmadd_ps(b, odd0, _mm256_fmadd_ps(a, even0, acc[r][0]));
        acc[r][1] = _mm256_fmadd_ps(b, odd1, _mm256_fmadd_ps(a, even1, acc[r][1]));
      }
    }
    for (int r = 0; r < rows; ++r) {
      _mm256_storeu_ps(tile + r * kPanel + c, acc[r][0]);
      _mm256_storeu_ps(tile + r * kPanel + c + 8, acc[r][1]);
    }
  }
}

#else

inline float widen(uint16_t x) {
  const uint32_t raw = static_cast<uint32_t>(x) << 16;
  float out;
  std::memcpy(&out, &raw, sizeof out);
  return out;
}

template <int rows>
inline void float_rows(const float* w, const float* x, int64_t stride, int64_t k, bool first, float* tile, Ahead&) {
  for (int r = 0; r < rows; ++r) {
    float acc[kPanel] = {};
    if (!first) std::memcpy(acc, tile + r * kPanel, sizeof acc);
    for (int64_t i = 0; i < k; ++i) {
      const float a = x[r * stride + i];
      for (int c = 0; c < kPanel; ++c) acc[c] += a * w[i * kPanel + c];
    }
    std::memcpy(tile + r * kPanel, acc, sizeof acc);
  }
}

template <int rows>
inline void float_rows(const uint16_t* w, const uint16_t* x, int64_t stride, int64_t k, bool first, float* tile, Ahead&) {
  for (int r = 0; r < rows; ++r) {
    float acc[kPanel] = {};
    if (!first) std::memcpy(acc, tile + r * kPanel, sizeof acc);
    for (int64_t i = 0; i < k; i += 2) {
      const float a = widen(x[r * stride + i]), b = widen(x[r * stride + i + 1]);
      const uint16_t* p = w + i * kPanel;
      for (int c = 0; c < kPanel; ++c) acc[c] += a * widen(p[2 * c]);
      for (int c = 0; c < kPanel; ++c) acc[c] += b * widen(p[2 * c + 1]);
    }
    std::memcpy(tile + r * kPanel, acc, sizeof acc);
  }
}

#endif

template <class T>
inline void float_block(int rows, const T* w, const T* x, int64_t stride, int64_t k, bool first, float* tile,
                        Ahead& ahead) {
  switch (rows) {
    case 1: return float_rows<1>(w, x, stride, k, first, tile, ahead);
    case 2: return float_rows<2>(w, x, stride, k, first, tile, ahead);
    case 3: return float_rows<3>(w, x, stride, k, first, tile, ahead);
    case 4: return float_rows<4>(w, x, stride, k, first, tile, ahead);
    case 5: return float_rows<5>(w, x, stride, k, first, tile, ahead);
    default: return float_rows<6>(w, x, stride, k, first, tile, ahead);
  }
}

template <class T>
inline void float_tile(const Linear& w, const Acts& acts, int64_t panel, int64_t row0, int64_t rows, float* tile, void*) {
  constexpr int64_t slice = 131072 / (kPanel * sizeof(T));  // inputs: this slice and the next fit the L2 cache
  const int64_t k = round_up(w.k, 4 / sizeof(T)), s = acts.stride, blocks = (rows + kFloatRows - 1) / kFloatRows;
  const T* data = static_cast<const T*>(w.data) + panel * k * kPanel;
  const T* x = static_cast<const T*>(acts.data) + row0 * s;
  const bool compute = rows > kMemoryRows;
  const int64_t step = compute ? slice : k;
  for (int64_t at = 0; at < k; at += step) {
    const int64_t here = k - at < step ? k - at : step, left = k - at - here, next = left > 0 ? left : k;
    const int64_t fetch = !compute ? 0 : (next < slice ? next : slice) * kPanel * static_cast<int64_t>(sizeof(T));
    Ahead ahead(data + (at + here) * kPanel, fetch, (here + kTurn - 1) / kTurn * blocks);
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t r = kFloatRows * i;
      const RowBlock block = compute ? row_block(rows, blocks, i) : RowBlock{r, static_cast<int>(rows - r)};
      float_block<T>(block.rows, data + at * kPanel, x + block.first * s + at, s, here, at == 0,
                     tile + block.first * kPanel, ahead);
    }
  }
}
