// Bindings of the linear layers. Addresses are integers; kernels/linear.py keeps the memory alive and has checked shapes,
// dtypes and contiguity.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include <cstdint>

#include "bind_gil.h"
#include "linear.h"

namespace nb = nanobind;
using namespace dfk;

namespace {

using Address = uintptr_t;
// format, n, k, data, scales, mins, bias
using LinearTuple = std::tuple<int, int64_t, int64_t, Address, Address, Address, Address>;
// kind, rows, k, data, scales, sums
using ActsTuple = std::tuple<int, int64_t, int64_t, Address, Address, Address>;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

Linear linear_of(const LinearTuple& t) {
  return {static_cast<Format>(std::get<0>(t)), std::get<1>(t),           std::get<2>(t),    at<void>(std::get<3>(t)),
          at<void>(std::get<4>(t)),            at<uint16_t>(std::get<5>(t)), at<float>(std::get<6>(t))};
}

Acts acts_of(const ActsTuple& t) {
  const int64_t k = std::get<2>(t);
  return {static_cast<ActKind>(std::get<0>(t)), std::get<1>(t),           k, round_up(k, 32),
          at<void>(std::get<3>(t)),             at<float>(std::get<4>(t)), at<int32_t>(std::get<5>(t))};
}

}  // namespace

void bind_linear(nb::module_& m) {
  using release = nb::call_guard<dfk::Unlocked>;
  m.def("prepare", [](Address x, int64_t ldx, Address norm, float eps, const ActsTuple& out) {
    prepare(at<float>(x), ldx, at<float>(norm), eps, acts_of(out));
  }, release());
  m.def("prepare_turned", [](Address x, int64_t ldx, int64_t block, const ActsTuple& out) {
    prepare_turned(at<float>(x), ldx, block, acts_of(out));
  }, release());
  m.def("linear", [](const LinearTuple& w, const ActsTuple& x, Address y, int64_t ldy, bool accumulate) {
    linear(linear_of(w), acts_of(x), at<float>(y), ldy, accumulate);
  }, release());
  m.def("linear_gated", [](const LinearTuple& w, const ActsTuple& x, int activation, Address h, const ActsTuple& out,
                           int64_t block) {
    linear_gated(linear_of(w), acts_of(x), static_cast<Activation>(activation), at<float>(h), acts_of(out), block);
  }, release());
  m.def("softcap", [](Address x, int64_t count, float cap) { softcap(at<float>(x), count, cap); }, release());
  // barred: words, of_row, and [rows] of (int32 token, float logit)
  // out: [rows] of (int32 token, int32 finite, float top, float second, float norm, float entropy)
  m.def("head_stats", [](const LinearTuple& w, const ActsTuple& x, float cap, Address ban, int64_t bans,
                         const std::tuple<Address, Address, Address>& barred, bool entropy, int64_t topk, Address out,
                         Address values, Address ids) {
    const Barred sets{at<uint64_t>(std::get<0>(barred)), at<int32_t>(std::get<1>(barred)),
                      at<HeadChoice>(std::get<2>(barred))};
    head_stats(linear_of(w), acts_of(x), cap, at<int32_t>(ban), bans, sets, entropy, topk, at<RowStats>(out),
               at<float>(values), at<int32_t>(ids));
  }, release());
  m.def("weight_rows", [](const LinearTuple& w, Address ids, int64_t count, Address out) {
    weight_rows(linear_of(w), at<int64_t>(ids), count, at<float>(out));
  }, release());
  m.def("pack", [](int format, int64_t n, int64_t k, Address codes, Address scales, Address mins, Address steps,
                   Address data, Address panel_scales, Address panel_mins) {
    pack(static_cast<Format>(format), n, k, at<void>(codes), at<void>(scales), at<uint16_t>(mins), at<uint8_t>(steps),
         at<void>(data), at<void>(panel_scales), at<uint16_t>(panel_mins));
  }, release());
}
