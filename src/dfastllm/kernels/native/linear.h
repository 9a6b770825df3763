// Linear layers over packed weights: y[m, n] = sum_k x[m, k] w[n, k] + bias[n]. Weight layouts: kernels/packed.py.
//
// A row of y depends on its row of x alone: never on the other rows, on how many there are, or on the threads. Integer
// sums are exact; float sums run over k in one fixed order.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dfk {

enum class Format : int { f32 = 0, bf16 = 1, w8 = 2, w8g = 3, w4g = 4, w6g = 5, w4s = 6 };

constexpr int64_t kPanel = 64;  // output channels of a panel
constexpr int64_t kSteppedBytes = 32 * kPanel / 2 + kPanel;  // w4s: 32 inputs of a panel, the nibbles and a byte a channel

struct Linear {
  Format format;
  int64_t n, k;
  const void* data;       // panels
  const void* scales;     // [panels][groups][64]: float16 bits (uint16_t), w8 and w4s: float [panels][64]; null for floats
  const uint16_t* mins;   // [panels][groups][64] float16 bits, or null
  const float* bias;      // [n], or null
};

// What a gate goes through before it multiplies; gelu_tanh: the approximation by tanh.
enum class Activation : int { silu = 0, gelu_tanh = 1 };

// How a format wants its input rows.
enum class ActKind : int { f32 = 0, bf16 = 1, row8 = 2, group8 = 3 };

constexpr ActKind act_kind(Format f) {
  switch (f) {
    case Format::f32: return ActKind::f32;
    case Format::bf16: return ActKind::bf16;
    case Format::w8:
    case Format::w4s: return ActKind::row8;
    default: return ActKind::group8;
  }
}

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Input rows prepared for linears of one kind; q, k, v and gate, up share them. The memory is the caller's:
// acts_bytes() of it, 64-byte aligned, laid out by acts_at().
struct Acts {
  ActKind kind;
  int64_t rows, k;
  int64_t stride;   // elements from row to row: k rounded up to 32 (f32: or anything from k on); zero beyond k
  void* data;       // [rows][stride] float, bf16 bits, or int8
  float* scales;    // row8: [rows]; group8: [rows][stride / 32]; x ~ code * scale
  int32_t* sums;    // row8: [rows], sum of a row's codes; group8: [rows][stride / 16], sums of 16 codes
};

size_t acts_bytes(ActKind kind, int64_t rows, int64_t k);
Acts acts_at(void* memory, ActKind kind, int64_t rows, int64_t k);

struct HeadPart;  // linear_head.h
struct Spread;    // low_rank.h
class LowRank;    // low_rank.h
enum class Element : int;

// One panel or two; no second one: -1.
struct Panels {
  int64_t at[2];
  int count() const { return at[1] < 0 ? 1 : 2; }
};

// Panels of output channels for rows [row0, row0 + rows) of acts -> tiles [panels][rows][64] float, scales applied, no bias.
// scratch: kTileScratch bytes of the thread, 64-byte aligned.
using Tile = void (*)(const Linear& w, const Acts& x, const Panels& panels, int64_t row0, int64_t rows, float* tiles,
                      void* scratch);

// One instruction set's kernels of single rows and panels (linear_*.cpp).
struct LinearOps {
  // One row: x [k] (norm: times 1/sqrt(mean(x^2) + eps) times norm[k] first, if norm is not null) into row `row` of out.
  void (*prepare_row)(const float* x, const float* norm, float eps, const Acts& out, int64_t row);
  // 32 values x in [-inf, inf] into columns [column, column + 32) of row `row` of out; out.kind is not row8 (whose scale
  // needs the whole row).
  void (*prepare_32)(const float* x, const Acts& out, int64_t row, int64_t column);
  // x [k] -> out [k], other memory: each stretch of `block` (a power of two that divides k) times the Hadamard matrix, over
  // sqrt(block).
  void (*hadamard)(const float* x, int64_t k, int64_t block, float* out);
  const Tile* tile;            // by Format
  const int64_t* paired_rows;  // by Format: so many rows take two panels at once sooner than one after the other
  void (*gate_mul[2])(const float* gate, const float* up, float* out, int64_t count);  // by Activation
  void (*softcap)(float* x, int64_t count, float cap);  // cap * tanh(x / cap); NaN where x is not finite
  // The first `channels` of a tile [rows][64] into y [rows][ldy]; bias [channels] or null.
  void (*write_tile)(const float* tile, int64_t rows, int64_t channels, const float* bias, float* y, int64_t ldy,
                     bool accumulate);
  // The head's statistics (linear_head_rows.h).
  void (*head_rows)(const float* tile, int64_t rows, int32_t first_id, bool check, bool entropy, HeadPart* parts,
                    float* maxima);
  // out[r][j] = scale * (x[index[r]] . a[j]), x [..][ldx], index [rows] or null: all in order, a [count][k], out [rows][ldo].
  void (*dots)(Element type, const void* a, int64_t k, int64_t count, const float* x, int64_t ldx, const int32_t* index,
               int64_t rows, float scale, float* out, int64_t ldo);
  // `count` elements, `stride` apart, as floats.
  void (*widen)(Element type, const void* from, int64_t count, int64_t stride, float* out);
  void (*spread)(const Spread& work);  // the second half of a low-rank product, into the rows of a linear
};

constexpr size_t kTileScratch = 64 * 1024;
constexpr int64_t kMostPaired = 8;  // of paired_rows, for whoever keeps tiles

extern const LinearOps linear_scalar;
#if defined(DFK_X86)
extern const LinearOps linear_avx2, linear_avxvnni, linear_avx512vl, linear_avx512;
#elif defined(DFK_ARM)
extern const LinearOps linear_neon, linear_dotprod, linear_i8mm;
#endif
const LinearOps& linear_ops();

// x [rows][ldx] float -> acts, with RMSNorm first if norm is not null.
void prepare(const float* x, int64_t ldx, const float* norm, float eps, const Acts& out);

// The same of rows whose stretches of `block` inputs go through the Hadamard transform first (x is not changed): the inputs
// of a linear whose weights were turned so (models/basis.py).
void prepare_turned(const float* x, int64_t ldx, int64_t block, const Acts& out);

// Rows [row0, row0 + rows) of some inputs, which are w's: one of several products that are one piece of work, as those of
// a mixture's experts are. All w of a call have the same n and k and take the inputs' kind.
struct Share {
  const Linear* w;
  int64_t row0, rows;
};

// What adapters add to a linear after its bias: `work` of which the linear's columns begin at `column`; null: nothing. The
// bits of rows without an adapter are those without any.
struct Adapted {
  const LowRank* work = nullptr;
  int64_t column = 0;
};

// y [rows][ldy]: bias added; accumulate: y += instead of y =. Rows of no share stay as they are.
void linear(const Share* shares, int64_t count, const Acts& x, float* y, int64_t ldy, bool accumulate,
            const Adapted& adapted = {});
inline void linear(const Linear& w, const Acts& x, float* y, int64_t ldy, bool accumulate, const Adapted& adapted = {}) {
  const Share whole{&w, 0, x.rows};
  linear(&whole, 1, x, y, ldy, accumulate, adapted);
}

// w holds, panel by panel, 32 channels of the gate and the 32 same channels of the up projection (bias in that order
// too). h[m, i] = activation(gate) * up is prepared for the next linear in `out` (kind of its format, k: the width of h, which
// is a multiple of 32 or the last panel is padded with zero weights). block > 1: the products are turned,
// as by prepare_turned. A row8 or turned `out` goes through `h` [rows][out.k] float, and `keep` asks for the products
// (not turned) there too; else `h` may be null. The shares hold all rows.
void linear_gated(const Share* shares, int64_t count, const Acts& x, Activation activation, float* h, const Acts& out,
                  int64_t block = 1, const Adapted& adapted = {}, bool keep = false);
inline void linear_gated(const Linear& w, const Acts& x, Activation activation, float* h, const Acts& out, int64_t block = 1,
                         const Adapted& adapted = {}, bool keep = false) {
  const Share whole{&w, 0, x.rows};
  linear_gated(&whole, 1, x, activation, h, out, block, adapted, keep);
}

// x <- cap * tanh(x / cap) in place; NaN where x is not finite, which a cap would hide.
void softcap(float* x, int64_t count, float cap);

// What the head of a model is asked about a row of logits, `ban` ids left out. Ties: the lowest id.
struct RowStats {
  int32_t token;    // of the best logit; -1 if the row is not finite
  int32_t finite;   // 0: a NaN or an infinity among the logits (banned ones included)
  float top;        // best logit
  float second;     // second best logit (-inf if there is one candidate only)
  float norm;       // logsumexp
  float entropy;    // nats, of softmax; 0 unless asked for
};

// What a row may choose: the best logit outside its set of barred ids, the lowest id of a tie. token -1 and logit -inf
// where nothing is left, -1 and NaN where the row is not finite.
struct HeadChoice {
  int32_t token;
  float logit;
};

// Sets of ids: words [sets][ceil(n / 64)], a bit an id; of_row [rows]: the set of a row, -1 for none. words null: no row
// has one, and no choice is made.
struct Barred {
  const uint64_t* words = nullptr;
  const int32_t* of_row = nullptr;
  HeadChoice* out = nullptr;  // [rows]
};

// The logits are never written out: panel tiles are reduced as they are made, panel results are merged in panel order
// (so a row's floats do not depend on threads). topk > 0: also the best `topk` (logit, id) per row, descending, ties by
// lowest id, into top_values / top_ids [rows][topk]. cap > 0: of capped logits. Barred ids change the choice only.
void head_stats(const Linear& w, const Acts& x, float cap, const int32_t* ban, int64_t bans, const Barred& barred,
                bool entropy, int64_t topk, RowStats* out, float* top_values, int32_t* top_ids);

// Natural codes [n][k] (int8 or uint8; bf16 bits or float for those formats), scales, mins and steps -> the panels that
// kernels/packed.py defines. The destinations have the sizes that it gives.
void pack(Format format, int64_t n, int64_t k, const void* codes, const void* scales, const uint16_t* mins, const uint8_t* steps,
          void* data, void* panel_scales, uint16_t* panel_mins);

// Rows of the weight matrix as floats (an embedding table shares the head's packed matrix): out [count][k].
void weight_rows(const Linear& w, const int64_t* ids, int64_t count, float* out);

}  // namespace dfk
