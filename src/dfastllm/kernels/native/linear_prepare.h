// Activations of one row: RMSNorm, quantisation, silu.
//
// kernels/linear_plain.py states the rules of quantisation. A scale of NaN, where a row is not finite, makes the products
// NaN, so that they are noticed.
// Over 32 inputs the scale is rounded up to the next of {1, 1.25, 1.5, 1.75} x 2^n, which tiles can multiply with
// without the units of the dot products, for a tenth of a bit of precision on average.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "linear.h"
#include "simd.h"

namespace dfk::DFK_ISA {

struct Quantiser { float scale, inverse; };

inline Quantiser quantiser(int32_t amax_bits) {
  float amax;
  std::memcpy(&amax, &amax_bits, sizeof amax);
  if (amax_bits >= kInfinityBits) return {std::numeric_limits<float>::quiet_NaN(), 0.0f};
  if (amax < 0x1p-100f) return {0.0f, 0.0f};
  return {amax / 127.0f, 127.0f / amax};
}

// A row as the linear sees it: x, or x * factor * norm. Beyond k: zero.
struct NormedRow {
  const float* x;
  const float* norm;
  float factor;
  int64_t k;
  Floats16 at(int64_t i) const {
    const int64_t left = k - i;
    if (left <= 0) return floats16(0.0f);
    const Floats16 v = load_up_to(x + i, left);
    return norm ? (v * floats16(factor)) * load_up_to(norm + i, left) : v;
  }
};

// 1 / sqrt(mean(x^2) + eps). Four running sums of 16 lanes; the order depends on k alone.
inline float rms_factor(const float* x, int64_t k, float eps) {
  Floats16 sums[4] = {floats16(0.0f), floats16(0.0f), floats16(0.0f), floats16(0.0f)};
  int64_t i = 0;
  for (; i + 64 <= k; i += 64) {
    for (int j = 0; j < 4; ++j) {
      const Floats16 v = load(x + i + 16 * j);
      sums[j] = sums[j] + v * v;
    }
  }
  for (int j = 0; i < k; i += 16, ++j) {
    const Floats16 v = load_up_to(x + i, k - i);
    sums[j] = sums[j] + v * v;
  }
  const float mean = total((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<float>(k);
  return 1.0f / std::sqrt(mean + eps);
}

// 16 values -> codes at p. What lies in x must not exceed the quantiser's amax. A NaN times 0 (a group that is not
// finite) would convert to garbage: the inverse 0 is applied as a mask.
inline void quantise_16(Floats16 x, Quantiser q, int8_t* p) {
  const Ints16 codes = to_int(round_even(x * floats16(q.inverse)));
  store8(p, q.inverse == 0.0f ? ints16(0) : codes);
}

// The least of {1, 1.25, 1.5, 1.75} x 2^n that is at least amax / 127 as the scale.
inline Quantiser group_quantiser(int32_t amax_bits) {
  Quantiser q = quantiser(amax_bits);
  if (!(q.scale > 0.0f)) return q;
  int32_t raw;
  std::memcpy(&raw, &q.scale, sizeof raw);
  raw = (raw + 0x1fffff) & ~0x1fffff;  // two bits of the fraction, rounded up
  std::memcpy(&q.scale, &raw, sizeof raw);
  q.inverse = 1.0f / q.scale;
  return q;
}

inline void bf16_16(Floats16 x, uint16_t* p) {
  const Ints16 raw = bits(x);
  const Ints16 rounded = raw + ints16(0x7fff) + (shift_right<16>(raw) & ints16(1));
  const Ints16 nan = ints16(0x7fc00000);
  store16(p, shift_right<16>(where_greater(abs_bits(x), ints16(kInfinityBits), nan, rounded)));
}

// Two registers of a row into columns [column, column + 32).
inline void put_32(Floats16 a, Floats16 b, const Acts& out, int64_t row, int64_t column) {
  const int64_t at = row * out.stride + column;
  if (out.kind == ActKind::f32) {
    float* p = static_cast<float*>(out.data) + at;
    store(p, a);
    store(p + 16, b);
  } else if (out.kind == ActKind::bf16) {
    uint16_t* p = static_cast<uint16_t*>(out.data) + at;
    bf16_16(a, p);
    bf16_16(b, p + 16);
  } else {
    int8_t* p = static_cast<int8_t*>(out.data) + at;
    const Quantiser q = group_quantiser(highest(max(abs_bits(a), abs_bits(b))));
    quantise_16(a, q, p);
    quantise_16(b, q, p + 16);
    out.scales[at / 32] = q.scale;  // stride is a multiple of 32
    out.sums[at / 16] = sum_16(p);
    out.sums[at / 16 + 1] = sum_16(p + 16);
  }
}

inline void prepare_32(const float* x, const Acts& out, int64_t row, int64_t column) {
  put_32(load(x), load(x + 16), out, row, column);
}

inline void prepare_row(const float* x, const float* norm, float eps, const Acts& out, int64_t row) {
  const NormedRow in{x, norm, norm ? rms_factor(x, out.k, eps) : 1.0f, out.k};
  if (out.kind == ActKind::f32) {  // a plain matrix will do too: any stride from k on
    float* to = static_cast<float*>(out.data) + row * out.stride;
    for (int64_t i = 0; i < out.stride; i += 16) store_up_to(to + i, in.at(i), out.stride - i);
    return;
  }
  if (out.kind != ActKind::row8) {
    for (int64_t i = 0; i < out.stride; i += 32) put_32(in.at(i), in.at(i + 16), out, row, i);
    return;
  }
  Ints16 amax = ints16(0);
  for (int64_t i = 0; i < out.k; i += 16) amax = max(amax, abs_bits(in.at(i)));
  const Quantiser q = quantiser(highest(amax));
  int8_t* codes = static_cast<int8_t*>(out.data) + row * out.stride;
  int32_t sum = 0;
  for (int64_t i = 0; i < out.stride; i += 16) {
    quantise_16(in.at(i), q, codes + i);
    sum += sum_16(codes + i);
  }
  out.scales[row] = q.scale;
  out.sums[row] = sum;
}

inline Floats16 silu_mul_16(Floats16 gate, Floats16 up) { return gate / (floats16(1.0f) + exp(floats16(0.0f) - gate)) * up; }

// gate / (1 + exp(-2 y)) * up, y = sqrt(2 / pi) (gate + 0.044715 gate^3)
inline Floats16 gelu_mul_16(Floats16 gate, Floats16 up) {
  const Floats16 y = gate + floats16(0.044715f) * gate * gate * gate;
  return gate / (floats16(1.0f) + exp(floats16(-1.59576912f) * y)) * up;
}

template <Floats16 (*f)(Floats16, Floats16)>
inline void gate_mul(const float* gate, const float* up, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) {
    store_up_to(out + i, f(load_up_to(gate + i, count - i), load_up_to(up + i, count - i)), count - i);
  }
}

// cap * tanh(x / cap), tanh by e^2x: its error is absolute, 1e-7 of the cap. What is not finite becomes NaN.
inline void softcap(float* x, int64_t count, float cap) {
  const Floats16 one = floats16(1.0f), twice = floats16(2.0f / cap);
  for (int64_t i = 0; i < count; i += 16) {
    const Floats16 v = load_up_to(x + i, count - i), e = exp(v * twice);
    store_up_to(x + i, floats16(cap) * ((e - one) / (e + one)) + v * floats16(0.0f), count - i);
  }
}

// A tile [rows][64] into y [rows][ldy]: channels of it, bias (or null) added, y += or y =.
inline void write_tile(const float* tile, int64_t rows, int64_t channels, const float* bias, float* y, int64_t ldy,
                       bool accumulate) {
  for (int64_t c = 0; c < channels; c += 16) {
    const int64_t left = channels - c;
    const Floats16 add = bias ? load_up_to(bias + c, left) : floats16(0.0f);
    for (int64_t r = 0; r < rows; ++r) {
      float* to = y + r * ldy + c;
      Floats16 v = load(tile + r * kPanel + c);
      if (bias) v = v + add;
      if (accumulate) v = load_up_to(to, left) + v;
      store_up_to(to, v, left);
    }
  }
}

}  // namespace dfk::DFK_ISA
