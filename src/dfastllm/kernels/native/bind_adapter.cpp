// Binding of adapters: made of arrays that are checked here and kept alive.
#include "bind_adapter.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "bind_gil.h"

namespace nb = nanobind;
using namespace dfk;

Element element_of(const AnyArray& a, const char* name) {
  if (a.dtype() == nb::dtype<float>()) return Element::f32;
  if (a.dtype().bits == 16 && a.dtype().code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat)) return Element::bf16;
  if (a.dtype().bits == 16 && a.dtype().code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float)) return Element::f16;
  throw std::invalid_argument(std::string(name) + " must be float32, bfloat16 or float16.");
}

namespace {

using MaybeArray = std::optional<AnyArray>;
using PlaceTuple = std::tuple<int64_t, int64_t, int64_t, int64_t>;  // first, count, column, stride

const void* keep(BoundAdapter& self, const AnyArray& a) {
  self.held.push_back(a);
  return a.data();
}

const float* keep_row(BoundAdapter& self, const MaybeArray& a, const char* name, int64_t n) {
  if (!a) return nullptr;
  array_of<float>(*a, name, "float32", {n});
  return static_cast<const float*>(keep(self, *a));
}

Delta delta_of(BoundAdapter& self, int64_t n, const MaybeArray& a, const MaybeArray& b, float scale, const MaybeArray& factor,
               const MaybeArray& shift, const std::vector<PlaceTuple>& places) {
  Delta d{Element::f32, 0, 0, n, nullptr, nullptr, scale, nullptr, nullptr, {}};
  if (a.has_value() != b.has_value()) throw std::invalid_argument("A and B of an adapter come together.");
  if (a) {
    d.type = element_of(*a, "A");
    require_array(*a, "A", a->dtype(), "its own type", {-1, -1});
    d.rank = static_cast<int64_t>(a->shape(0));
    d.k = static_cast<int64_t>(a->shape(1));
    require_array(*b, "B", a->dtype(), "A's type", {(n + kUnit - 1) / kUnit, d.rank, kUnit});
    d.a = keep(self, *a);
    d.b = keep(self, *b);
  }
  d.factor = keep_row(self, factor, "the factor", n);
  d.shift = keep_row(self, shift, "the shift", n);
  for (const auto& [first, count, column, stride] : places) d.places.push_back({first, count, column, stride});
  return d;
}

Full full_of(BoundAdapter& self, const AnyArray& rows) {
  const Element type = element_of(rows, "a matrix");
  require_array(rows, "a matrix", rows.dtype(), "its own type", {-1, -1});
  return {type, static_cast<int64_t>(rows.shape(0)), keep(self, rows)};
}

void by_tiles(const LowRank& work, float* y, int64_t rows, int64_t columns, int64_t step) {
  std::vector<float> tile(static_cast<size_t>(step * kPanel));
  for (int64_t row = 0; row < rows; row += step) {
    for (int64_t column = 0; column < columns; column += kPanel) {
      const int64_t here = std::min(step, rows - row), wide = std::min(kPanel, columns - column);
      const auto each_row = [&](auto copy) {
        for (int64_t r = 0; r < here; ++r) copy(tile.data() + r * kPanel, y + (row + r) * columns + column);
      };
      each_row([&](float* part, const float* from) { std::copy(from, from + wide, part); });
      work.fetch(column, row, here);
      work.add_to(tile.data(), column, row, here);
      each_row([&](const float* part, float* to) { std::copy(part, part + wide, to); });
    }
  }
}

}  // namespace

void bind_adapter(nb::module_& m) {
  nb::class_<BoundAdapter>(m, "Adapter")
      .def(
          "__init__", [](BoundAdapter* self, int64_t sites) { (new (self) BoundAdapter)->sites.resize(static_cast<size_t>(sites)); },
          nb::arg("sites"))
      .def(
          "add",
          [](BoundAdapter& self, int64_t site, int64_t n, const MaybeArray& a, const MaybeArray& b, float scale,
             const MaybeArray& factor, const MaybeArray& shift, const std::vector<PlaceTuple>& places) {
            self.sites.at(static_cast<size_t>(site)).push_back(delta_of(self, n, a, b, scale, factor, shift, places));
          },
          nb::arg("site"), nb::arg("n"), nb::arg("a").none(), nb::arg("b").none(), nb::arg("scale"), nb::arg("factor").none(),
          nb::arg("shift").none(), nb::arg("places"))
      .def(
          "embed",
          [](BoundAdapter& self, int64_t n, const MaybeArray& a, const MaybeArray& b, float scale, const MaybeArray& factor,
             const MaybeArray& shift, const MaybeArray& full) {
            self.embed.assign(1, delta_of(self, n, a, b, scale, factor, shift, {{0, n, 0, 32}}));
            if (full) self.embed_full = full_of(self, *full);
          },
          nb::arg("n"), nb::arg("a").none(), nb::arg("b").none(), nb::arg("scale"), nb::arg("factor").none(),
          nb::arg("shift").none(), nb::arg("full").none())
      .def(
          "head",
          [](BoundAdapter& self, int64_t n, const MaybeArray& a, const MaybeArray& b, float scale, const MaybeArray& factor,
             const MaybeArray& shift, const MaybeArray& full) {
            self.head.assign(1, delta_of(self, n, a, b, scale, factor, shift, {{0, n, 0, 32}}));
            if (full) self.head_full = full_of(self, *full);
          },
          nb::arg("n"), nb::arg("a").none(), nb::arg("b").none(), nb::arg("scale"), nb::arg("factor").none(),
          nb::arg("shift").none(), nb::arg("full").none())
      .def("logits",
           // hidden: float32 [rows, k]; logits: float32 [rows, vocab], the base's, changed in place.
           [](BoundAdapter& self, const AnyArray& hidden, const AnyArray& logits) {
             const float* const x = array_of<float>(hidden, "hidden", "float32", {-1, -1});
             const int64_t rows = static_cast<int64_t>(hidden.shape(0)), k = static_cast<int64_t>(hidden.shape(1));
             float* const y = array_of<float>(logits, "logits", "float32", {rows, -1});
             const int64_t vocab = static_cast<int64_t>(logits.shape(1));
             for (const Delta& d : self.head) {
               if (d.n > vocab || (d.rank > 0 && d.k != k)) throw std::invalid_argument("an adapter of another head.");
             }
             if (self.head_full.rows > vocab) throw std::invalid_argument("an adapter of another head.");
             dfk::Unlocked unlocked;
             adapt_head(self, x, k, rows, y, vocab);
           });
  // Rows `index` of y [rows, m] are changed in place by one adapter's sums at one site, of the same rows of x: all at once, or
  // tile by tile, `tile_rows` rows each, as a linear does it (index ascending).
  m.def("low_rank", [](const BoundAdapter& adapter, int64_t site, const AnyArray& x, const AnyArray& index, const AnyArray& y,
                       int64_t tile_rows) {
    const float* const from = array_of<float>(x, "x", "float32", {-1, -1});
    const int64_t rows = static_cast<int64_t>(x.shape(0)), k = static_cast<int64_t>(x.shape(1));
    const int32_t* const which = array_of<int32_t>(index, "index", "int32", {-1});
    const int64_t count = static_cast<int64_t>(index.shape(0));
    float* const to = array_of<float>(y, "y", "float32", {rows, -1});
    const std::vector<Delta>& deltas = adapter.sites.at(static_cast<size_t>(site));
    for (const Delta& d : deltas) {
      if (!fits(d, k, static_cast<int64_t>(y.shape(1)))) throw std::invalid_argument("an adapter of other inputs or columns.");
    }
    for (int64_t i = 0; i < count; ++i) {
      if (which[i] < 0 || which[i] >= rows) throw std::invalid_argument("index must be rows of x and y.");
    }
    dfk::Unlocked unlocked;
    LowRank work;
    work.add(deltas, which, count);
    work.take(from, k, k, nullptr, 0.0f);
    if (tile_rows <= 0) return work.apply(to, static_cast<int64_t>(y.shape(1)));
    by_tiles(work, to, rows, static_cast<int64_t>(y.shape(1)), tile_rows);
  }, nb::arg("adapter"), nb::arg("site"), nb::arg("x"), nb::arg("index"), nb::arg("y"), nb::arg("tile_rows") = 0);
}
