// What every CUDA op needs around its kernels: launch, current stream, dtype dispatch.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "common/tensor.h"

namespace avatar {

constexpr int kWarpSize = 32;

// The type that a kernel on T computes in.
template <typename T>
struct Accumulate {
  using type = T;
};
template <>
struct Accumulate<torch::headeronly::Half> {
  using type = float;
};
template <>
struct Accumulate<torch::headeronly::BFloat16> {
  using type = float;
};

// Calls body(T{}) for the floating dtypes.
template <typename Body>
void dispatch_floating(ScalarType type, const char* op, const Body& body) {
  if (type == ScalarType::Half) return body(torch::headeronly::Half{});
  if (type == ScalarType::BFloat16) return body(torch::headeronly::BFloat16{});
  dispatch_compute(type, op, body);
}

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

// Every kernel starts here. An empty grid is no work, not an error.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
            cudaStream_t stream, const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  kernel<<<grid, block, shared, stream>>>(arguments...);
  check_cuda(cudaGetLastError(), name);
}

// Sum over a block, in an order that depends on its size alone; every thread gets it. The block has a
// multiple of kWarpSize threads, at most 1024.
template <typename T>
__device__ T block_sum(T value) {
  __shared__ T partial[kWarpSize];
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

}  // namespace avatar
