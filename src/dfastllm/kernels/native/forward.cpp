#include <nanobind/nanobind.h>
void bind_forward(nanobind::module_& m);
void bind_forward(nanobind::module_&) {}
