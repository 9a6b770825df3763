// An adapter and the arrays that it is made of.
#pragma once

#include <nanobind/nanobind.h>

#include <vector>

#include "adapter.h"
#include "bind_arrays.h"

struct BoundAdapter : dfk::Adapter {
  std::vector<dfk::AnyArray> held;
};

// Which kind of elements an array has. Throws std::invalid_argument for others than float32, bfloat16 and float16.
dfk::Element element_of(const dfk::AnyArray& a, const char* name);
