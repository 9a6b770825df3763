#include "scratch.h"

#include <cstdint>
#include <cstdlib>
#include <new>

namespace dfk {
namespace {

struct Scratch {
  void* raw = nullptr;
  char* aligned = nullptr;
  size_t bytes = 0;
  ~Scratch() { std::free(raw); }
};

thread_local Scratch scratch;

}  // namespace

char* thread_scratch(size_t bytes) {
  if (scratch.bytes < bytes) {
    std::free(scratch.raw);
    scratch.bytes = 0;
    scratch.raw = std::malloc(bytes + 64);
    if (scratch.raw == nullptr) throw std::bad_alloc();
    scratch.aligned = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(scratch.raw) + 63) / 64 * 64);
    scratch.bytes = bytes;
  }
  return scratch.aligned;
}

}  // namespace dfk
