// A whole forward pass in one call: embedding, the ops of each layer, final norm of the wanted rows. The ops are those of
// dfastllm/models/packed.py, whose plain twin walks the same list.
#pragma once

#include <array>
#include <cstdint>
#include <variant>
#include <vector>

#include "adapter.h"
#include "attention.h"
#include "experts.h"
#include "linear.h"
#include "scratch.h"
#include "step.h"

namespace dfk {

// RMSNorm, its offset added to the weights; null: none.
struct Norm {
  const float* weight = nullptr;  // [size]
  int64_t size = 0;
  float eps = 0.0f;
};

// The branch h begins as the stream x, at the start of a layer and after every op that adds to the stream.

// h <- norm(h) W^T of matrices side by side (several where their formats differ), or x += it.
struct Project {
  std::vector<Linear> linears;
  Norm norm;
  bool onto_stream;
  int64_t site = -1;  // its number among the linears of all layers that adapters may change
};

// h <- activation(gate) * up of norm(h), `width` channels, prepared as `kind` for the Project that follows; block > 1: turned
// (prepare_turned).
struct Gated {
  Linear linear;  // 32 gate, 32 up channels per panel
  Norm norm;
  Activation activation;
  int64_t width;
  ActKind kind;
  int64_t block;
  int64_t site = -1;  // the Project that follows has the next
};

// h = (q, k, v) <- attention, K and V being stored.
struct Mix {
  Norm q_norm, k_norm;  // over a head, or over all heads
  int64_t table;        // of rotary positions, or -1
  float scale, softcap;
  int64_t window;       // keys that a row sees, 0: all
};

// h <- norm(h)
struct Normalise {
  Norm norm;
};

// h <- the mixture's output of norm(h), or x += it.
struct Experts {
  Norm norm;
  Mixture mixture;
  bool onto_stream;
  int64_t site = -1;  // of the first of its sites()
};

// x <- x + factor * h
struct Sum {
  float factor;
};

using Op = std::variant<Project, Gated, Mix, Normalise, Experts, Sum>;

struct RopeTable {
  std::vector<float> frequencies;  // radians per position, of half the dims that rotate
  float factor;                    // on cos and sin
};

struct Decoder {
  int64_t hidden, heads;
  KvShape kv;
  Linear embed;
  float embed_factor;
  Norm norm;
  std::vector<RopeTable> ropes;
  std::vector<std::vector<Op>> layers;
};

class Forward {
 public:
  explicit Forward(Decoder decoder) : d_(std::move(decoder)) {}

  // Making it: tables first, then layer by layer. Throw std::invalid_argument for an op that does not fit the one before.
  void add(RopeTable table);
  void begin_layer();
  void add(Op op);

  // out [wanted][hidden] float, after the final norm. `own` is the K,V of one layer, used by all in turn. halt [2] or
  // null: once another thread makes both alike, the run ends before its next layer, and false comes back.
  bool run(const Step& step, const KvMemory& cache, const KvLayer& own, float* out, const int64_t* halt);

  // From now on a row's number n stands for table[n]; null: no row may have it. Throws std::invalid_argument for an adapter
  // of other sites or widths.
  void set_adapters(std::vector<const Adapter*> table);

  // Throws std::invalid_argument unless the step's ids and adapters are the model's and K,V of this shape are.
  void require(const Step& step, const KvMemory& cache) const;

  int64_t hidden() const { return d_.hidden; }
  size_t bytes_held() const;

 private:
  // What a window hides from the rows of a step.
  struct Window {
    int64_t size;
    std::vector<int32_t> cached_from, own_from;
  };
  struct Pass;

  const Acts& prepared(ActKind kind, const float* x, int64_t ldx, int64_t rows, int64_t k, const Norm& norm);
  void fill_angles(const Step& step);
  const Window& window_of(const Step& step, int64_t size);
  void require_site(const Adapter& adapter, int64_t site) const;

  Decoder d_;
  int64_t width_ = 0;      // while it is made: of the branch
  bool gated_ = false;     // and whether it is prepared rows
  int64_t widest_ = 0;     // branch that there is
  Buffer x_, wide_, mixed_, h_, tail_, next_;
  std::vector<Buffer> cos_, sin_;  // by table
  std::array<Buffer, 4> acts_;     // by ActKind
  std::array<Acts, 4> at_{};
  Acts next_at_{};
  std::vector<Window> windows_;
  std::vector<int64_t> ids_;
  struct Site {
    int64_t k, n;  // widths of its inputs and outputs
  };
  std::vector<Site> sites_;
  std::vector<const Adapter*> table_;
  AdaptedRows adapted_;    // of the step
  LowRank low_rank_;
  MixtureWork mixture_;
};

}  // namespace dfk
