// Binding of the whole forward pass. Addresses are integers; the caller keeps the memory alive as long as the object.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "gil.h"
#include "forward.h"

namespace nb = nanobind;
using namespace dfk;

namespace {

using Address = uintptr_t;
// format, n, k, data, scales, mins, bias
using LinearTuple = std::tuple<int, int64_t, int64_t, Address, Address, Address, Address>;
// attn_norm, mlp_norm, q_norm, k_norm, qkv, o, gate_up, down
using LayerTuple = std::tuple<Address, Address, Address, Address, std::vector<LinearTuple>, LinearTuple, LinearTuple, LinearTuple>;

template <class T>
const T* at(Address address) {
  return reinterpret_cast<const T*>(address);
}

Linear linear_of(const LinearTuple& t) {
  return {static_cast<Format>(std::get<0>(t)), std::get<1>(t),          std::get<2>(t),      at<void>(std::get<3>(t)),
          at<void>(std::get<4>(t)),            at<uint16_t>(std::get<5>(t)), at<float>(std::get<6>(t))};
}

Layer layer_of(const LayerTuple& t) {
  Layer out{};
  out.attn_norm = at<float>(std::get<0>(t));
  out.mlp_norm = at<float>(std::get<1>(t));
  out.q_norm = at<float>(std::get<2>(t));
  out.k_norm = at<float>(std::get<3>(t));
  for (const LinearTuple& part : std::get<4>(t)) out.qkv.push_back(linear_of(part));
  out.o = linear_of(std::get<5>(t));
  out.gate_up = linear_of(std::get<6>(t));
  out.down = linear_of(std::get<7>(t));
  return out;
}

}  // namespace

void bind_forward(nb::module_& m) {
  nb::class_<Forward>(m, "Forward")
      .def(
          "__init__",
          [](Forward* self, int64_t hidden, int64_t heads, int64_t kv_heads, int64_t dim, int64_t rotary, float eps,
             float rope_factor, Address frequencies, int kv_type, const LinearTuple& embed, Address norm,
             const std::vector<LayerTuple>& layers) {
            Decoder d{hidden, heads, dim, rotary, eps, rope_factor, at<float>(frequencies),
                      KvShape{static_cast<KvType>(kv_type), kv_heads, dim}, linear_of(embed), at<float>(norm), {}};
            for (const LayerTuple& layer : layers) d.layers.push_back(layer_of(layer));
            new (self) Forward(std::move(d));
          },
          nb::kw_only(), nb::arg("hidden"), nb::arg("heads"), nb::arg("kv_heads"), nb::arg("dim"), nb::arg("rotary"),
          nb::arg("eps"), nb::arg("rope_factor"), nb::arg("frequencies"), nb::arg("kv_type"), nb::arg("embed"),
          nb::arg("norm"), nb::arg("layers"))
      .def(
          "run",
          // spans: [count][6] int32: row0, row1, cached, own, first of its entries in blocks and in own_blocks;
          // masks: [count] int64 offsets into mask, or below 0 for none.
          [](Forward& self, int64_t rows, Address ids, Address positions, Address slot, Address own_slot,
             int64_t span_count, Address spans, Address blocks, Address own_blocks, Address mask_at, Address mask,
             Address cached_limit, Address own_limit, int64_t wanted, Address want, Address k, Address v,
             Address k_scales, Address v_scales, int64_t stride, int64_t scale_stride, Address own_k, Address own_v,
             Address own_k_scales, Address own_v_scales, Address out) {
            dfk::Unlocked unlocked;
            std::vector<SpanKeys> keys(static_cast<size_t>(span_count));
            for (int64_t i = 0; i < span_count; ++i) {
              const int32_t* s = at<int32_t>(spans) + 6 * i;
              const int64_t offset = mask_at == 0 ? -1 : at<int64_t>(mask_at)[i];
              keys[static_cast<size_t>(i)] = {s[0], s[1], s[2], s[3], at<int32_t>(blocks) + s[4],
                                              at<int32_t>(own_blocks) + s[5],
                                              offset < 0 ? nullptr : at<uint8_t>(mask) + offset};
            }
            const Step step{rows, at<int64_t>(ids), at<int64_t>(positions), at<int32_t>(slot), at<int32_t>(own_slot),
                            span_count, keys.data(), at<int32_t>(cached_limit), at<int32_t>(own_limit),
                            wanted, at<int64_t>(want)};
            const auto layer = [](Address a, Address b, Address c, Address d) {
              return KvLayer{reinterpret_cast<void*>(a), reinterpret_cast<void*>(b), reinterpret_cast<float*>(c),
                             reinterpret_cast<float*>(d)};
            };
            self.run(step, KvMemory{layer(k, v, k_scales, v_scales), stride, scale_stride},
                     layer(own_k, own_v, own_k_scales, own_v_scales), reinterpret_cast<float*>(out));
          })
      .def_prop_ro("bytes_held", &Forward::bytes_held);
}
