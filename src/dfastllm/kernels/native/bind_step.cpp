// Bindings of a step and of K,V: the objects that a forward takes. They keep the arrays they were made of alive.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>

#include "bind_step.h"

namespace nb = nanobind;
using namespace dfk;

namespace dfk {

BoundStep::BoundStep(AnyArray array)
    : words(std::move(array)),
      step(read_step(array_of<int32_t>(words, "a step", "int32", {-1}), static_cast<int64_t>(words.shape(0)))) {}

BoundKv::BoundKv(AnyArray k_array, AnyArray v_array, std::optional<AnyArray> k_scale_array, std::optional<AnyArray> v_scale_array)
    : k(std::move(k_array)), v(std::move(v_array)), k_scales(std::move(k_scale_array)), v_scales(std::move(v_scale_array)) {
  if (k.ndim() != 5) throw std::invalid_argument("K must be [layers, blocks, kv_heads, dim, 16].");
  const auto size = [this](size_t i) { return static_cast<int64_t>(k.shape(i)); };
  layers = size(0);
  blocks = size(1);
  shape.kv_heads = size(2);
  shape.dim = size(3);
  const nb::dlpack::dtype bf16{static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1};
  if (k.dtype() == nb::dtype<float>()) shape.type = KvType::f32;
  else if (k.dtype() == bf16) shape.type = KvType::bf16;
  else if (k.dtype() == nb::dtype<int8_t>()) shape.type = KvType::i8;
  else throw std::invalid_argument("K must be of float32, bfloat16 or int8.");
  const char* const name = shape.type == KvType::f32 ? "float32" : shape.type == KvType::bf16 ? "bfloat16" : "int8";
  require_array(k, "K", k.dtype(), name, {layers, blocks, shape.kv_heads, shape.dim, kBlock});
  require_array(v, "V", k.dtype(), name, {layers, blocks, shape.kv_heads, kBlock, shape.dim});
  const bool scaled = shape.type == KvType::i8;
  if (scaled != k_scales.has_value() || scaled != v_scales.has_value()) {
    throw std::invalid_argument("only int8 K,V have scales, and they must.");
  }
  first = {k.data(), v.data(), nullptr, nullptr};
  if (scaled) {
    const auto scales = {layers, blocks, shape.kv_heads, kBlock};
    first.k_scales = array_of<float>(*k_scales, "K scales", "float32", scales);
    first.v_scales = array_of<float>(*v_scales, "V scales", "float32", scales);
  }
}

void require_kv(const Step& step, const BoundKv& cache, const BoundKv& own) {
  if (!(own.shape == cache.shape)) {
    throw std::invalid_argument("the cache and the own K,V must have one type, kv_heads and dim.");
  }
  require_blocks(step, cache.blocks, own.blocks);
}

}  // namespace dfk

void bind_step(nb::module_& m) {
  nb::class_<BoundStep>(m, "Step").def(nb::init<AnyArray>(), nb::arg("words"));
  nb::class_<BoundKv>(m, "KvCache")
      .def(nb::init<AnyArray, AnyArray, std::optional<AnyArray>, std::optional<AnyArray>>(), nb::arg("k"), nb::arg("v"),
           nb::arg("k_scales").none(), nb::arg("v_scales").none());
}
