#include <algorithm>

#include "common/tensor.h"
#include "modulated_conv2d/modulated_conv2d_small_simd.h"

namespace avatar {
namespace {

// x (B, I, H, W) times styles (B, I) if given, correlated with weight (O, I, 3, 3) between `padding` zeros ->
// (B, O, H + 2 padding - 2, W + 2 padding - 2); or with `transposed` the transposed correlation of stride 2
// -> (B, O, 2 H + 1, 2 W + 1), which is that of zeros between the pixels. All float32 and contiguous.
Tensor modulated_conv2d_small_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& styles,
                                  bool transposed, int64_t padding) {
  SmallConv2d args{};
  args.batch = x.size(0);
  args.channels = x.size(1);
  args.height = x.size(2);
  args.width = x.size(3);
  args.outputs = weight.size(0);
  args.out_height = transposed ? 2 * args.height + 1 : args.height + 2 * padding - 2;
  args.out_width = transposed ? 2 * args.width + 1 : args.width + 2 * padding - 2;
  args.stride = transposed ? 2 : 1;
  // A correlation with zeros between the pixels takes pixel i to 2 i + 2 - k.
  args.origin = transposed ? 2 : padding;
  Tensor y = torch::stable::new_empty(x, {args.batch, args.outputs, args.out_height, args.out_width});
  if (y.numel() == 0) return y;
  args.x = const_data<float>(x);
  args.weight = const_data<float>(weight);
  args.styles = styles ? const_data<float>(*styles) : nullptr;
  args.y = mutable_data<float>(y);
  const int64_t pixels = AVATAR_ISA_CALL(small_pixels, args.batch * args.height * args.width);
  std::vector<float> packed(pixels * args.channels);
  AVATAR_ISA_CALL(small_pack, args, packed.data());
  const int64_t work = 9 * pixels * std::max<int64_t>(1, args.channels);
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 18) / work);
  torch::stable::parallel_for(0, args.outputs, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> products(9 * pixels);
    for (int64_t output = begin; output < end; ++output) {
      AVATAR_ISA_CALL(small_convolve, args, output, packed.data(), products.data());
    }
  });
  return y;
}

// weight (O, I, k, k) -> (O, I), the sum of the squares of each filter.
Tensor modulated_conv2d_energy_cpu(const Tensor& weight_in) {
  const Tensor weight = as_contiguous(weight_in);
  Tensor energy = torch::stable::new_empty(weight, {weight.size(0), weight.size(1)});
  const int64_t size = weight.size(2) * weight.size(3);
  dispatch_compute(weight.scalar_type(), "modulated_conv2d_energy", [&](auto zero) {
    using T = decltype(zero);
    const T* values = const_data<T>(weight);
    T* sums = mutable_data<T>(energy);
    torch::stable::parallel_for(0, energy.numel(), 8192, [&](int64_t begin, int64_t end) {
      AVATAR_ISA_CALL(sum_squares, values + begin * size, end - begin, size, sums + begin);
    });
  });
  return energy;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avatar_ops, CPU, m) {
  m.impl("modulated_conv2d_small", TORCH_BOX(&modulated_conv2d_small_cpu));
  m.impl("modulated_conv2d_energy", TORCH_BOX(&modulated_conv2d_energy_cpu));
}

}  // namespace avatar
