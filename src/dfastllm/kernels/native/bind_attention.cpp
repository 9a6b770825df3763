// Bindings of rotary, K,V writes and attention. Addresses are integers; kernels/attention.py keeps the memory alive and
// has checked shapes, dtypes, contiguity and that every slot and block exists.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include <cstdint>
#include <vector>

#include "gil.h"
#include "attention.h"

namespace nb = nanobind;
using namespace dfk;

namespace {

using Address = uintptr_t;
using LayerTuple = std::tuple<Address, Address, Address, Address>;  // k, v, k_scales, v_scales
using ShapeTuple = std::tuple<int, int64_t, int64_t>;               // type, kv_heads, dim

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

KvLayer layer_of(const LayerTuple& t) {
  return {at<void>(std::get<0>(t)), at<void>(std::get<1>(t)), at<float>(std::get<2>(t)), at<float>(std::get<3>(t))};
}

KvShape shape_of(const ShapeTuple& t) { return {static_cast<KvType>(std::get<0>(t)), std::get<1>(t), std::get<2>(t)}; }

}  // namespace

void bind_attention(nb::module_& m) {
  using release = nb::call_guard<dfk::Unlocked>;
  m.def(
      "rope_store",
      [](Address qkv, int64_t rows, int64_t stride, int64_t heads, Address q_norm, Address k_norm, float eps,
         Address cos, Address sin, int64_t rotary, ShapeTuple shape, LayerTuple cache, LayerTuple own, Address slot,
         Address own_slot) {
        RopeStore a{};
        a.qkv = at<float>(qkv);
        a.rows = rows;
        a.stride = stride;
        a.heads = heads;
        a.q_norm = at<float>(q_norm);
        a.k_norm = at<float>(k_norm);
        a.eps = eps;
        a.cos = at<float>(cos);
        a.sin = at<float>(sin);
        a.rotary = rotary;
        a.shape = shape_of(shape);
        a.cache = layer_of(cache);
        a.own = layer_of(own);
        a.slot = at<int32_t>(slot);
        a.own_slot = at<int32_t>(own_slot);
        rope_store(a);
      },
      release());
  m.def(
      "attention",
      // spans [span_count][6] int32: row0, row1, cached, own, first of its entries in blocks and in own_blocks;
      // mask_at [span_count] int64: where its mask begins in `mask`, below 0: none; or null.
      [](Address q, int64_t rows, int64_t stride, int64_t heads, float scale, ShapeTuple shape, LayerTuple cache,
         LayerTuple own, int64_t span_count, Address spans, Address blocks, Address own_blocks, Address mask_at,
         Address mask, Address cached_limit, Address own_limit, Address out) {
        std::vector<SpanKeys> keys(static_cast<size_t>(span_count));
        for (int64_t i = 0; i < span_count; ++i) {
          const int32_t* s = at<int32_t>(spans) + 6 * i;
          const int64_t offset = mask_at == 0 ? -1 : at<int64_t>(mask_at)[i];
          keys[static_cast<size_t>(i)] = {s[0], s[1], s[2], s[3], at<int32_t>(blocks) + s[4],
                                          at<int32_t>(own_blocks) + s[5], offset < 0 ? nullptr : at<uint8_t>(mask) + offset};
        }
        Attention a{};
        a.q = at<float>(q);
        a.rows = rows;
        a.stride = stride;
        a.heads = heads;
        a.scale = scale;
        a.shape = shape_of(shape);
        a.cache = layer_of(cache);
        a.own = layer_of(own);
        a.spans = keys.data();
        a.span_count = span_count;
        a.cached_limit = at<int32_t>(cached_limit);
        a.own_limit = at<int32_t>(own_limit);
        a.out = at<float>(out);
        attention(a);
      },
      release());
}
