#include "scratch.h"

#include <new>

namespace dfk {

void* Buffer::bytes(size_t count) {
  if (count > size_) {
    const size_t wanted = (count + 63) / 64 * 64;
    data_.reset();  // before the new one: the peak is the larger of both, not the sum
    size_ = 0;
    data_.reset(std::aligned_alloc(64, wanted));
    if (!data_) throw std::bad_alloc();
    size_ = wanted;
  }
  return data_.get();
}

char* thread_scratch(size_t bytes) {
  static thread_local Buffer scratch;
  return static_cast<char*>(scratch.bytes(bytes));
}

}  // namespace dfk
