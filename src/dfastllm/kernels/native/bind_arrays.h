// Arrays that cross from Python: numpy arrays and CPU tensors, checked where they cross. Nothing is copied.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace dfk {

using AnyArray = nanobind::ndarray<>;

// Throws std::invalid_argument unless the array lies on the CPU, contiguous, with elements of this kind and with these
// sizes (-1: any).
inline void require_array(const AnyArray& a, const char* name, nanobind::dlpack::dtype type, const char* type_name,
                          std::initializer_list<int64_t> sizes) {
  bool fits = a.dtype() == type && a.ndim() == sizes.size() && a.device_type() == nanobind::device::cpu::value;
  std::string wanted, got;
  int64_t stride = 1;
  for (size_t i = a.ndim(); fits && i-- > 0;) {
    const int64_t size = sizes.begin()[i], have = static_cast<int64_t>(a.shape(i));
    fits = (size < 0 || size == have) && (have <= 1 || a.stride(i) == stride || a.size() == 0);
    stride *= have;
  }
  if (fits) return;
  for (int64_t size : sizes) wanted += (wanted.empty() ? "" : ", ") + (size < 0 ? std::string("any") : std::to_string(size));
  for (size_t i = 0; i < a.ndim(); ++i) got += (got.empty() ? "" : ", ") + std::to_string(a.shape(i));
  throw std::invalid_argument(std::string(name) + " must be contiguous " + type_name + " [" + wanted + "] on the CPU, got [" +
                              got + "] of " + std::to_string(a.dtype().bits) + "-bit elements.");
}

template <class T>
T* array_of(const AnyArray& a, const char* name, const char* type_name, std::initializer_list<int64_t> sizes) {
  require_array(a, name, nanobind::dtype<T>(), type_name, sizes);
  return static_cast<T*>(a.data());
}

}  // namespace dfk
