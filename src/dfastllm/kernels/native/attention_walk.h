// How a task of attention walks over its keys, for all types of K,V and instruction sets.
//
// What makes a row's result its own, whatever is computed beside it:
// - Keys are taken in tiles of kTile from position 0 (of the range, whose length is a multiple of kTile). A tile updates
//   a row's maximum, sum and weighted V; a tile in which a row sees nothing multiplies by 2^0 = 1 and adds nothing.
// - The score of a key is a sum over dims in order. Softmax sums are kept per lane (position % 16) and added up in one
//   fixed order at the end. Lanes of hidden keys add +0.
// - Weighted V is a sum over the visible keys in order; hidden ones are left out, not multiplied by 0 (memory behind them
//   may hold anything, and 0 * NaN is NaN).
// - Where the CPU multiplies bfloat16 pairs, pairs are of fixed dims and positions (attention_products.h).
//
// A tile is walked in visits: a few blocks of one head are unpacked into the near cache and multiplied with all rows that
// look at that head, then the same blocks of the next head. The heads of a block lie together, so a task of several heads
// reads memory from end to end, which the hardware prefetchers follow; the next visit's blocks are fetched meanwhile.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "attention.h"
#include "attention_panels.h"
#include "attention_products.h"
#include "attention_softmax.h"
#include "simd.h"

namespace dfk::DFK_ISA::spans {

// The folded rows of a task, head by head of its K,V heads: query rows [first, last) x the `group` query heads of the K,V
// head, query heads fastest. Those of a head are cut evenly into register tiles of at most kMaxRows.
struct Folded {
  int64_t group, first, heads, of_head, tiles;
  int64_t count() const { return heads * of_head; }
  int64_t start(int64_t tile) const { return of_head * tile / tiles; }
  int rows(int64_t tile) const { return static_cast<int>(start(tile + 1) - start(tile)); }
  int64_t row(int64_t f) const { return first + f % of_head / group; }  // of the span
  int64_t query_head(int64_t kv_head, int64_t f) const { return (kv_head + f / of_head) * group + f % of_head % group; }
};

inline Folded fold(const Attention& a, const AttendTask& task) {
  const int64_t group = a.heads / a.shape.kv_heads, of_head = (task.last - task.first) * group;
  return {group, task.first, task.kv_heads, of_head, (of_head + kMaxRows - 1) / kMaxRows};
}

// Results of some keys: maxima [folded], sums [folded], weighted V [folded][padded dim].
struct Partial {
  float *top, *sum, *mix;
};

inline Partial partial_at(float* memory, int64_t folded) { return {memory, memory + folded, memory + 2 * folded}; }

// What a register tile's rows see of a tile of keys.
struct Sight {
  int blocks;      // that hold all of it; 0: nothing
  bool all;        // every row sees every key
  int64_t common;  // leading keys that all of the rows see, a whole number of steps
};

struct Scratch {
  char* panels;    // of a visit
  float* scores;   // [folded][kTile]
  float* lanes;    // [folded][16] softmax sums per lane
  float* q;        // per register tile [steps][its rows]
  float* scale;    // [folded] what a tile of keys multiplies weighted V by
  uint32_t* bits;  // [folded rows of a head][kTileBlocks] the visible keys
  Sight* sights;   // [register tiles of a head]
  Partial range, total;
};

// Hands out 64-byte aligned pieces of memory. A number, not a pointer: from 0 on it only counts.
struct Carver {
  uintptr_t at;
  template <class T> T* take(int64_t count) {
    T* const piece = reinterpret_cast<T*>(at);
    at += (static_cast<uintptr_t>(count) * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
  Partial take_partial(int64_t folded, int64_t width) {
    Partial out;
    out.top = take<float>(folded);
    out.sum = take<float>(folded);
    out.mix = take<float>(folded * width);
    return out;
  }
};

inline Scratch carve(Carver& from, int64_t heads, int64_t of_head, int64_t dim) {
  const int64_t folded = heads * of_head, width = padded(dim);
  Scratch out;
  out.panels = from.take<char>(kVisit * 64 * width);
  out.scores = from.take<float>(folded * kTile);
  out.lanes = from.take<float>(folded * 16);
  out.q = from.take<float>(folded * dim);
  out.scale = from.take<float>(folded);
  out.bits = from.take<uint32_t>(of_head * kTileBlocks);
  out.sights = from.take<Sight>(of_head);
  out.range = from.take_partial(folded, width);
  out.total = from.take_partial(folded, width);
  return out;
}

inline size_t scratch_bytes(int64_t heads, int64_t of_head, int64_t dim) {
  Carver carver{0};
  carve(carver, heads, of_head, dim);
  return static_cast<size_t>(carver.at);
}

// One tile of keys.
template <class T>
struct Walk {
  using P = Products<T>;
  const Attention& a;
  const AttendTask& task;
  const Keys<T>& keys;
  const Folded& folded;
  const Scratch& s;
  int64_t base;  // first key
  TileBlocks<T> tile{};
  int blocks = 0;      // that any row sees anything of
  int64_t visits = 0;  // blocks of a visit

  Sight sight_of(int64_t t) const {
    const int64_t f0 = folded.start(t), f1 = folded.start(t + 1);
    int64_t most = 0, least = kTile;  // keys of this tile that any, and that every one of the rows may see
    int64_t fewest = keys.from == nullptr ? 0 : kTile, hidden = 0;  // that a window hides from all, and from any of them
    for (int64_t row = folded.row(f0); row <= folded.row(f1 - 1); ++row) {
      const int64_t n = keys.limit[row] - base;
      most = n > most ? n : most;
      least = n < least ? n : least;
      if (keys.from == nullptr) continue;
      const int64_t before = keys.from[row] - base;
      fewest = before < fewest ? before : fewest;
      hidden = before > hidden ? before : hidden;
    }
    if (most <= 0 || fewest >= kTile) return {0, false, 0};
    const int count = static_cast<int>(((most < kTile ? most : kTile) + kBlock - 1) / kBlock);
    if (least >= kTile && hidden <= 0 && keys.mask == nullptr) return {count, true, kTile};
    int64_t common = count * kBlock;
    for (int64_t f = f0; f < f1; ++f) {
      for (int b = 0; b < count; ++b) {
        const uint32_t seen = visible(keys, folded.row(f), base + b * kBlock);
        s.bits[f * kTileBlocks + b] = seen;
        const int64_t first_hidden = b * kBlock + (seen == 0xffffu ? kTile : __builtin_ctz(~seen));
        common = first_hidden < common ? first_hidden : common;
      }
    }
    return {count, false, common / P::kTogether * P::kTogether};
  }

  bool look() {
    for (int64_t t = 0; t < folded.tiles; ++t) {
      s.sights[t] = sight_of(t);
      blocks = s.sights[t].blocks > blocks ? s.sights[t].blocks : blocks;
    }
    if (blocks == 0) return false;
    tile = tile_at(keys, base);
    const int64_t fit = 16384 / (64 * key_steps<P>(a.shape.dim));  // half of the nearest cache
    visits = fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
    return true;
  }

  // The blocks after the visit of blocks from b on of `head`, which are worth fetching.
  Fetch after(const T* const* blocks_of, const T* const* then, int b, int64_t head) const {
    Fetch out;
    out.bytes = kBlock * P::kTogether * static_cast<int64_t>(sizeof(T));
    const bool more = head + 1 < folded.heads;
    const int next = more ? b : b + static_cast<int>(visits);
    for (int i = 0; i < kVisit; ++i) {
      const T* at = next < blocks ? blocks_of[next + i] : then[i];
      out.at[i] = reinterpret_cast<const char*>(at + (more ? head + 1 : 0) * keys.head);
    }
    return out;
  }

  int blocks_from(int b) const { return static_cast<int>(blocks - b < visits ? blocks - b : visits); }

  void score() const {
    const int64_t dim = a.shape.dim, steps = key_steps<P>(dim);
    for (int b = 0; b < blocks; b += static_cast<int>(visits)) {
      for (int64_t head = 0; head < folded.heads; ++head) {
        const char* panel[kVisit];
        for (int i = 0; i < blocks_from(b); ++i) {
          const T* from = tile.k[b + i] + head * keys.head;
          panel[i] = keys_as_they_lie(from);
          if (panel[i] != nullptr) continue;
          panel[i] = s.panels + i * 64 * steps;
          unpack_keys(from, dim, s.panels + i * 64 * steps);
        }
        const Fetch fetch = after(tile.k, tile.v, b, head);
        for (int64_t t = 0; t < folded.tiles; ++t) {
          const int mine = s.sights[t].blocks - b, here = blocks_from(b);
          if (mine <= 0) continue;
          const int64_t f0 = head * folded.of_head + folded.start(t);
          scores<P>(folded.rows(t), reinterpret_cast<const char*>(s.q) + 4 * f0 * steps, panel, mine < here ? mine : here,
                    steps, fetch, s.scores + f0 * kTile + b * kBlock);
        }
      }
    }
  }

  void soften_all() const {
    const float cap = a.softcap * kLog2e;
    for (int64_t head = 0; head < folded.heads; ++head) {
      TileScales scales{};
      for (int b = 0; sizeof(T) == 1 && b < blocks; ++b) {
        scales.k[b] = tile.ks[b] + head * kBlock;
        scales.v[b] = tile.vs[b] + head * kBlock;
      }
      for (int64_t t = 0; t < folded.tiles; ++t) {
        const Sight& sight = s.sights[t];
        if (sight.blocks == 0) continue;
        const int64_t f0 = head * folded.of_head + folded.start(t);
        const uint32_t* bits = s.bits + folded.start(t) * kTileBlocks;
        const auto soft = sight.all ? soften<true, T> : soften<false, T>;
        soft(folded.rows(t), scales, sight.blocks, bits, cap, s.scores + f0 * kTile, s.range.top + f0, s.lanes + f0 * 16,
             s.scale + f0);
      }
    }
  }

  // One register tile's share of a visit.
  void weigh_tile(const char* const* panel, const Fetch& fetch, int b, int64_t head, int64_t t) const {
    static constexpr float ones[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    const Sight& sight = s.sights[t];
    if (sight.blocks <= b) return;
    const int64_t width = padded(a.shape.dim), f0 = head * folded.of_head + folded.start(t);
    const int here = sight.blocks - b < blocks_from(b) ? sight.blocks - b : blocks_from(b);
    int64_t common = sight.common - b * kBlock;
    common = common < 0 ? 0 : common < here * kBlock ? common : here * kBlock;
    // Weights of a step are 4 bytes, in order.
    const char* w = reinterpret_cast<const char*>(s.scores + f0 * kTile) + 4 * b * value_steps<P>();
    float* mix = s.range.mix + f0 * width;
    weigh<P>(folded.rows(t), w, panel, common / P::kTogether, fetch, b == 0 ? s.scale + f0 : ones, width, mix);
    if (common == here * kBlock) return;
    for (int r = 0; r < folded.rows(t); ++r) {
      for (int i = static_cast<int>(common / kBlock); i < here; ++i) {
        uint32_t seen = s.bits[(folded.start(t) + r) * kTileBlocks + b + i];
        const int64_t done = common > i * kBlock ? (common - i * kBlock) / P::kTogether : 0;  // steps
        seen >>= done * P::kTogether;
        weigh_some<P>(seen, w + r * kTile * 4 + 4 * (i * value_steps<P>() + done), panel[i] + done * 4 * width, width,
                      mix + r * width);
      }
    }
  }

  void weigh_all(const TileBlocks<T>& next) const {
    const int64_t dim = a.shape.dim, bytes = value_steps<P>() * 4 * padded(dim);
    for (int b = 0; b < blocks; b += static_cast<int>(visits)) {
      for (int64_t head = 0; head < folded.heads; ++head) {
        const char* panel[kVisit];
        for (int i = 0; i < blocks_from(b); ++i) {
          const T* from = tile.v[b + i] + head * keys.head;
          panel[i] = values_as_they_lie(from, dim);
          if (panel[i] != nullptr) continue;
          panel[i] = s.panels + i * bytes;
          unpack_values(from, dim, s.panels + i * bytes);
        }
        const Fetch fetch = after(tile.v, next.k, b, head);
        for (int64_t t = 0; t < folded.tiles; ++t) weigh_tile(panel, fetch, b, head, t);
      }
    }
  }

  void run() {
    if (!look()) return;
    score();
    soften_all();
    weigh_all(tile_at(keys, base + kTile));
  }
};

// All of one range for all rows of the task -> s.range.
template <class T>
void attend_range(const Attention& a, const AttendTask& task, const Folded& folded, int64_t range, const Scratch& s) {
  const int64_t count = folded.count(), width = padded(a.shape.dim);
  for (int64_t f = 0; f < count; ++f) s.range.top[f] = kNone;
  std::memset(s.range.mix, 0, static_cast<size_t>(count * width) * sizeof(float));
  std::memset(s.lanes, 0, static_cast<size_t>(count * 16) * sizeof(float));

  const bool own = range >= task.cached_ranges;
  const Keys<T> keys = keys_of<T>(a, task, own);
  const int64_t start = (own ? range - task.cached_ranges : range) * kRange;
  int64_t stop = 0;
  for (int64_t row = task.first; row < task.last; ++row) stop = keys.limit[row] > stop ? keys.limit[row] : stop;
  stop = stop < start + kRange ? stop : start + kRange;
  int64_t first = start;
  if (keys.from != nullptr) {  // whole tiles before the window of every row
    int64_t least = stop;
    for (int64_t row = task.first; row < task.last; ++row) least = keys.from[row] < least ? keys.from[row] : least;
    if (least > start) first = start + (least - start) / kTile * kTile;
  }
  for (int64_t base = first; base < stop; base += kTile) Walk<T>{a, task, keys, folded, s, base}.run();
  for (int64_t f = 0; f < count; ++f) s.range.sum[f] = total(load(s.lanes + f * 16));
}

// total <- total and part, in this order. A row that saw no key in `part` keeps its bits.
inline void merge_into(const Partial& all, const Partial& part, int64_t rows, int64_t dim) {
  const int64_t width = padded(dim);
  for (int64_t f = 0; f < rows; ++f) {
    float* to = all.mix + f * width;
    const float* from = part.mix + f * width;
    if (part.top[f] == kNone) continue;
    if (all.top[f] == kNone) {
      all.top[f] = part.top[f];
      all.sum[f] = part.sum[f];
      std::memcpy(to, from, static_cast<size_t>(width) * sizeof(float));
      continue;
    }
    const float top = all.top[f] > part.top[f] ? all.top[f] : part.top[f];
    float shift[16] = {all.top[f] - top, part.top[f] - top};
    store(shift, power2(load(shift)));
    all.top[f] = top;
    all.sum[f] = all.sum[f] * shift[0] + part.sum[f] * shift[1];
    const Floats16 x = floats16(shift[0]), y = floats16(shift[1]);
    for (int64_t i = 0; i < width; i += 16) store(to + i, multiply_add(load(from + i), y, load(to + i) * x));
  }
}

inline void clear(const Partial& all, int64_t rows) {
  for (int64_t f = 0; f < rows; ++f) all.top[f] = kNone;
}

// total -> out; rows that saw no key give zeros.
inline void finish(const Attention& a, const AttendTask& task, const Folded& folded, const Partial& all) {
  const int64_t dim = a.shape.dim, width = padded(dim);
  for (int64_t f = 0; f < folded.count(); ++f) {
    const int64_t head = folded.query_head(task.kv_head, f);
    float* out = a.out + ((task.span->row0 + folded.row(f)) * a.heads + head) * dim;
    const float* mix = all.mix + f * width;
    if (all.top[f] == kNone) {
      std::memset(out, 0, static_cast<size_t>(dim) * sizeof(float));
      continue;
    }
    const Floats16 inverse = floats16(1.0f / all.sum[f]);
    for (int64_t i = 0; i < dim; i += 16) store_up_to(out + i, load(mix + i) * inverse, dim - i);
  }
}

// Nearest, ties to even; a NaN stays a NaN.
inline uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void put_query(Singles, const float* q, int64_t dim, float factor, int64_t rows, float* to) {
  for (int64_t d = 0; d < dim; ++d) to[d * rows] = q[d] * factor;
}
#if defined(DFK_SIMD_PAIRS)
inline void put_query(Pairs, const float* q, int64_t dim, float factor, int64_t rows, float* to) {
  for (int64_t d = 0; d < dim; d += 16) {
    uint16_t rounded[16];
    store_bf16(rounded, load_up_to(q + d, dim - d) * floats16(factor));
    for (int64_t i = 0; i < 16 && d + i < dim; i += 2, to += rows) std::memcpy(to, rounded + i, 4);
  }
}
#endif

// q * scale * log2(e), per register tile [steps][rows].
template <class P>
void pack_queries(const Attention& a, const AttendTask& task, const Folded& folded, float* to) {
  const int64_t dim = a.shape.dim, steps = key_steps<P>(dim);
  const float factor = a.softcap > 0.0f ? a.scale / a.softcap : a.scale * kLog2e;
  for (int64_t tile = 0; tile < folded.heads * folded.tiles; ++tile) {
    const int64_t t = tile % folded.tiles, f0 = tile / folded.tiles * folded.of_head + folded.start(t);
    for (int64_t r = 0; r < folded.rows(t); ++r) {
      const float* row = a.q + (task.span->row0 + folded.row(f0 + r)) * a.stride;
      put_query(P{}, row + folded.query_head(task.kv_head, f0 + r) * dim, dim, factor, folded.rows(t), to + f0 * steps + r);
    }
  }
}

inline Scratch carve(void* memory, const Folded& folded, int64_t dim) {
  Carver carver{reinterpret_cast<uintptr_t>(memory)};
  return carve(carver, folded.heads, folded.of_head, dim);
}

template <class T>
void attend_as(const Attention& a, const AttendTask& task, void* scratch) {
  const int64_t dim = a.shape.dim;
  const Folded folded = fold(a, task);
  const Scratch s = carve(scratch, folded, dim);
  pack_queries<Products<T>>(a, task, folded, s.q);
  clear(s.total, folded.count());
  for (int64_t range = task.range0; range < task.range1; ++range) {
    Scratch here = s;
    if (task.partial != nullptr) {
      const int64_t size = partial_floats(folded.count(), dim);
      here.range = partial_at(task.partial + (range - task.range0) * size, folded.count());
    }
    attend_range<T>(a, task, folded, range, here);
    if (task.partial == nullptr) merge_into(s.total, s.range, folded.count(), dim);
  }
  if (task.partial == nullptr) finish(a, task, folded, s.total);
}

inline void attend(const Attention& a, const AttendTask& task, void* scratch) {
  switch (a.shape.type) {
    case KvType::f32: return attend_as<float>(a, task, scratch);
    case KvType::bf16: return attend_as<uint16_t>(a, task, scratch);
    case KvType::i8: return attend_as<int8_t>(a, task, scratch);
  }
}

inline void merge(const Attention& a, const AttendTask& task, void* scratch) {
  const int64_t dim = a.shape.dim;
  const Folded folded = fold(a, task);
  const Scratch s = carve(scratch, folded, dim);
  clear(s.total, folded.count());
  for (int64_t range = task.range0; range < task.range1; ++range) {
    const int64_t size = partial_floats(folded.count(), dim);
    merge_into(s.total, partial_at(task.partial + (range - task.range0) * size, folded.count()), folded.count(), dim);
  }
  finish(a, task, folded, s.total);
}

}  // namespace dfk::DFK_ISA::spans
