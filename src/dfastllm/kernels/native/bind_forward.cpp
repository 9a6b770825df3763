// Binding of the whole forward pass. Addresses are integers; the caller keeps the memory alive as long as the object.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "bind_step.h"
#include "forward.h"
#include "gil.h"

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
          // out: float32 [wanted, hidden].
          [](Forward& self, const BoundStep& bound, const BoundKv& cache, const BoundKv& own, AnyArray out) {
            const Step& step = bound.step;
            require_kv(step, cache, own);
            self.require(step, cache.shape, cache.layers);
            float* const to = array_of<float>(out, "out", "float32", {step.wanted, self.hidden()});
            KvMemory memory{cache.layer(0), 0, 0};
            if (cache.layers > 1) {
              const KvLayer next = cache.layer(1);
              memory.stride = static_cast<char*>(next.k) - static_cast<char*>(memory.first.k);
              memory.scale_stride = next.k_scales - memory.first.k_scales;
            }
            dfk::Unlocked unlocked;
            self.run(step, memory, own.layer(0), to);
          })
      .def_prop_ro("bytes_held", &Forward::bytes_held);
}
