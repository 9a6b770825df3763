// Sequences with stored keys and values, rows that attend to them, and the calls over both.
#pragma once

#include <cstdint>
#include <vector>

#include "attention.h"
#include "numbers.h"

namespace driver {

struct SpanShape {
  int64_t rows, cached, own;  // own: 0, or `rows` (each row's key is one of its own keys)
  bool causal, masked;
};

struct SceneShape {
  dfk::KvShape kv;
  int64_t heads;
  int64_t rotary;
  int64_t q_norm = 0, k_norm = 0;  // dims that a norm goes over, 0: none
  int64_t window = 0;              // 0: none
  float softcap = 0.0f;
  std::vector<SpanShape> spans;
};

class Scene {
 public:
  Scene(SceneShape shape, Numbers& numbers);

  // Rotates, stores the cached keys and the rows' own ones.
  void store();
  // out [rows()][heads * dim]
  void attend(float* out) { dfk::attention(attention(out)); }
  dfk::Attention attention(float* out) const;

  int64_t rows() const { return rows_; }
  int64_t width() const { return shape.heads * shape.kv.dim; }
  int64_t stride() const { return (shape.heads + 2 * shape.kv.kv_heads) * shape.kv.dim; }

  SceneShape shape;
  Array<float> qkv;  // first the rows that only fill the cache, then the spans'
  Array<char> k, v, own_k, own_v;
  Array<float> k_scales, v_scales, own_k_scales, own_v_scales;

 private:
  void lay_out(Numbers& numbers);
  void fill_limits();
  dfk::KvLayer cache() const { return {k.data(), v.data(), k_scales.or_null(), v_scales.or_null()}; }
  dfk::KvLayer own() const { return {own_k.data(), own_v.data(), own_k_scales.or_null(), own_v_scales.or_null()}; }

  int64_t filling_ = 0, rows_ = 0;
  Array<float> q_norm_, k_norm_, cos_, sin_;
  std::vector<int32_t> slot_, own_slot_, position_;
  std::vector<std::vector<int32_t>> blocks_, own_blocks_;
  std::vector<Array<uint8_t>> masks_;
  std::vector<dfk::SpanKeys> spans_;
  std::vector<int32_t> cached_limit_, own_limit_, cached_from_, own_from_;
};

}  // namespace driver
