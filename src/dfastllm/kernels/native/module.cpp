// The extension module. Steps, K,V and the weights of a forward come as arrays, checked where they cross
// (bind_arrays.h); single linear calls (bind_linear.cpp) take addresses: there dfastllm.kernels keeps the memory alive and
// has checked it.
#include <nanobind/nanobind.h>

#include "bind_gil.h"
#include "cpu.h"
#include "pool.h"

namespace nb = nanobind;

void bind_adapter(nb::module_& m);
void bind_linear(nb::module_& m);
void bind_attention(nb::module_& m);
void bind_forward(nb::module_& m);
void bind_step(nb::module_& m);

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false);  // an engine thread may outlive the interpreter's own cleaning up
  dfk::isa();  // a wrong DFASTLLM_ISA fails here, at import, not in the first forward
  m.def("isa", &dfk::isa_name);
  m.def("isa_reason", &dfk::isa_reason);
  m.def("threads", &dfk::thread_count);
  m.def("set_threads", &dfk::set_thread_count, nb::call_guard<dfk::Unlocked>());
  bind_adapter(m);
  bind_linear(m);
  bind_attention(m);
  bind_forward(m);
  bind_step(m);
  nb::module_::import_("atexit").attr("register")(nb::cpp_function(&dfk::Unlocked::close));
}
