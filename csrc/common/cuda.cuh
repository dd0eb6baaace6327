// What every CUDA op needs around its kernels: launch, current stream, dtype dispatch.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "common/device.cuh"
#include "common/tensor.h"

#if !defined(__CUDACC__)
// Built by csrc/hostcuda, kernels take CPU tensors.
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) _STABLE_TORCH_LIBRARY_IMPL(ns, CPU, m, C10_UID)
#endif

namespace avatar {

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

inline cudaStream_t current_stream([[maybe_unused]] const Tensor& tensor) {
  void* stream = nullptr;
#if defined(__CUDACC__)
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
#endif
  return static_cast<cudaStream_t>(stream);
}

}  // namespace avatar
