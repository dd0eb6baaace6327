#include "common/activation.cuh"
#include "common/cuda.cuh"
#include "common/pack.cuh"

namespace avatar {
namespace {

constexpr int kThreads = 256;
// Packs that a thread takes, one after another.
constexpr int kPasses = 4;

// Rows of packs in tiles, one a block: `lanes` threads side by side, and as many rows as there are threads
// for.
struct Tiles {
  int64_t rows, packs, chunks;  // a row of `packs` in so many tiles
  int lanes;                    // a power of two

  Tiles(int64_t rows, int64_t packs) : rows(rows), packs(packs), lanes(1) {
    while (lanes < kThreads && lanes < packs) lanes *= 2;
    chunks = divide_up(packs, kPasses * lanes);
  }

  int64_t count() const { return divide_up(rows, kThreads / lanes) * chunks; }

  template <typename Body>
  __device__ void for_each(int64_t tile, const Body& body) const {
    const int64_t group = tile / chunks;
    const int64_t row = group * (kThreads / lanes) + threadIdx.x / lanes;
    const int64_t begin = (tile - group * chunks) * kPasses * lanes + threadIdx.x % lanes;
    for (int pass = 0; pass < kPasses; ++pass) {
      const int64_t pack = begin + pass * lanes;
      if (row < rows && pack < packs) body(row, pack);
    }
  }
};

// Rows are samples times channels.
template <typename T, typename A, int kPack>
__global__ void __launch_bounds__(kThreads)
    bias_act_kernel(const T* __restrict__ x, const T* __restrict__ bias, T* __restrict__ y, Tiles tiles,
                    int64_t channels, Activation<A> activation) {
  tiles.for_each(blockIdx.x, [&](int64_t row, int64_t pack) {
    const int64_t offset = (row * tiles.packs + pack) * kPack;
    const A shift = bias ? static_cast<A>(bias[row % channels]) : A(0);
    const auto values = load_pack<T, kPack>(x + offset);
    Pack<T, kPack> results;
    for (int i = 0; i < kPack; ++i) {
      results[i] = static_cast<T>(activation.forward(static_cast<A>(values[i]) + shift));
    }
    store_pack(y + offset, results);
  });
}

// Rows are samples, of one channel. `sums` (channels, tiles) gets what each block adds to the bias gradient.
template <typename T, typename A, int kPack>
__global__ void __launch_bounds__(kThreads)
    bias_act_backward_kernel(const T* __restrict__ grad, const T* __restrict__ saved,
                             const T* __restrict__ bias, T* __restrict__ grad_x, A* __restrict__ sums,
                             Tiles tiles, int64_t tiles_per_channel, int64_t channels,
                             Activation<A> activation) {
  const int64_t channel = blockIdx.x / tiles_per_channel;
  const A shift = bias ? static_cast<A>(bias[channel]) : A(0);
  A sum = 0;
  tiles.for_each(blockIdx.x - channel * tiles_per_channel, [&](int64_t row, int64_t pack) {
    const int64_t offset = ((row * channels + channel) * tiles.packs + pack) * kPack;
    auto values = load_pack<T, kPack>(grad + offset);
    const auto inputs = saved ? load_pack<T, kPack>(saved + offset) : Pack<T, kPack>{};
    for (int i = 0; i < kPack; ++i) {
      const A scale = saved ? activation.derivative(static_cast<A>(inputs[i]) + shift) : activation.gain;
      const A value = static_cast<A>(values[i]) * scale;
      values[i] = static_cast<T>(value);
      sum += value;
    }
    store_pack(grad_x + offset, values);
  });
  if (!sums) return;
  sum = block_sum(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// Adds what the blocks of a channel found, in a fixed order.
template <typename T, typename A>
__global__ void __launch_bounds__(kThreads)
    bias_gradient_kernel(const A* __restrict__ sums, T* __restrict__ grad_bias, int64_t count) {
  A sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += sums[blockIdx.x * count + i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) grad_bias[blockIdx.x] = static_cast<T>(sum);
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
  return as_contiguous(to_type(*tensor, type));
}

// Calls body with the widest pack, as std::integral_constant, that rows of `inner` elements are made of.
template <typename T, typename Body>
void dispatch_pack(int64_t inner, std::initializer_list<const void*> pointers, const Body& body) {
  constexpr int kWidest = kPackBytes / sizeof(T);
  const bool aligned = std::all_of(pointers.begin(), pointers.end(), [](auto p) { return is_aligned(p); });
  if (inner % kWidest == 0 && aligned) return body(std::integral_constant<int, kWidest>{});
  body(std::integral_constant<int, 1>{});
}

// x (B, C, ...), bias (C,) -> the shape of x.
Tensor bias_act_cuda(const Tensor& x_in, const std::optional<Tensor>& bias_in, double slope, double gain,
                     std::optional<double> clamp) {
  const torch::stable::accelerator::DeviceGuard guard(x_in.get_device_index());
  const Tensor x = as_contiguous(x_in);
  const std::optional<Tensor> bias = contiguous(bias_in, x.scalar_type());
  Tensor y = torch::stable::new_empty(x, x.sizes());
  if (x.numel() == 0) return y;
  dispatch_floating(x.scalar_type(), "bias_act", [&](auto zero) {
    using T = decltype(zero);
    using A = typename Accumulate<T>::type;
    const T* source = static_cast<const T*>(x.const_data_ptr());
    T* target = static_cast<T*>(y.mutable_data_ptr());
    dispatch_pack<T>(inner_size(x), {source, target}, [&](auto pack) {
      const Tiles tiles(x.size(0) * x.size(1), inner_size(x) / pack);
      launch("bias_act", bias_act_kernel<T, A, pack>, grid_of(tiles.count()), dim3(kThreads), 0,
             current_stream(x), source, data_or_null<T>(bias), target, tiles, x.size(1),
             activation_of<A>(slope, gain, clamp));
    });
  });
  return y;
}

// As on the CPU: `saved` with `bias` added tells what was activated; the bias gradient only where sum_bias.
std::tuple<Tensor, Tensor> bias_act_backward_cuda(const Tensor& grad_in,
                                                  const std::optional<Tensor>& saved_in,
                                                  const std::optional<Tensor>& bias_in, bool sum_bias,
                                                  double slope, double gain, std::optional<double> clamp) {
  const torch::stable::accelerator::DeviceGuard guard(grad_in.get_device_index());
  const Tensor grad = as_contiguous(grad_in);
  const std::optional<Tensor> saved = contiguous(saved_in, grad.scalar_type());
  const std::optional<Tensor> bias = contiguous(bias_in, grad.scalar_type());
  const int64_t channels = grad.size(1);
  Tensor grad_x = torch::stable::new_empty(grad, grad.sizes());
  Tensor grad_bias = torch::stable::new_zeros(grad, {sum_bias ? channels : 0});
  if (grad.numel() == 0) return {grad_x, grad_bias};
  dispatch_floating(grad.scalar_type(), "bias_act_backward", [&](auto zero) {
    using T = decltype(zero);
    using A = typename Accumulate<T>::type;
    const T* source = static_cast<const T*>(grad.const_data_ptr());
    T* target = static_cast<T*>(grad_x.mutable_data_ptr());
    const T* values = data_or_null<T>(saved);
    dispatch_pack<T>(inner_size(grad), {source, target, values}, [&](auto pack) {
      const Tiles tiles(grad.size(0), inner_size(grad) / pack);
      const Tensor sums = torch::stable::new_empty(grad, {sum_bias ? channels * tiles.count() : 0},
                                                   compute_type(grad.scalar_type()));
      A* const partial = sum_bias ? static_cast<A*>(sums.mutable_data_ptr()) : nullptr;
      launch("bias_act_backward", bias_act_backward_kernel<T, A, pack>, grid_of(channels * tiles.count()),
             dim3(kThreads), 0, current_stream(grad), source, values, data_or_null<T>(bias), target, partial,
             tiles, tiles.count(), channels, activation_of<A>(slope, gain, clamp));
      if (!sum_bias) return;
      launch("bias_act_backward", bias_gradient_kernel<T, A>, grid_of(channels), dim3(kThreads), 0,
             current_stream(grad), static_cast<const A*>(partial),
             static_cast<T*>(grad_bias.mutable_data_ptr()), tiles.count());
    });
  });
  return {grad_x, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avatar_ops, CUDA, m) {
  m.impl("bias_act", TORCH_BOX(&bias_act_cuda));
  m.impl("bias_act_backward", TORCH_BOX(&bias_act_backward_cuda));
}

}  // namespace avatar
