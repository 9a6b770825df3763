// Rotary positions, K,V writes and attention of packed spans over paged K,V.
//
// Keys come in blocks of 16 positions. Block b of one layer: K [kv_heads][dim][16] (16 keys of one dim lie together, so
// scores of 16 keys are one register and need no horizontal sum), V [kv_heads][16][dim]. A row's result depends on its
// own query and the keys it sees, in order of position: never on the other rows of the span, on which blocks hold the
// keys, or on threads. Keys beyond a row's limit change nothing, to the last bit: a prompt row computed in a chunk of
// 512 equals the same row computed alone.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dfk {

enum class KvType : int { f32 = 0, bf16 = 1, i8 = 2 };

constexpr int64_t kBlock = 16;  // positions of a block

// One layer's K,V. i8: value = code * scale with one float scale per (block, kv_head, position).
struct KvLayer {
  void* k;
  void* v;
  float* k_scales;  // [blocks][kv_heads][16], i8 only
  float* v_scales;
};

struct KvShape {
  KvType type;
  int64_t kv_heads, dim;
  int64_t block_elements() const { return kv_heads * dim * kBlock; }  // of K, and of V
  bool operator==(const KvShape& x) const { return type == x.type && kv_heads == x.kv_heads && dim == x.dim; }
};

// K,V of some layers, which lie one after another: k [layers][blocks][kv_heads][dim][16] and so on.
struct KvMemory {
  KvShape shape{};
  int64_t layers = 0, blocks = 0;
  KvLayer first{};
  KvLayer layer(int64_t i) const;
};

struct RopeStore {
  float* qkv;              // [rows][stride]: heads * dim of q, kv_heads * dim of k, the same of v; q, k change in place
  int64_t rows, stride, heads;
  const float* q_norm;     // RMSNorm weights, or null
  const float* k_norm;
  int64_t q_size, k_size;  // dims that a norm goes over: a head's, or those of all heads
  float eps;
  const float* cos;        // [rows][rotary / 2]
  const float* sin;
  int64_t rotary;          // dims that rotate, pairs (i, i + rotary / 2); <= dim, even
  KvShape shape;
  KvLayer cache, own;      // own: K,V of this forward only (rows that see each other but are not kept)
  const int32_t* slot;     // [rows]: block * 16 + offset in `cache`, or -1
  const int32_t* own_slot; // [rows]: the same in `own`, or -1
};

void rope_store(const RopeStore& a);

// One sequence's rows [row0, row1) and the keys they may see: positions [0, cached) in `blocks`, then `own` keys in
// `own_blocks` (from their first position on; blocks of the two parts are never shared).
struct SpanKeys {
  int32_t row0, row1;
  int32_t cached, own;
  const int32_t* blocks;      // [ceil(cached / 16)]
  const int32_t* own_blocks;  // [ceil(own / 16)]
  const uint8_t* mask;        // [row1 - row0][cached + own], zero: hidden even within the limits; or null
  int32_t own_start = 0;      // position of the first own key; those after it follow (shadows aside, which have a mask)
};

struct Attention {
  const float* q;               // [rows][stride], heads * dim used
  int64_t rows, stride, heads;
  float scale;                  // on scores, usually dim ** -0.5
  float softcap;                // > 0: a score s becomes softcap * tanh(s / softcap)
  KvShape shape;
  KvLayer cache, own;
  const SpanKeys* spans;        // cover rows in order; rows outside (padding) give zeros
  int64_t span_count;
  const int32_t* cached_limit;  // [rows]: sees the first so many cached keys
  const int32_t* own_limit;     // [rows]: and the first so many own keys. A row that sees no key gives zeros.
  const int32_t* cached_from;   // [rows]: but for the first so many cached keys, which a window hides; or null
  const int32_t* own_from;      // [rows]: the same of own keys
  float* out;                   // [rows][heads * dim]
};

// What a window hides from the rows: a row at position p sees only keys at positions above p - window.
void window_from(const SpanKeys* spans, int64_t count, const int32_t* positions, int64_t window, int32_t* cached_from,
                 int32_t* own_from);

// Online softmax. The running maximum, sum and weighted V are float32.
void attention(const Attention& a);

// A piece of the work: query rows [first, last) of a span (counted from the span's first row), all query heads that share
// K,V heads [kv_head, kv_head + kv_heads), over key ranges [range0, range1).
//
// A range is kRange positions; a sequence's cached keys are cut into ranges from position 0 on, then its own keys from
// their first one on. Every row's result is made range by range and the ranges are merged in order, whether one task does
// all of them or each has its own, so how the work is cut never shows in the bits.
struct AttendTask {
  const SpanKeys* span;
  int64_t kv_head, kv_heads, first, last;
  int64_t range0, range1;
  int64_t cached_ranges;  // ranges [0, cached_ranges) are of cached keys
  float* partial;         // null: merge and write `out`; else one partial result per range goes here
};

constexpr int64_t kRange = 1024;

// Of one range and `folded` rows (query rows x query heads): maxima, sums, weighted V.
static inline int64_t partial_floats(int64_t folded, int64_t dim) { return folded * (2 + (dim + 15) / 16 * 16); }

// One instruction set's kernels (attention_*.cpp).
struct AttentionOps {
  void (*rope_store_row)(const RopeStore& a, int64_t row);
  size_t (*scratch_bytes)(int64_t kv_heads, int64_t of_head, int64_t dim);  // of_head: folded rows of a K,V head
  void (*attend)(const Attention& a, const AttendTask& task, void* scratch);  // scratch: 64-byte aligned
  // The partial results of all ranges of `task` (task.partial) -> out.
  void (*merge)(const Attention& a, const AttendTask& task, void* scratch);
};

extern const AttentionOps attention_scalar;
#if defined(DFK_X86)
extern const AttentionOps attention_avx2, attention_avx512;
#elif defined(DFK_ARM)
extern const AttentionOps attention_neon;
#endif
const AttentionOps& attention_ops();

}  // namespace dfk
