// K and V as the products read them (attention_products.h): panels of 64-byte steps, one block of one head at a time.
//
//   K   [steps of dims][16 keys]         V   [steps of keys][dims, padded to 16s]
//
// Float K,V lie in memory like that. Others are unpacked into scratch memory, once for all rows of a task.
#pragma once

#include <cstdint>
#include <cstring>

#include "attention.h"
#include "attention_products.h"
#include "simd.h"

namespace dfk::DFK_ISA::spans {

inline Floats16 as_floats(const float* p) { return load(p); }
inline Floats16 as_floats(const uint16_t* p) { return load_bf16(p); }
inline Floats16 as_floats(const int8_t* p) { return load_int8(p); }

// 16 values of which `count` are there, the others zero.
template <class T> struct Sixteen {
  T all[16] = {};
  const T* at;
  Sixteen(const T* p, int64_t count) : at(p) {
    if (count >= 16) return;
    if (count > 0) std::memcpy(all, p, static_cast<size_t>(count) * sizeof(T));
    at = all;
  }
};

inline void put_step(const float* a, const float*, Singles, char* to) { store(reinterpret_cast<float*>(to), load(a)); }
inline void put_step(const uint16_t* a, const uint16_t*, Singles, char* to) {
  store(reinterpret_cast<float*>(to), load_bf16(a));
}
inline void put_step(const int8_t* a, const int8_t*, Singles, char* to) {
  store(reinterpret_cast<float*>(to), load_int8(a));
}
#if defined(DFK_SIMD_PAIRS)
inline void put_step(const uint16_t* a, const uint16_t* b, Pairs, char* to) {
  store(reinterpret_cast<uint8_t*>(to), zip(a, b));
}
inline void put_keys(const uint16_t* k, Pairs, char* to) { store(reinterpret_cast<uint8_t*>(to), zip_halves(k)); }
inline void put_step(const int8_t* a, const int8_t* b, Pairs, char* to) {
  store(reinterpret_cast<uint8_t*>(to), exact_pairs(load_int8(a), load_int8(b)));
}
#endif

template <class T, class P> inline void put_keys(const T* k, P, char* to) {
  put_step(k, k + (P::kTogether - 1) * kBlock, P{}, to);
}

template <class P> constexpr int64_t key_steps(int64_t dim) { return (dim + P::kTogether - 1) / P::kTogether; }
template <class P> constexpr int64_t value_steps() { return kBlock / P::kTogether; }

template <class T>
void unpack_keys(const T* k, int64_t dim, char* to) {
  using P = Products<T>;
  int64_t d = 0;
  for (; d + P::kTogether <= dim; d += P::kTogether, to += 64) put_keys(k + d * kBlock, P{}, to);
  if (d < dim) {  // the last of an odd number
    const T none[16] = {};
    put_step(k + d * kBlock, none, P{}, to);
  }
}

template <class T>
void unpack_values(const T* v, int64_t dim, char* to) {
  using P = Products<T>;
  const int64_t whole = dim / 16 * 16;
  for (int64_t i = 0; i < kBlock; i += P::kTogether) {
    const T *a = v + i * dim, *b = P::kTogether == 2 ? a + dim : a;
    for (int64_t column = 0; column < whole; column += 16, to += 64) put_step(a + column, b + column, P{}, to);
    if (whole == dim) continue;
    const Sixteen<T> first(a + whole, dim - whole), second(b + whole, dim - whole);
    put_step(first.at, second.at, P{}, to);
    to += 64;
  }
}

// A panel that need not be unpacked, or null.
inline const char* keys_as_they_lie(const float* k) { return reinterpret_cast<const char*>(k); }
template <class T> inline const char* keys_as_they_lie(const T*) { return nullptr; }
inline const char* values_as_they_lie(const float* v, int64_t dim) {
  return dim % 16 == 0 ? reinterpret_cast<const char*>(v) : nullptr;
}
template <class T> inline const char* values_as_they_lie(const T*, int64_t) { return nullptr; }

// One part (cached or own) of a span's keys, from a task's first K,V head on.
template <class T>
struct Keys {
  const T *k, *v;         // of block 0
  const float *ks, *vs;   // int8 only
  int64_t stride, head;   // elements from block to block and from head to head, K and V alike
  int64_t scale_stride;   // from block to block; from head to head it is kBlock
  const int32_t* blocks;
  int64_t block_count;
  const int32_t* limit;   // [rows of the span]
  const int32_t* from;    // the same, or null
  const uint8_t* mask;    // of the span's row 0, or null
  int64_t mask_stride;
};

template <class T>
Keys<T> keys_of(const Attention& a, const AttendTask& task, bool own) {
  const SpanKeys& span = *task.span;
  const KvLayer& layer = own ? a.own : a.cache;
  const int64_t dim = a.shape.dim;
  Keys<T> out;
  out.head = dim * kBlock;
  out.k = static_cast<const T*>(layer.k) + task.kv_head * out.head;
  out.v = static_cast<const T*>(layer.v) + task.kv_head * out.head;
  out.ks = sizeof(T) == 1 ? layer.k_scales + task.kv_head * kBlock : nullptr;
  out.vs = sizeof(T) == 1 ? layer.v_scales + task.kv_head * kBlock : nullptr;
  out.stride = a.shape.kv_heads * out.head;
  out.scale_stride = a.shape.kv_heads * kBlock;
  out.blocks = own ? span.own_blocks : span.blocks;
  out.block_count = ((own ? span.own : span.cached) + kBlock - 1) / kBlock;
  out.limit = (own ? a.own_limit : a.cached_limit) + span.row0;
  const int32_t* const from = own ? a.own_from : a.cached_from;
  out.from = from == nullptr ? nullptr : from + span.row0;
  out.mask = span.mask == nullptr ? nullptr : span.mask + (own ? span.cached : 0);
  out.mask_stride = static_cast<int64_t>(span.cached) + span.own;
  return out;
}

// Bit i: the row sees key base + i.
template <class T>
uint32_t visible(const Keys<T>& keys, int64_t row, int64_t base) {
  const int64_t n = keys.limit[row] - base;
  uint32_t bits = n >= kBlock ? 0xffffu : n <= 0 ? 0u : (1u << n) - 1;
  if (keys.from != nullptr) {
    const int64_t hidden = keys.from[row] - base;
    bits &= hidden >= kBlock ? 0u : hidden <= 0 ? 0xffffu : 0xffffu << hidden;
  }
  if (keys.mask != nullptr) {
    const uint8_t* mask = keys.mask + row * keys.mask_stride + base;
    uint32_t shown = 0;
    for (int64_t i = 0; i < kBlock && i < n; ++i) shown |= (mask[i] != 0 ? 1u : 0u) << i;
    bits &= shown;
  }
  return bits;
}

constexpr int kVisit = 4;  // blocks unpacked and worked on at a time, at most

// Where the blocks of a tile lie, of the task's first head, and the next ones (the last one again where there are none).
template <class T>
struct TileBlocks {
  const T *k[kTileBlocks + kVisit], *v[kTileBlocks + kVisit];
  const float *ks[kTileBlocks], *vs[kTileBlocks];
};

template <class T>
TileBlocks<T> tile_at(const Keys<T>& keys, int64_t base) {
  TileBlocks<T> tile;
  for (int b = 0; b < kTileBlocks + kVisit; ++b) {
    const int64_t at = base / kBlock + b, last = keys.block_count - 1;
    const int64_t block = keys.blocks[at < last ? at : last];
    tile.k[b] = keys.k + block * keys.stride;
    tile.v[b] = keys.v + block * keys.stride;
    if (b >= kTileBlocks) continue;
    tile.ks[b] = sizeof(T) == 1 ? keys.ks + block * keys.scale_stride : nullptr;
    tile.vs[b] = sizeof(T) == 1 ? keys.vs + block * keys.scale_stride : nullptr;
  }
  return tile;
}

}  // namespace dfk::DFK_ISA::spans
