// Bindings of rotary positions, K,V writes and attention one by one: what tests and benchmarks call. A forward pass calls
// them itself.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>

#include "bind_step.h"
#include "bind_gil.h"

namespace nb = nanobind;
using namespace dfk;

namespace {

// Rows [rows][stride] of floats, of which the first `width` are looked at.
float* rows_of(const AnyArray& a, const char* name, int64_t rows, int64_t width) {
  const bool fits = a.dtype() == nb::dtype<float>() && a.ndim() == 2 && a.device_type() == nb::device::cpu::value &&
                    static_cast<int64_t>(a.shape(0)) == rows && static_cast<int64_t>(a.shape(1)) >= width &&
                    (a.stride(1) == 1 || a.size() == 0) && (rows <= 1 || a.stride(0) >= width);
  if (!fits) {
    throw std::invalid_argument(std::string(name) + " must be float32 [" + std::to_string(rows) + ", " +
                                std::to_string(width) + " or more] on the CPU with columns side by side.");
  }
  return static_cast<float*>(a.data());
}

// A norm of every head, or of all heads at once.
const float* norm_of(const std::optional<AnyArray>& a, const char* name, int64_t heads, int64_t dim, int64_t& size) {
  size = dim;
  if (!a) return nullptr;
  if (a->ndim() == 1 && static_cast<int64_t>(a->shape(0)) == heads * dim) size = heads * dim;
  return array_of<float>(*a, name, "float32", {size});
}

// What rope_store and attention both take: rows of `array`, of `width` heads each, and layer 0 of the K,V.
template <class Arguments>
Arguments begin(const Step& step, int64_t heads, const BoundKv& cache, const BoundKv* own, const AnyArray& array,
                const char* name, int64_t width, float*& rows) {
  if (heads < 1 || heads % cache.shape.kv_heads != 0) {
    throw std::invalid_argument("heads must be a multiple of the " + std::to_string(cache.shape.kv_heads) +
                                " K,V heads, got " + std::to_string(heads) + ".");
  }
  Arguments a{};
  rows = rows_of(array, name, step.rows, width * cache.shape.dim);
  a.rows = step.rows;
  a.stride = step.rows > 1 ? array.stride(0) : static_cast<int64_t>(array.shape(1));
  a.heads = heads;
  a.shape = cache.shape;
  if (own != nullptr) require_kv(step, cache, *own);
  else require_blocks(step, cache.blocks, 0);
  a.cache = cache.layer(0);
  if (own != nullptr) a.own = own->layer(0);
  return a;
}

}  // namespace

void bind_attention(nb::module_& m) {
  m.def(
      "rope_store",
      [](const AnyArray& qkv, int64_t heads, const std::optional<AnyArray>& q_norm, const std::optional<AnyArray>& k_norm,
         float eps, const AnyArray& cos, const AnyArray& sin, const BoundKv& cache, const BoundKv* own,
         const BoundStep& bound) {
        const Step& step = bound.step;
        float* rows = nullptr;
        auto a = begin<RopeStore>(step, heads, cache, own, qkv, "qkv", heads + 2 * cache.shape.kv_heads, rows);
        a.qkv = rows;
        a.q_norm = norm_of(q_norm, "q_norm", heads, a.shape.dim, a.q_size);
        a.k_norm = norm_of(k_norm, "k_norm", a.shape.kv_heads, a.shape.dim, a.k_size);
        a.eps = eps;
        const int64_t half = cos.ndim() == 2 ? static_cast<int64_t>(cos.shape(1)) : 0;
        a.cos = array_of<float>(cos, "cos", "float32", {step.rows, half});
        a.sin = array_of<float>(sin, "sin", "float32", {step.rows, half});
        a.rotary = 2 * half;
        if (a.rotary > a.shape.dim) {
          throw std::invalid_argument(std::to_string(a.rotary) + " rotary dims do not fit into heads of " +
                                      std::to_string(a.shape.dim) + ".");
        }
        a.slot = step.slot;
        a.own_slot = step.own_slot;
        dfk::Unlocked unlocked;
        rope_store(a);
      },
      nb::arg("qkv"), nb::arg("heads"), nb::arg("q_norm").none(), nb::arg("k_norm").none(), nb::arg("eps"),
      nb::arg("cos"), nb::arg("sin"), nb::arg("cache"), nb::arg("own").none(), nb::arg("step"));
  m.def(
      "attention",
      [](const AnyArray& q, int64_t heads, float scale, const BoundKv& cache, const BoundKv* own, const BoundStep& bound,
         const AnyArray& out, int64_t window, float softcap) {
        const Step& step = bound.step;
        float* rows = nullptr;
        auto a = begin<Attention>(step, heads, cache, own, q, "q", heads, rows);
        a.q = rows;
        a.scale = scale;
        a.spans = step.spans.data();
        a.span_count = static_cast<int64_t>(step.spans.size());
        a.cached_limit = step.cached_limit;
        a.own_limit = step.own_limit;
        a.softcap = softcap;
        std::vector<int32_t> from(window > 0 ? static_cast<size_t>(2 * step.rows) : 0);
        if (window > 0) {
          a.cached_from = from.data();
          a.own_from = from.data() + step.rows;
          window_from(a.spans, a.span_count, step.positions, window, from.data(), from.data() + step.rows);
        }
        a.out = array_of<float>(out, "out", "float32", {step.rows, heads * a.shape.dim});
        dfk::Unlocked unlocked;
        attention(a);
      },
      nb::arg("q"), nb::arg("heads"), nb::arg("scale"), nb::arg("cache"), nb::arg("own").none(), nb::arg("step"),
      nb::arg("out"), nb::arg("window") = 0, nb::arg("softcap") = 0.0f);
}
