// Memory that is kept between uses.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>

namespace dfk {

// Memory that grows and is kept from use to use; 64-byte aligned, contents undefined after growth.
class Buffer {
 public:
  void* bytes(size_t count);
  float* floats(size_t count) { return static_cast<float*>(bytes(count * sizeof(float))); }
  const void* data() const { return data_.get(); }
  size_t size() const { return size_; }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> data_;
  size_t size_ = 0;
};

// `bytes` of the calling thread, for the length of one task. The next call of the same thread gives the same memory (or a
// larger piece): one user at a time.
char* thread_scratch(size_t bytes);

}  // namespace dfk
