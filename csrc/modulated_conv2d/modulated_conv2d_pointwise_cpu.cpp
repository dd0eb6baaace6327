#include <algorithm>

#include "common/tensor.h"
#include "modulated_conv2d/modulated_conv2d_pointwise_simd.h"

namespace avatar {
namespace {

// Pixels of a task: whole strips of every number of outputs and instruction set.
constexpr int64_t kTaskPixels = 3072;

// x (B, I, ...) convolved with weight (O, I) times styles (B, I), which are of the compute dtype as the
// result is -> (B, O, ...). All contiguous.
Tensor modulated_conv2d_pointwise_cpu(const Tensor& x, const Tensor& weight, const Tensor& styles) {
  const int64_t batch = x.size(0), channels = x.size(1), outputs = weight.size(0);
  const int64_t pixels = x.size(2) * x.size(3);
  Tensor y = torch::stable::new_empty(weight, {batch, outputs, x.size(2), x.size(3)});
  const PixelType type = pixel_type(x);
  const int64_t pixel_bytes = static_cast<int64_t>(x.element_size());
  if (y.numel() == 0) return y;
  dispatch_compute(weight.scalar_type(), "modulated_conv2d_pointwise", [&](auto zero) {
    using T = decltype(zero);
    const int64_t groups = (outputs + kPointwiseOutputs - 1) / kPointwiseOutputs;
    const T *shared = const_data<T>(weight), *factors = const_data<T>(styles);
    const char* images = static_cast<const char*>(x.const_data_ptr());
    T* results = mutable_data<T>(y);
    std::vector<T> weights(batch * groups * channels * kPointwiseOutputs);
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t o = 0; o < outputs; ++o) {
        T* group = weights.data() + (b * groups + o / kPointwiseOutputs) * channels * kPointwiseOutputs;
        for (int64_t c = 0; c < channels; ++c) {
          group[c * kPointwiseOutputs + o % kPointwiseOutputs] =
              shared[o * channels + c] * factors[b * channels + c];
        }
      }
    }
    const int64_t tasks = (pixels + kTaskPixels - 1) / kTaskPixels;
    const int64_t grain = std::max<int64_t>(1, (1 << 15) / (std::min(pixels, kTaskPixels) * (channels + 1)));
    torch::stable::parallel_for(0, batch * tasks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / tasks, first = (task - b * tasks) * kTaskPixels;
        for (int64_t o = 0; o < outputs; o += kPointwiseOutputs) {
          const int64_t group = b * groups + o / kPointwiseOutputs;
          const PointwiseConv2d<T> args{images + b * channels * pixels * pixel_bytes,
                                        weights.data() + group * channels * kPointwiseOutputs,
                                        results + (b * outputs + o) * pixels,
                                        channels,
                                        pixels,
                                        std::min(kPointwiseOutputs, outputs - o),
                                        type};
          AVATAR_ISA_CALL(pointwise_convolve, args, first, std::min(pixels, first + kTaskPixels));
        }
      }
    });
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avatar_ops, CPU, m) {
  m.impl("modulated_conv2d_pointwise", TORCH_BOX(&modulated_conv2d_pointwise_cpu));
}

}  // namespace avatar
