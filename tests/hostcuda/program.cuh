// What the small programs beside this file share: arrays that kernels see, and how a program ends.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <vector>

#include "common/device.cuh"

// `count` elements of exactly their size, so that AddressSanitizer sees every overrun, aligned for matrices.
// On a device, managed memory.
template <typename T>
class Array {
 public:
  explicit Array(size_t count, T value = T()) : count_(count) {
#if defined(__CUDACC__)
    avatar::check_cuda(cudaMallocManaged(&data_, count * sizeof(T)), "cudaMallocManaged");
#else
    data_ = new (kAlignment) T[count];
#endif
    std::fill_n(data_, count, value);
  }
  ~Array() {
#if defined(__CUDACC__)
    cudaFree(data_);
#else
    ::operator delete[](data_, kAlignment);
#endif
  }
  Array(const Array&) = delete;
  T* data() { return data_; }
  size_t size() const { return count_; }
  T& operator[](size_t i) { return data_[i]; }

 private:
  static constexpr std::align_val_t kAlignment{32};
  T* data_ = nullptr;
  size_t count_;
};

inline void finish() {
#if defined(__CUDACC__)
  avatar::check_cuda(cudaDeviceSynchronize(), "kernel");
#endif
}

// Whether the program was asked for the broken kernel: ./program broken.
inline bool wants_broken(int arguments, char** texts) {
  return arguments > 1 && std::strcmp(texts[1], "broken") == 0;
}

// Prints "wrong" and returns 1 if the results are not as they should be, or what was thrown and 2.
template <typename Body>
int run_program(const Body& body) {
  try {
    const bool right = body();
    std::puts(right ? "right" : "wrong");
    return right ? 0 : 1;
  } catch (const std::exception& error) {
    std::puts(error.what());
    return 2;
  }
}
