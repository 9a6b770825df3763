// Attention over a vector type. attention_<isa>.cpp defines Vec and its operations in dfk's anonymous namespace, then
// includes this; nothing here may be shared between them (a linker would keep one instruction set's copy of it), so no
// templates of the standard library either.
//
// What makes a row's result its own, whatever is computed beside it:
// - Keys are taken in tiles of kTile from position 0 (of the range, whose length is a multiple of kTile). A tile updates
//   a row's maximum, sum and weighted V; a tile in which a row sees nothing multiplies by 2^0 = 1 and adds nothing.
// - The score of a key is a sum over dims in order. Softmax sums are kept per lane (position % 16) and added up in one
//   fixed order at the end. Lanes of hidden keys add +0.
// - Weighted V is a sum over the visible keys in order; hidden ones are left out, not multiplied by 0 (memory behind them
//   may hold anything, and 0 * NaN is NaN).
// - Where the CPU multiplies bfloat16 pairs, pairs are of fixed dims and positions (attention_pairs.h).
// - The register tile (rows x keys, rows x dims) only says which independent sums are interleaved.
// Scores are in log2 units: log2(e) * scale is folded into q; where they are capped, scale / softcap is, and the cap has
// the log2(e).
#include "attention_steps.h"

namespace dfk {
namespace {

// The folded rows of a task: query rows [first, last) x the `group` query heads of the K,V head, heads fastest. They are
// cut evenly into register tiles of at most Vec::max_rows.
struct Folded {
  int64_t group, first, count, tiles;
  int64_t start(int64_t tile) const { return count * tile / tiles; }
  int64_t row(int64_t f) const { return first + f / group; }  // of the span
};

Folded fold(const Attention& a, const AttendTask& task) {
  const int64_t group = a.heads / a.shape.kv_heads, count = (task.last - task.first) * group;
  return {group, task.first, count, (count + Vec::max_rows - 1) / Vec::max_rows};
}

// Results of some keys: maxima [folded], sums [folded], weighted V [folded][padded dim].
struct Partial {
  float *top, *sum, *mix;
};

Partial partial_at(float* memory, int64_t folded) {
  return {memory, memory + folded, memory + 2 * folded};
}

struct Scratch {
  float* scores;  // [max_rows][kTile]
  float* lanes;   // [folded][16] softmax sums per lane
  float* q;       // per register tile [dim][its rows]
  Partial range, total;
};

int64_t up16(int64_t x) { return (x + 15) / 16 * 16; }

Scratch carve(void* memory, int64_t folded, int64_t dim) {
  float* p = static_cast<float*>(memory);
  Scratch out;
  const auto take = [&p](int64_t floats) {
    float* const at = p;
    p += up16(floats);
    return at;
  };
  out.scores = take(Vec::max_rows * kTile);
  out.lanes = take(folded * kBlock);
  out.q = take(folded * dim);
  out.range = {take(folded), take(folded), take(folded * padded(dim))};
  out.total = {take(folded), take(folded), take(folded * padded(dim))};
  return out;
}

size_t scratch_bytes(int64_t folded, int64_t dim) {
  const int64_t floats = Vec::max_rows * kTile + folded * kBlock + up16(folded * dim) + 4 * up16(folded) +
                         2 * folded * padded(dim);
  return static_cast<size_t>(floats) * sizeof(float);
}

// One part (cached or own) of a span's keys, as one K,V head sees it.
template <class T>
struct Keys {
  const T *k, *v;        // of block 0 and this head
  const float *ks, *vs;  // int8 only
  int64_t stride;        // elements from block to block, K and V alike
  int64_t scale_stride;
  const int32_t* blocks;
  int64_t block_count;
  const int32_t* limit;  // [rows of the span]
  const int32_t* from;   // the same, or null
  const uint8_t* mask;   // of the span's row 0, or null
  int64_t mask_stride;
};

template <class T>
Keys<T> keys_of(const Attention& a, const AttendTask& task, bool own) {
  const SpanKeys& span = *task.span;
  const KvLayer& layer = own ? a.own : a.cache;
  const int64_t head = task.kv_head, dim = a.shape.dim;
  Keys<T> out;
  out.k = static_cast<const T*>(layer.k) + head * dim * kBlock;
  out.v = static_cast<const T*>(layer.v) + head * dim * kBlock;
  out.ks = sizeof(T) == 1 ? layer.k_scales + head * kBlock : nullptr;
  out.vs = sizeof(T) == 1 ? layer.v_scales + head * kBlock : nullptr;
  out.stride = a.shape.kv_heads * dim * kBlock;
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

template <class T>
TileKeys<T> tile_at(const Keys<T>& keys, int64_t base, int blocks) {
  TileKeys<T> tile;
  for (int b = 0; b < blocks + kAhead; ++b) {
    const int64_t at = base / kBlock + b, last = keys.block_count - 1;
    const int64_t block = keys.blocks[at < last ? at : last];
    tile.k[b] = keys.k + block * keys.stride;
    tile.v[b] = keys.v + block * keys.stride;
    if (b >= blocks) continue;
    tile.ks[b] = sizeof(T) == 1 ? keys.ks + block * keys.scale_stride : nullptr;
    tile.vs[b] = sizeof(T) == 1 ? keys.vs + block * keys.scale_stride : nullptr;
  }
  return tile;
}

// One tile of keys from `base` on, for folded rows [f0, f0 + rows).
template <class T>
void tile_step(const Attention& a, const Keys<T>& keys, const Folded& folded, int64_t f0, int rows, int64_t base,
               const Scratch& s) {
  int64_t most = 0, least = kTile;  // keys of this tile that any, and that every one of the rows may see
  int64_t fewest = keys.from == nullptr ? 0 : kTile, hidden = 0;  // that a window hides from all, and from any of them
  for (int64_t row = folded.row(f0); row <= folded.row(f0 + rows - 1); ++row) {
    const int64_t n = keys.limit[row] - base;
    most = n > most ? n : most;
    least = n < least ? n : least;
    if (keys.from == nullptr) continue;
    const int64_t before = keys.from[row] - base;
    fewest = before < fewest ? before : fewest;
    hidden = before > hidden ? before : hidden;
  }
  if (most <= 0 || fewest >= kTile) return;
  const int64_t dim = a.shape.dim;
  const int blocks = static_cast<int>(((most < kTile ? most : kTile) + kBlock - 1) / kBlock);
  const TileKeys<T> tile = tile_at(keys, base, blocks);
  float* mix = s.range.mix + f0 * padded(dim);
  float scale[16];
  scores(rows, s.q + f0 * dim, tile, blocks, dim, s.scores);
  const float cap = a.softcap * kLog2e;
  if (least == kTile && hidden == 0 && keys.mask == nullptr) {
    soften<true>(rows, tile, blocks, nullptr, cap, s.scores, s.range.top + f0, s.lanes + f0 * kBlock, scale);
    return weigh(rows, tile, kTile, s.scores, scale, dim, mix);
  }
  uint32_t bits[Vec::max_rows * kTileBlocks];
  int64_t common = blocks * kBlock;  // leading keys that all of the rows see
  for (int r = 0; r < rows; ++r) {
    for (int b = 0; b < blocks; ++b) {
      const uint32_t seen = visible(keys, folded.row(f0 + r), base + b * kBlock);
      bits[r * kTileBlocks + b] = seen;
      const int64_t first_hidden = b * kBlock + (seen == 0xffffu ? kTile : __builtin_ctz(~seen));
      common = first_hidden < common ? first_hidden : common;
    }
  }
  if (paired<T>()) common &= ~int64_t{1};
  soften<false>(rows, tile, blocks, bits, cap, s.scores, s.range.top + f0, s.lanes + f0 * kBlock, scale);
  weigh(rows, tile, common, s.scores, scale, dim, mix);
  for (int r = 0; r < rows; ++r) {
    weigh_rest(tile, common, blocks, bits + r * kTileBlocks, s.scores + r * kTile, dim, mix + r * padded(dim));
  }
}

// All of one range for all rows of the task -> s.range.
template <class T>
void attend_range(const Attention& a, const AttendTask& task, const Folded& folded, int64_t range, const Scratch& s) {
  const int64_t dim = a.shape.dim;
  for (int64_t f = 0; f < folded.count; ++f) s.range.top[f] = kNone;
  memset(s.range.mix, 0, static_cast<size_t>(folded.count * padded(dim)) * sizeof(float));
  memset(s.lanes, 0, static_cast<size_t>(folded.count * kBlock) * sizeof(float));

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
  for (int64_t base = first; base < stop; base += kTile) {
    for (int64_t tile = 0; tile < folded.tiles; ++tile) {
      const int64_t f0 = folded.start(tile);
      tile_step(a, keys, folded, f0, static_cast<int>(folded.start(tile + 1) - f0), base, s);
    }
  }
  for (int64_t f = 0; f < folded.count; ++f) s.range.sum[f] = lane_sum(s.lanes + f * kBlock);
}

// total <- total and part, in this order. A row that saw no key in `part` keeps its bits.
void merge_into(const Partial& total, const Partial& part, int64_t rows, int64_t dim) {
  const int64_t width = padded(dim);
  for (int64_t f = 0; f < rows; ++f) {
    float* to = total.mix + f * width;
    const float* from = part.mix + f * width;
    if (part.top[f] == kNone) continue;
    if (total.top[f] == kNone) {
      total.top[f] = part.top[f];
      total.sum[f] = part.sum[f];
      memcpy(to, from, static_cast<size_t>(width) * sizeof(float));
      continue;
    }
    const float top = total.top[f] > part.top[f] ? total.top[f] : part.top[f];
    float shift[16] = {total.top[f] - top, part.top[f] - top};
    power2(shift, shift);
    total.top[f] = top;
    total.sum[f] = total.sum[f] * shift[0] + part.sum[f] * shift[1];
    const Vec x = set1(shift[0]), y = set1(shift[1]);
    for (int64_t i = 0; i < width; i += Vec::width) store(to + i, fma(load(from + i), y, mul(load(to + i), x)));
  }
}

void clear(const Partial& total, int64_t rows) {
  for (int64_t f = 0; f < rows; ++f) total.top[f] = kNone;
}

// total -> out; rows that saw no key give zeros.
void finish(const Attention& a, const AttendTask& task, const Folded& folded, const Partial& total) {
  const int64_t dim = a.shape.dim, width = padded(dim);
  for (int64_t f = 0; f < folded.count; ++f) {
    const int64_t head = task.kv_head * folded.group + f % folded.group;
    float* out = a.out + ((task.span->row0 + folded.row(f)) * a.heads + head) * dim;
    const float* mix = total.mix + f * width;
    if (total.top[f] == kNone) {
      memset(out, 0, static_cast<size_t>(dim) * sizeof(float));
      continue;
    }
    const Vec inverse = set1(1.0f / total.sum[f]);
    int64_t i = 0;
    for (; i + Vec::width <= dim; i += Vec::width) store(out + i, mul(load(mix + i), inverse));
    if (i < dim) store_part(out + i, mul(load(mix + i), inverse), dim - i);
  }
}

// q * scale * log2(e), per register tile [dim][rows]; paired: [dim / 2][rows] bfloat16 pairs, the last of an odd dim with 0.
template <class T>
void pack_queries(const Attention& a, const AttendTask& task, const Folded& folded, float* to) {
  const int64_t dim = a.shape.dim;
  const float factor = a.softcap > 0.0f ? a.scale / a.softcap : a.scale * kLog2e;
  for (int64_t tile = 0; tile < folded.tiles; ++tile) {
    const int64_t f0 = folded.start(tile), rows = folded.start(tile + 1) - f0;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t head = task.kv_head * folded.group + (f0 + r) % folded.group;
      const float* q = a.q + (task.span->row0 + folded.row(f0 + r)) * a.stride + head * dim;
      if constexpr (paired<T>()) {
        for (int64_t d = 0; d < dim; d += 2) {
          const uint16_t pair[2] = {to_bf16(q[d] * factor), d + 1 < dim ? to_bf16(q[d + 1] * factor) : uint16_t{0}};
          memcpy(to + f0 * dim + d / 2 * rows + r, pair, sizeof(pair));
        }
      } else {
        for (int64_t d = 0; d < dim; ++d) to[f0 * dim + d * rows + r] = q[d] * factor;
      }
    }
  }
}

template <class T>
void attend_as(const Attention& a, const AttendTask& task, void* scratch) {
  const int64_t dim = a.shape.dim;
  const Folded folded = fold(a, task);
  const Scratch s = carve(scratch, folded.count, dim);
  pack_queries<T>(a, task, folded, s.q);
  clear(s.total, folded.count);
  for (int64_t range = task.range0; range < task.range1; ++range) {
    Scratch here = s;
    if (task.partial != nullptr) {
      const int64_t size = partial_floats(folded.count, dim);
      here.range = partial_at(task.partial + (range - task.range0) * size, folded.count);
    }
    attend_range<T>(a, task, folded, range, here);
    if (task.partial == nullptr) merge_into(s.total, s.range, folded.count, dim);
  }
  if (task.partial == nullptr) finish(a, task, folded, s.total);
}

void attend(const Attention& a, const AttendTask& task, void* scratch) {
  switch (a.shape.type) {
    case KvType::f32: return attend_as<float>(a, task, scratch);
    case KvType::bf16: return attend_as<uint16_t>(a, task, scratch);
    case KvType::i8: return attend_as<int8_t>(a, task, scratch);
  }
}

void merge(const Attention& a, const AttendTask& task, void* scratch) {
  const int64_t dim = a.shape.dim;
  const Folded folded = fold(a, task);
  const Scratch s = carve(scratch, folded.count, dim);
  clear(s.total, folded.count);
  for (int64_t range = task.range0; range < task.range1; ++range) {
    const int64_t size = partial_floats(folded.count, dim);
    merge_into(s.total, partial_at(task.partial + (range - task.range0) * size, folded.count), folded.count, dim);
  }
  finish(a, task, folded, s.total);
}

}  // namespace
}  // namespace dfk

#include "attention_rope.h"
