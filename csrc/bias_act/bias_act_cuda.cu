#include "bias_act/activation.cuh"
#include "common/cuda.cuh"

namespace avatar {
namespace {

constexpr int kThreads = 256;

// One thread an element, at most 2**31 - 1 blocks of them, the rest by striding.
template <typename T, typename A>
__global__ void __launch_bounds__(kThreads)
    bias_act_kernel(const T* __restrict__ x, const T* __restrict__ bias, T* __restrict__ y, int64_t count,
                    int64_t inner, int64_t channels, Activation<A> activation) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += stride) {
    A value = static_cast<A>(x[i]);
    if (bias) value += static_cast<A>(bias[i / inner % channels]);
    y[i] = static_cast<T>(activation.forward(value));
  }
}

// One block a channel, so that the bias gradient is summed in a fixed order.
template <typename T, typename A>
__global__ void __launch_bounds__(kThreads)
    bias_act_backward_kernel(const T* __restrict__ grad, const T* __restrict__ saved,
                             const T* __restrict__ bias, T* __restrict__ grad_x, T* __restrict__ grad_bias,
                             int64_t batch, int64_t channels, int64_t inner, Activation<A> activation) {
  const int64_t channel = blockIdx.x;
  const A shift = bias ? static_cast<A>(bias[channel]) : A(0);
  A sum = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t row = (b * channels + channel) * inner;
    for (int64_t i = threadIdx.x; i < inner; i += kThreads) {
      const A scale = saved ? activation.derivative(static_cast<A>(saved[row + i]) + shift) : activation.gain;
      const A value = static_cast<A>(grad[row + i]) * scale;
      grad_x[row + i] = static_cast<T>(value);
      sum += value;
    }
  }
  sum = block_sum(sum);
  if (grad_bias && threadIdx.x == 0) grad_bias[channel] = static_cast<T>(sum);
}

int64_t inner_size(const Tensor& x) {
  int64_t size = 1;
  for (int64_t dim = 2; dim < x.dim(); ++dim) size *= x.size(dim);
  return size;
}

template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor, ScalarType type) {
  if (!tensor) return std::nullopt;
  return torch::stable::contiguous(to_type(*tensor, type));
}

// x (B, C, ...), bias (C,) -> the shape of x.
Tensor bias_act_cuda(const Tensor& x_in, const std::optional<Tensor>& bias_in, double slope, double gain,
                     std::optional<double> clamp) {
  const torch::stable::accelerator::DeviceGuard guard(x_in.get_device_index());
  const Tensor x = torch::stable::contiguous(x_in);
  const std::optional<Tensor> bias = contiguous(bias_in, x.scalar_type());
  Tensor y = torch::stable::new_empty(x, x.sizes());
  const int64_t blocks = std::min<int64_t>((x.numel() + kThreads - 1) / kThreads, 0x7fffffff);
  dispatch_floating(x.scalar_type(), "bias_act", [&](auto zero) {
    using T = decltype(zero);
    using A = typename Accumulate<T>::type;
    launch("bias_act", bias_act_kernel<T, A>, dim3(blocks), dim3(kThreads), 0, current_stream(x),
           static_cast<const T*>(x.const_data_ptr()), data_or_null<T>(bias),
           static_cast<T*>(y.mutable_data_ptr()), x.numel(), inner_size(x), x.size(1),
           activation_of<A>(slope, gain, clamp));
  });
  return y;
}

// As on the CPU: `saved` with `bias` added tells what was activated; the bias gradient only where sum_bias.
std::tuple<Tensor, Tensor> bias_act_backward_cuda(const Tensor& grad_in,
                                                  const std::optional<Tensor>& saved_in,
                                                  const std::optional<Tensor>& bias_in, bool sum_bias,
                                                  double slope, double gain, std::optional<double> clamp) {
  const torch::stable::accelerator::DeviceGuard guard(grad_in.get_device_index());
  const Tensor grad = torch::stable::contiguous(grad_in);
  const std::optional<Tensor> saved = contiguous(saved_in, grad.scalar_type());
  const std::optional<Tensor> bias = contiguous(bias_in, grad.scalar_type());
  const int64_t channels = grad.size(1);
  Tensor grad_x = torch::stable::new_empty(grad, grad.sizes());
  Tensor grad_bias = torch::stable::new_empty(grad, {sum_bias ? channels : 0});
  dispatch_floating(grad.scalar_type(), "bias_act_backward", [&](auto zero) {
    using T = decltype(zero);
    using A = typename Accumulate<T>::type;
    launch("bias_act_backward", bias_act_backward_kernel<T, A>, dim3(channels), dim3(kThreads), 0,
           current_stream(grad), static_cast<const T*>(grad.const_data_ptr()), data_or_null<T>(saved),
           data_or_null<T>(bias), static_cast<T*>(grad_x.mutable_data_ptr()),
           sum_bias ? static_cast<T*>(grad_bias.mutable_data_ptr()) : nullptr, grad.size(0), channels,
           inner_size(grad), activation_of<A>(slope, gain, clamp));
  });
  return {grad_x, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avatar_ops, CUDA, m) {
  m.impl("bias_act", TORCH_BOX(&bias_act_cuda));
  m.impl("bias_act_backward", TORCH_BOX(&bias_act_backward_cuda));
}

}  // namespace avatar
