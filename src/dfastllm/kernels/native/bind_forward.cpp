// Binding of the whole forward pass: a model is made op by op of arrays that are checked here and kept alive.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bind_adapter.h"
#include "bind_step.h"
#include "forward.h"
#include "bind_gil.h"

namespace nb = nanobind;
using namespace dfk;

namespace {

using MaybeArray = std::optional<AnyArray>;

constexpr const char* kFormats[] = {"f32", "bf16", "w8", "w8g", "w4g", "w6g", "w4s"};
constexpr const char* kKinds[] = {"f32", "bf16", "row8", "group8"};
constexpr const char* kActivations[] = {"silu", "gelu_tanh"};

// The number of a name in its enumeration.
template <class E, size_t N>
E named(const char* const (&names)[N], const std::string& name, const char* what) {
  for (size_t i = 0; i < N; ++i) {
    if (name == names[i]) return static_cast<E>(i);
  }
  throw std::invalid_argument(std::string("there is no ") + what + " '" + name + "' in the native forward.");
}

// A packed matrix and its bias, sizes as kernels/packed.py has them.
struct BoundLinear {
  BoundLinear(const std::string& format_name, int64_t n, int64_t k, AnyArray data, MaybeArray scales, MaybeArray mins,
              MaybeArray bias) {
    linear.format = named<Format>(kFormats, format_name, "format");
    linear.n = n;
    linear.k = k;
    const int64_t rows = round_up(n, kPanel), groups = linear.format == Format::w6g ? k / 16 : k / 32;
    nb::dlpack::dtype type = nb::dtype<uint8_t>();
    int64_t size = 0, sides = rows * groups;
    bool scaled = true;
    switch (linear.format) {
      case Format::f32: size = rows * k, type = nb::dtype<float>(), scaled = false; break;
      case Format::bf16:
        size = rows * round_up(k, 2), scaled = false;
        type = {static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1};
        break;
      case Format::w8: size = rows * round_up(k, 4), sides = rows; break;
      case Format::w8g: size = rows * k; break;
      case Format::w4g: size = rows * k / 2; break;
      case Format::w6g: size = rows * k / 4 * 3; break;
      case Format::w4s: size = rows / kPanel * (k / 32) * kSteppedBytes, sides = rows; break;
    }
    require_array(data, "a packed weight", type, "its format's type", {size});
    linear.data = data.data();
    held.push_back(std::move(data));
    if (scaled != scales.has_value()) throw std::invalid_argument("quantised weights have scales, others none.");
    if (scaled) {
      if (act_kind(linear.format) == ActKind::row8) require_array(*scales, "scales", nb::dtype<float>(), "float32", {sides});
      else require_array(*scales, "scales", half(), "float16", {sides});
      linear.scales = keep(scales);
    }
    if (mins) {
      if (linear.format != Format::w4g && linear.format != Format::w6g) throw std::invalid_argument("minima need w4g or w6g.");
      require_array(*mins, "minima", half(), "float16", {sides});
      linear.mins = static_cast<const uint16_t*>(keep(mins));
    }
    if (bias) {
      require_array(*bias, "a bias", nb::dtype<float>(), "float32", {n});
      linear.bias = static_cast<const float*>(keep(bias));
    }
  }

  Linear linear{};
  std::vector<AnyArray> held;

 private:
  static nb::dlpack::dtype half() { return {static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 16, 1}; }
  const void* keep(MaybeArray& array) {
    held.push_back(std::move(*array));
    return held.back().data();
  }
};

struct BoundForward : Forward {
  using Forward::Forward;
  std::vector<AnyArray> held;
  std::vector<nb::object> adapters;  // what the table points to

  Linear take(const BoundLinear& linear) {
    held.insert(held.end(), linear.held.begin(), linear.held.end());
    return linear.linear;
  }
  Norm take(const MaybeArray& weight, float eps) {
    if (!weight) return {};
    Norm out{array_of<float>(*weight, "a norm", "float32", {-1}), static_cast<int64_t>(weight->shape(0)), eps};
    held.push_back(*weight);
    return out;
  }
};

}  // namespace

void bind_forward(nb::module_& m) {
  nb::class_<BoundLinear>(m, "Linear")
      .def(nb::init<const std::string&, int64_t, int64_t, AnyArray, MaybeArray, MaybeArray, MaybeArray>(), nb::arg("format"),
           nb::arg("n"), nb::arg("k"), nb::arg("data"), nb::arg("scales").none(), nb::arg("mins").none(),
           nb::arg("bias").none());
  nb::class_<BoundForward>(m, "Forward")
      .def(
          "__init__",
          [](BoundForward* self, int64_t hidden, int64_t heads, int64_t kv_heads, int64_t dim, int kv_type,
             const BoundLinear& embed, float embed_factor, const AnyArray& norm, float eps) {
            Decoder d{hidden, heads, {static_cast<KvType>(kv_type), kv_heads, dim}, {}, embed_factor, {}, {}, {}};
            if (heads < 1 || kv_heads < 1 || heads % kv_heads != 0 || embed.linear.k != hidden) {
              throw std::invalid_argument("the heads or the embedding do not fit.");
            }
            d.embed = embed.linear;
            d.norm = {array_of<float>(norm, "the final norm", "float32", {hidden}), hidden, eps};
            new (self) BoundForward(std::move(d));
            self->take(embed);
            self->held.push_back(norm);
          },
          nb::kw_only(), nb::arg("hidden"), nb::arg("heads"), nb::arg("kv_heads"), nb::arg("dim"), nb::arg("kv_type"),
          nb::arg("embed"), nb::arg("embed_factor"), nb::arg("norm"), nb::arg("eps"))
      .def("add_rope",
           [](BoundForward& self, const AnyArray& frequencies, float factor) {
             const float* const at = array_of<float>(frequencies, "frequencies", "float32", {-1});
             self.add(RopeTable{{at, at + frequencies.shape(0)}, factor});
           })
      .def("begin_layer", &BoundForward::begin_layer)
      .def(
          "project",
          [](BoundForward& self, const std::vector<BoundLinear*>& linears, const MaybeArray& norm, float eps, bool onto_stream) {
            Project op{{}, self.take(norm, eps), onto_stream};
            for (const BoundLinear* linear : linears) op.linears.push_back(self.take(*linear));
            self.add(std::move(op));
          },
          nb::arg("linears"), nb::arg("norm").none(), nb::arg("eps"), nb::arg("onto_stream"))
      .def(
          "gated",
          [](BoundForward& self, const BoundLinear& linear, const MaybeArray& norm, float eps, const std::string& activation,
             int64_t width, const std::string& kind, int64_t block) {
            self.add(Gated{self.take(linear), self.take(norm, eps), named<Activation>(kActivations, activation, "activation"),
                           width, named<ActKind>(kKinds, kind, "kind of rows"), block});
          },
          nb::arg("linear"), nb::arg("norm").none(), nb::arg("eps"), nb::arg("activation"), nb::arg("width"), nb::arg("kind"),
          nb::arg("block"))
      .def(
          "mix",
          [](BoundForward& self, const MaybeArray& q_norm, const MaybeArray& k_norm, float eps, int64_t table, float scale,
             int64_t window, float softcap) {
            self.add(Mix{self.take(q_norm, eps), self.take(k_norm, eps), table, scale, softcap, window});
          },
          nb::arg("q_norm").none(), nb::arg("k_norm").none(), nb::arg("eps"), nb::arg("table"), nb::arg("scale"),
          nb::arg("window"), nb::arg("softcap"))
      .def(
          "normalise",
          [](BoundForward& self, const MaybeArray& norm, float eps) { self.add(Normalise{self.take(norm, eps)}); },
          nb::arg("norm").none(), nb::arg("eps"))
      .def(
          "experts",
          // router: float32, bfloat16 or float16 [experts, hidden]; bias: of a sigmoid router. experts, shared: (gate with
          // up, down), alternating.
          [](BoundForward& self, const AnyArray& router, const MaybeArray& bias, int64_t top_k, int64_t groups,
             int64_t groups_kept, bool normalise, float scale, const std::vector<BoundLinear*>& experts, int64_t width,
             int64_t block, const std::vector<BoundLinear*>& shared, int64_t shared_width, int64_t shared_block,
             const MaybeArray& norm, float eps, bool onto_stream) {
            require_array(router, "a router", router.dtype(), "its own type", {-1, self.hidden()});
            const int64_t count = static_cast<int64_t>(router.shape(0));
            Experts op{self.take(norm, eps), {}, onto_stream};
            Mixture& m = op.mixture;
            m.router = {element_of(router, "a router"), router.data(), nullptr, count, top_k, groups, groups_kept, normalise, scale};
            self.held.push_back(router);
            if (bias) {
              m.router.bias = array_of<float>(*bias, "a router's bias", "float32", {count});
              self.held.push_back(*bias);
            }
            m.width = width;
            m.block = block;
            m.shared_width = shared_width;
            m.shared_block = shared_block;
            const auto pair_up = [&self](const std::vector<BoundLinear*>& from, std::vector<FeedForward>& to) {
              for (size_t i = 0; i + 1 < from.size(); i += 2) to.push_back({self.take(*from[i]), self.take(*from[i + 1])});
            };
            pair_up(experts, m.experts);
            pair_up(shared, m.shared);
            self.add(std::move(op));
          },
          nb::kw_only(), nb::arg("router"), nb::arg("bias").none(), nb::arg("top_k"), nb::arg("groups"), nb::arg("groups_kept"),
          nb::arg("normalise"), nb::arg("scale"), nb::arg("experts"), nb::arg("width"), nb::arg("block"), nb::arg("shared"),
          nb::arg("shared_width"), nb::arg("shared_block"),
          nb::arg("norm").none(), nb::arg("eps"), nb::arg("onto_stream"))
      .def("sum", [](BoundForward& self, float factor) { self.add(Sum{factor}); })
      .def("set_adapters",
           // table: Adapter or None by number, None first.
           [](BoundForward& self, std::vector<nb::object> table) {
             std::vector<const Adapter*> at;
             for (const nb::object& one : table) at.push_back(one.is_none() ? nullptr : nb::cast<const BoundAdapter*>(one));
             self.set_adapters(std::move(at));
             self.adapters = std::move(table);
           })
      .def(
          "run",
          // out: float32 [wanted, hidden]. halt: int64 [2], see kernels/halt.py; false: the run was given up.
          [](BoundForward& self, const BoundStep& bound, const BoundKv& cache, const BoundKv& own, AnyArray out, const MaybeArray& halt) {
            const Step& step = bound.step;
            require_kv(step, cache, own);
            self.require(step, cache);
            float* const to = array_of<float>(out, "out", "float32", {step.wanted, self.hidden()});
            const int64_t* const words = halt ? array_of<int64_t>(*halt, "halt", "int64", {2}) : nullptr;
            dfk::Unlocked unlocked;
            return self.run(step, cache, own.layer(0), to, words);
          },
          nb::arg("step"), nb::arg("cache"), nb::arg("own"), nb::arg("out"), nb::arg("halt").none() = nb::none())
      .def_prop_ro("bytes_held", &BoundForward::bytes_held);
}
