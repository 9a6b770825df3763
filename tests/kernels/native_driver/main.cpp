// A program around the native kernels, without Python: the same sources and flags, built for any machine and run there or
// by an emulator.
//
//   driver isa                 which instruction set is used, and why
//   driver rows                golden rows, a line of JSON each
//   driver fuzz SEED COUNT     random shapes against the law
//   driver regions COUNT       many tiny regions of the thread pool
//
// DFASTLLM_ISA chooses the instruction set. Exit status: 0 right, 1 a wrong result, 2 a wrong call, 3 an instruction set
// that is not there.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>

#include "cpu.h"
#include "modes.h"
#include "pool.h"

namespace {

int run(int count, char** words) {
  const auto is = [&](const char* name, int arguments) { return count == 2 + arguments && std::strcmp(words[1], name) == 0; };
  if (is("isa", 0)) return std::printf("%s: %s\n", dfk::isa_name(), dfk::isa_reason()) > 0 ? 0 : 1;
  dfk::set_thread_count(2);
  if (is("rows", 0)) return driver::rows();
  if (is("fuzz", 2)) return driver::fuzz(std::strtoull(words[2], nullptr, 10), std::strtoll(words[3], nullptr, 10));
  if (is("regions", 1)) return driver::regions(std::strtoll(words[2], nullptr, 10));
  std::fprintf(stderr, "usage: driver isa | rows | fuzz SEED COUNT | regions COUNT\n");
  return 2;
}

}  // namespace

int main(int count, char** words) {
  try {
    dfk::isa();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 3;
  }
  return run(count, words);
}
