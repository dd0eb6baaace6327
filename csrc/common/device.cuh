// What every kernel needs and torch has no part in. nvcc compiles it for the device; without nvcc,
// csrc/hostcuda stands in for CUDA and the same kernels run on the host, in tests.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>

#if defined(__CUDACC__)
#include <torch/headeronly/macros/Macros.h>
#endif

// AVATAR_SHARED(float, tile, 64) declares `tile`, an array of 64 floats that the block shares; the size is a
// constant. AVATAR_DYNAMIC_SHARED(float, tile) declares a pointer to the shared bytes that the launch asks
// for, aligned to 32 bytes.
//
// AVATAR_DEVICE_ASSERT(condition, format, ...) checks data, such as an index, in a kernel. On the device a
// failure prints the condition and ends the program's use of the device (cudaErrorAssert), in release builds
// too; on the host it is std::out_of_range with the formatted message, which Python sees as IndexError.
// AVATAR_DEVICE_ASSERT_VALUE is for other data, such as lengths: std::invalid_argument, ValueError.
#if defined(__CUDACC__)
#define AVATAR_SHARED(type, name, count) __shared__ type name[count]
#define AVATAR_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(32) unsigned char avatar_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(avatar_dynamic_shared)
#define AVATAR_DEVICE_ASSERT(condition, ...) \
  do {                                       \
    CUDA_KERNEL_ASSERT(condition)            \
  } while (0)
#define AVATAR_DEVICE_ASSERT_VALUE AVATAR_DEVICE_ASSERT
#else
#define AVATAR_SHARED(type, name, count)             \
  static char name##_key;                            \
  type(&name)[count] = *static_cast<type(*)[count]>( \
      ::hostcuda::shared_array(&name##_key, sizeof(type) * (count), alignof(type)))
#define AVATAR_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(::hostcuda::dynamic_shared())
#define AVATAR_DEVICE_ASSERT(condition, ...)                                    \
  do {                                                                          \
    if (!(condition)) ::avatar::raise_bad_data<std::out_of_range>(__VA_ARGS__); \
  } while (0)
#define AVATAR_DEVICE_ASSERT_VALUE(condition, ...)                                  \
  do {                                                                              \
    if (!(condition)) ::avatar::raise_bad_data<std::invalid_argument>(__VA_ARGS__); \
  } while (0)
#endif

namespace avatar {

constexpr int kWarpSize = 32;
// Blocks have 48 KiB of shared memory, and more only where the kernel's attribute says so; it is set beyond
// this much dynamic shared memory, to leave room for arrays of fixed size.
constexpr size_t kPlainSharedBytes = 16 << 10;

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

inline int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline dim3 grid_of(int64_t x, int64_t y = 1, int64_t z = 1) {
  if (x > 0x7fffffff || y > 0xffff || z > 0xffff) {
    throw std::runtime_error("a grid of " + std::to_string(x) + " x " + std::to_string(y) + " x " +
                             std::to_string(z) + " blocks is too large");
  }
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
}

// Blocks along x for that many units of work; what does not fit is for the kernel's stride.
inline unsigned grid_size(int64_t units) {
  return static_cast<unsigned>(units < 0x7fffffff ? units : 0x7fffffff);
}

// Every kernel starts here. An empty grid is no work, not an error.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
            [[maybe_unused]] cudaStream_t stream, const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared > kPlainSharedBytes) {
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
        name);
  }
#if defined(__CUDACC__)
  kernel<<<grid, block, shared, stream>>>(arguments...);
#else
  hostcuda::launch(reinterpret_cast<const void*>(kernel), name, grid, block, shared,
                   [&] { kernel(arguments...); });
#endif
  check_cuda(cudaGetLastError(), name);
}

#if !defined(__CUDACC__)
template <typename Error, typename... Values>
[[noreturn]] void raise_bad_data(const char* format, Values... values) {
  char message[256];
  std::snprintf(message, sizeof message, format, values...);
  throw Error(message);
}
#endif

// Sum over a block, in an order that depends on its size alone; every thread gets it. The block has a
// multiple of kWarpSize threads, at most 1024.
template <typename T>
__device__ T block_sum(T value) {
  AVATAR_SHARED(T, partial, kWarpSize);
  for (int step = kWarpSize / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  if (lane == 0) partial[warp] = value;
  __syncthreads();
  const int warps = blockDim.x / kWarpSize;
  value = lane < warps ? partial[lane] : T(0);
  for (int step = kWarpSize / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  __syncthreads();
  return value;
}

// Sum of the values of the threads before this one; *total gets that of all. For blocks as above.
template <typename T>
__device__ T block_exclusive_sum(T value, T* total) {
  AVATAR_SHARED(T, partial, kWarpSize);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  T sum = value;
  for (int step = 1; step < kWarpSize; step *= 2) {
    const T before = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += before;
  }
  if (lane == kWarpSize - 1) partial[warp] = sum;
  __syncthreads();
  const int warps = blockDim.x / kWarpSize;
  T before = 0, all = 0;
  for (int other = 0; other < warps; ++other) {
    if (other < warp) before += partial[other];
    all += partial[other];
  }
  __syncthreads();
  *total = all;
  return before + sum - value;
}

}  // namespace avatar
