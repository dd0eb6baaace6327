#include "common/activation.cuh"
#include "common/cuda.cuh"

namespace avatar {
namespace {

constexpr int kThreads = 256;
// Pixels of one channel of one sample that a block takes at a time.
constexpr int64_t kChunk = 4 * kThreads;

template <typename T>
struct Epilogue {
  T* convolution;  // (rows, pixels), rows being samples times channels
  T* output;       // null: over `convolution`
  const T* scale;  // (rows,), or null
  const T* noise;  // (samples, pixels) `noise_stride` apart, or null
  const T* bias;   // (channels,), or null
  int64_t rows, channels, pixels, noise_stride;
  Activation<T> activation;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) modulated_conv2d_epilogue_kernel(Epilogue<T> args) {
  const int64_t chunks = (args.pixels + kChunk - 1) / kChunk;
  for (int64_t block = blockIdx.x; block < args.rows * chunks; block += gridDim.x) {
    const int64_t row = block / chunks, begin = (block - row * chunks) * kChunk;
    const int64_t end = begin + kChunk < args.pixels ? begin + kChunk : args.pixels;
    const T scale = args.scale ? args.scale[row] : T(1);
    const T bias = args.bias ? args.bias[row % args.channels] : T(0);
    const T* noise = args.noise ? args.noise + row / args.channels * args.noise_stride : nullptr;
    T* const values = args.convolution + row * args.pixels;
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      const T product = values[i] * scale;
      const T result = args.activation.forward((noise ? product + noise[i] : product) + bias);
      if (args.output) {
        values[i] = product;
        args.output[row * args.pixels + i] = result;
      } else {
        values[i] = result;
      }
    }
  }
}

template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

// As on the CPU: contiguous tensors of one dtype, float32 or float64.
void modulated_conv2d_epilogue_cuda(Tensor convolution, std::optional<Tensor> output,
                                    const std::optional<Tensor>& scale, const std::optional<Tensor>& noise,
                                    const std::optional<Tensor>& bias, double slope, double gain,
                                    std::optional<double> clamp) {
  const torch::stable::accelerator::DeviceGuard guard(convolution.get_device_index());
  const int64_t channels = convolution.size(1), rows = convolution.size(0) * channels;
  const int64_t pixels = convolution.size(2) * convolution.size(3);
  const int64_t blocks = std::min<int64_t>(rows * ((pixels + kChunk - 1) / kChunk), 0x7fffffff);
  dispatch_compute(convolution.scalar_type(), "modulated_conv2d_epilogue", [&](auto zero) {
    using T = decltype(zero);
    const Epilogue<T> args{static_cast<T*>(convolution.mutable_data_ptr()),
                           output ? static_cast<T*>(output->mutable_data_ptr()) : nullptr,
                           data_or_null<T>(scale),
                           data_or_null<T>(noise),
                           data_or_null<T>(bias),
                           rows,
                           channels,
                           pixels,
                           noise && noise->size(0) > 1 ? pixels : 0,
                           activation_of<T>(slope, gain, clamp)};
    launch("modulated_conv2d_epilogue", modulated_conv2d_epilogue_kernel<T>, dim3(blocks), dim3(kThreads), 0,
           current_stream(convolution), args);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avatar_ops, CUDA, m) {
  m.impl("modulated_conv2d_epilogue", TORCH_BOX(&modulated_conv2d_epilogue_cuda));
}

}  // namespace avatar
