// A whole forward pass of a dense decoder in one call: embedding, layers, final norm of the wanted rows. Its plain twin
// is dfastllm/models/packed.py, which calls the same operations one by one.
#pragma once

#include <array>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "attention.h"
#include "linear.h"
#include "step.h"

namespace dfk {

// Memory that grows and is kept from pass to pass; 64-byte aligned, contents undefined after growth.
class Buffer {
 public:
  void* bytes(size_t count);
  float* floats(size_t count) { return static_cast<float*>(bytes(count * sizeof(float))); }
  size_t size() const { return size_; }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> data_;
  size_t size_ = 0;
};

struct Layer {
  const float* attn_norm;
  const float* mlp_norm;
  const float* q_norm;  // per head, or null
  const float* k_norm;
  std::vector<Linear> qkv;  // one fused, or q, k, v when their formats differ; outputs side by side
  Linear o, gate_up, down;  // gate_up: 32 gate, 32 up channels per panel
};

struct Decoder {
  int64_t hidden, heads, dim, rotary;
  float eps;
  float rope_factor;         // on cos and sin
  const float* frequencies;  // [rotary / 2], radians per position
  KvShape kv;
  Linear embed;
  const float* norm;
  std::vector<Layer> layers;
};

// The K,V of all layers: layer i starts `stride` bytes after layer i - 1.
struct KvMemory {
  KvLayer first;
  int64_t stride, scale_stride;
  KvLayer layer(int64_t i) const;
};

class Forward {
 public:
  explicit Forward(Decoder decoder) : d_(std::move(decoder)) {}

  // out [wanted][hidden] float, after the final norm. `own` is the K,V of one layer, used by all in turn.
  void run(const Step& step, const KvMemory& cache, const KvLayer& own, float* out);

  // Throws std::invalid_argument unless the step's ids are the model's and K,V of this shape are.
  void require(const Step& step, const KvShape& kv, int64_t layers) const;

  int64_t hidden() const { return d_.hidden; }
  size_t bytes_held() const;

 private:
  const Acts& prepared(ActKind kind, const float* x, int64_t ldx, int64_t rows, int64_t k, const float* norm);
  void attend(const Layer& layer, const Step& step, const KvLayer& cache, const KvLayer& own, float* qkv);

  Decoder d_;
  Buffer x_, qkv_, mixed_, cos_, sin_, h_, tail_;
  std::array<Buffer, 4> acts_;  // by ActKind
  std::array<Acts, 4> at_{};
  Buffer next_;
  std::vector<int64_t> ids_;
};

}  // namespace dfk
