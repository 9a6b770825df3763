// An adapter and the arrays that it is made of.
#pragma once

#include <nanobind/nanobind.h>

#include <vector>

#include "adapter.h"
#include "arrays.h"

struct BoundAdapter : dfk::Adapter {
  std::vector<dfk::AnyArray> held;
};
