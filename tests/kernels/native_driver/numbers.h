// What the driver's runs are made of: numbers that are the same on every machine, memory of exactly the size that was
// asked for (so that AddressSanitizer sees a read one past it), and how a result is printed.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

namespace driver {

// Pseudo-random numbers by splitmix64 (Steele, Lea, Flood 2014). Floats are made of integers by exact steps: no function
// of a mathematics library takes part, whose last bit differs from machine to machine.
class Numbers {
 public:
  explicit Numbers(uint64_t seed) : state_(seed) {}

  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }

  // 0 to count - 1.
  int64_t below(int64_t count) { return static_cast<int64_t>(next() >> 11) % count; }
  int64_t between(int64_t least, int64_t most) { return least + below(most - least + 1); }
  bool often(int64_t one_in) { return below(one_in) == 0; }

  // In (-1, 1), in steps of 2^-23.
  float unit() { return static_cast<float>(below((1 << 24) - 1) - ((1 << 23) - 1)) * 0x1p-23f; }

  // The sum of three of them: a rough bell of deviation 1.
  float bell() {
    const float a = unit(), b = unit(), c = unit();
    return (a + b) + c;
  }

 private:
  uint64_t state_;
};

// `count` values on a 64-byte boundary, not one byte more.
template <class T>
class Array {
 public:
  Array() = default;
  explicit Array(int64_t count) : count_(count) {
    void* memory = nullptr;
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    if (posix_memalign(&memory, 64, bytes > 0 ? bytes : 1) != 0) throw std::bad_alloc();
    std::memset(memory, 0, bytes);
    data_.reset(static_cast<T*>(memory));
  }

  T* data() const { return data_.get(); }
  T* or_null() const { return count_ > 0 ? data_.get() : nullptr; }
  int64_t count() const { return count_; }
  int64_t bytes() const { return count_ * static_cast<int64_t>(sizeof(T)); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t count_ = 0;
};

// Floats like those of activations: mostly a bell, a few large ones.
inline Array<float> bells(Numbers& numbers, int64_t count, float scale = 1.0f) {
  Array<float> out(count);
  for (int64_t i = 0; i < count; ++i) out[i] = numbers.bell() * scale * (numbers.often(97) ? 8.0f : 1.0f);
  return out;
}

// float16 bits of a scale: 2^-10 to 2^-4, of either sign, seldom zero or denormal.
inline uint16_t half_scale(Numbers& numbers) {
  const uint64_t fraction = numbers.next() & 1023, sign = numbers.often(4) ? 1 : 0;
  const uint64_t exponent = numbers.often(61) ? 0 : static_cast<uint64_t>(numbers.between(5, 11));
  return static_cast<uint16_t>(sign << 15 | exponent << 10 | fraction);
}

// FNV-1a, 64 bits.
inline uint64_t hash_of(const void* data, int64_t bytes, uint64_t hash = 0xcbf29ce484222325u) {
  const auto* p = static_cast<const unsigned char*>(data);
  for (int64_t i = 0; i < bytes; ++i) hash = (hash ^ p[i]) * 0x100000001b3u;
  return hash;
}

// Whether two results are the same numbers bit by bit; any NaN equals any other.
inline bool same(const float* a, const float* b, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (std::memcmp(a + i, b + i, sizeof *a) != 0 && !(a[i] != a[i] && b[i] != b[i])) return false;
  }
  return true;
}

}  // namespace driver
