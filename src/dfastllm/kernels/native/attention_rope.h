// One row: norms of q and k, rotation, K,V into the cache.
#pragma once

#include <cmath>
#include <cstdint>

#include "attention.h"
#include "attention_walk.h"
#include "simd.h"

namespace dfk::DFK_ISA::spans {

// x <- x / sqrt(mean(x^2) + eps) * weight
inline void head_norm(float* x, const float* weight, float eps, int64_t dim) {
  Floats16 squares = floats16(0.0f);  // the sum per dim % 16
  int64_t i = 0;
  for (; i + 16 <= dim; i += 16) squares = multiply_add(load(x + i), load(x + i), squares);
  float lanes[16];
  store(lanes, squares);
  for (int j = 0; i + j < dim; ++j) lanes[j] += x[i + j] * x[i + j];
  const float inverse = 1.0f / std::sqrt(total(load(lanes)) / static_cast<float>(dim) + eps);
  for (i = 0; i < dim; ++i) x[i] = x[i] * inverse * weight[i];
}

// Pairs (i, i + rotary / 2) by the angle whose cosine and sine are given.
inline void rotate(float* x, const float* cos, const float* sin, int64_t rotary) {
  const int64_t half = rotary / 2;
  for (int64_t i = 0; i < half; i += 16) {
    const int64_t left = half - i;
    const Floats16 a = load_up_to(x + i, left), b = load_up_to(x + half + i, left);
    const Floats16 c = load_up_to(cos + i, left), s = load_up_to(sin + i, left);
    store_up_to(x + i, a * c - b * s, left);
    store_up_to(x + half + i, b * c + a * s, left);
  }
}

inline void put(const float* x, int64_t dim, int64_t step, float* to, float*) {
  for (int64_t d = 0; d < dim; ++d) to[d * step] = x[d];
}

inline void put(const float* x, int64_t dim, int64_t step, uint16_t* to, float*) {
  for (int64_t d = 0; d < dim; ++d) to[d * step] = to_bf16(x[d]);
}

// Codes -127 to 127 with one scale, max |x| / 127. Values that are not finite make the scale NaN, so they are not lost.
inline void put(const float* x, int64_t dim, int64_t step, int8_t* to, float* scale) {
  float most = 0.0f, zero = 0.0f;
  for (int64_t d = 0; d < dim; ++d) {
    const float size = x[d] < 0.0f ? -x[d] : x[d];
    most = size > most ? size : most;
    zero += x[d] * 0.0f;
  }
  *scale = most / 127.0f + zero;
  const float inverse = *scale > 0.0f ? 1.0f / *scale : 0.0f;
  for (int64_t d = 0; d < dim; ++d) {
    // Nearest, ties to even, by the end of a float's precision. A denormal scale has an infinite or rough inverse.
    float code = zero == 0.0f ? x[d] * inverse : 0.0f;
    code = code > 127.0f ? 127.0f : code < -127.0f ? -127.0f : code == code ? code : 0.0f;
    to[d * step] = static_cast<int8_t>(static_cast<int>((code + 12582912.0f) - 12582912.0f));
  }
}

// One head's k and v into slot `slot` of a layer: K [block][kv_heads][dim][16], V [block][kv_heads][16][dim].
template <class T>
void put_head(const float* k, const float* v, const KvShape& shape, const KvLayer& layer, int64_t slot, int64_t head) {
  const int64_t base = slot / kBlock * shape.kv_heads + head, at = slot % kBlock, dim = shape.dim;
  float* ks = sizeof(T) == 1 ? layer.k_scales + base * kBlock + at : nullptr;
  float* vs = sizeof(T) == 1 ? layer.v_scales + base * kBlock + at : nullptr;
  put(k, dim, kBlock, static_cast<T*>(layer.k) + base * dim * kBlock + at, ks);
  put(v, dim, 1, static_cast<T*>(layer.v) + base * dim * kBlock + at * dim, vs);
}

inline void put_any(const float* k, const float* v, const KvShape& shape, const KvLayer& layer, int64_t slot, int64_t head) {
  switch (shape.type) {
    case KvType::f32: return put_head<float>(k, v, shape, layer, slot, head);
    case KvType::bf16: return put_head<uint16_t>(k, v, shape, layer, slot, head);
    case KvType::i8: return put_head<int8_t>(k, v, shape, layer, slot, head);
  }
}

inline void rope_store_row(const RopeStore& a, int64_t row) {
  const int64_t dim = a.shape.dim;
  float* q = a.qkv + row * a.stride;
  float* k = q + a.heads * dim;
  const float* v = k + a.shape.kv_heads * dim;
  const float* cos = a.cos + row * (a.rotary / 2);
  const float* sin = a.sin + row * (a.rotary / 2);
  for (int64_t i = 0; a.q_norm != nullptr && i < a.heads * dim; i += a.q_size) head_norm(q + i, a.q_norm, a.eps, a.q_size);
  for (int64_t i = 0; a.k_norm != nullptr && i < a.shape.kv_heads * dim; i += a.k_size) {
    head_norm(k + i, a.k_norm, a.eps, a.k_size);
  }
  for (int64_t head = 0; head < a.heads; ++head) {
    rotate(q + head * dim, cos, sin, a.rotary);
  }
  for (int64_t head = 0; head < a.shape.kv_heads; ++head) {
    rotate(k + head * dim, cos, sin, a.rotary);
    if (a.slot[row] >= 0) put_any(k + head * dim, v + head * dim, a.shape, a.cache, a.slot[row], head);
    if (a.own_slot[row] >= 0) put_any(k + head * dim, v + head * dim, a.shape, a.own, a.own_slot[row], head);
  }
}

}  // namespace dfk::DFK_ISA::spans
