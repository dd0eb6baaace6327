#include <algorithm>

#include "bias_act/bias_act_simd.h"
#include "common/tensor.h"

namespace avatar {
namespace {

// Scales convolution (B, O, H, W) by scale (B, O) in place, and writes what noise (1 or B, 1, H, W), bias
// (O,) and the activation make of it to `output`, or over `convolution` where there is none.
void modulated_conv2d_epilogue_cpu(Tensor convolution, std::optional<Tensor> output,
                                   const std::optional<Tensor>& scale, const std::optional<Tensor>& noise,
                                   const std::optional<Tensor>& bias, double slope, double gain,
                                   std::optional<double> clamp) {
  const int64_t channels = convolution.size(1), pixels = convolution.size(2) * convolution.size(3);
  const int64_t noise_stride = noise && noise->size(0) > 1 ? pixels : 0;
  dispatch_compute(convolution.scalar_type(), "modulated_conv2d_epilogue", [&](auto zero) {
    using T = decltype(zero);
    T* values = mutable_data<T>(convolution);
    T* results = output ? mutable_data<T>(*output) : values;
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, pixels));
    torch::stable::parallel_for(0, convolution.size(0) * channels, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const BiasActRow<T> args{values + row * pixels,
                                 noise ? const_data<T>(*noise) + row / channels * noise_stride : nullptr,
                                 results + row * pixels,
                                 output ? values + row * pixels : nullptr,
                                 scale ? const_data<T>(*scale)[row] : T(1),
                                 bias ? const_data<T>(*bias)[row % channels] : T(0),
                                 static_cast<T>(slope),
                                 static_cast<T>(gain),
                                 clamp ? static_cast<T>(*clamp) : std::numeric_limits<T>::infinity(),
                                 pixels};
        AVATAR_ISA_CALL(bias_act_row, args);
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avatar_ops, CPU, m) {
  m.impl("modulated_conv2d_epilogue", TORCH_BOX(&modulated_conv2d_epilogue_cpu));
}

}  // namespace avatar
