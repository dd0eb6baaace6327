#include <algorithm>

#include "common/tensor.h"
#include "modulated_conv2d/modulated_conv2d_scale_simd.h"

namespace avatar {
namespace {

template <typename Row>
void for_each_row(int64_t rows, int64_t pixels, const Row& row) {
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, pixels));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) row(r);
  });
}

// The sums (B, C) over pixels of images * others (B, C, H, W), and images times factors (B, C) to `scaled`,
// which may be `images`; all contiguous.
Tensor scale_images(const Tensor& images, const Tensor& others, const std::optional<Tensor>& factors,
                    const std::optional<Tensor>& scaled) {
  Tensor sums = torch::stable::new_empty(images, {images.size(0), images.size(1)});
  const int64_t rows = sums.numel(), pixels = images.size(2) * images.size(3);
  dispatch_compute(images.scalar_type(), "modulated_conv2d_scale", [&](auto zero) {
    using T = decltype(zero);
    const T *image = const_data<T>(images), *other = const_data<T>(others);
    const T* factor = scaled ? const_data<T>(*factors) : nullptr;
    T *target = scaled ? mutable_data<T>(*scaled) : nullptr, *sum = mutable_data<T>(sums);
    for_each_row(rows, pixels, [&](int64_t row) {
      const int64_t first = row * pixels;
      sum[row] = AVATAR_ISA_CALL(scale_row, image + first, other + first, target ? factor[row] : T(1),
                                 target ? target + first : nullptr, pixels);
    });
  });
  return sums;
}

// images and others (B, C, H, W), factors (B, C) -> images times factors, and the sums (B, C) over pixels of
// images * others.
std::tuple<Tensor, Tensor> modulated_conv2d_scale_cpu(const Tensor& images, const Tensor& others,
                                                      const Tensor& factors) {
  Tensor scaled = new_result(images, images.sizes());
  const Tensor sums =
      scale_images(as_contiguous(images), as_contiguous(others), as_contiguous(factors), scaled);
  return {scaled, sums};
}

// The same into `images`, which are contiguous.
Tensor modulated_conv2d_styles_backward_cpu(Tensor images, const Tensor& others, const Tensor& factors) {
  return scale_images(images, as_contiguous(others), as_contiguous(factors), images);
}

Tensor modulated_conv2d_sums_backward_cpu(const Tensor& images, const Tensor& others) {
  return scale_images(as_contiguous(images), as_contiguous(others), std::nullopt, std::nullopt);
}

// The gradients of images, others and factors from those of both results.
std::tuple<Tensor, Tensor, Tensor> modulated_conv2d_scale_backward_cpu(const Tensor& images_in,
                                                                       const Tensor& others_in,
                                                                       const Tensor& factors_in,
                                                                       const Tensor& grad_scaled_in,
                                                                       const Tensor& grad_sums_in) {
  const Tensor images = as_contiguous(images_in), others = as_contiguous(others_in);
  const Tensor factors = as_contiguous(factors_in);
  const Tensor grad_scaled = as_contiguous(grad_scaled_in);
  const Tensor grad_sums = as_contiguous(grad_sums_in);
  Tensor grad_images = new_result(images, images.sizes());
  Tensor grad_others = new_result(images, images.sizes());
  Tensor grad_factors = torch::stable::new_empty(factors, factors.sizes());
  const int64_t rows = factors.numel(), pixels = images.size(2) * images.size(3);
  dispatch_compute(images.scalar_type(), "modulated_conv2d_scale_backward", [&](auto zero) {
    using T = decltype(zero);
    const T *image = const_data<T>(images), *other = const_data<T>(others), *factor = const_data<T>(factors);
    const T *grad = const_data<T>(grad_scaled), *grad_sum = const_data<T>(grad_sums);
    T *grad_image = mutable_data<T>(grad_images), *grad_other = mutable_data<T>(grad_others);
    T* grad_factor = mutable_data<T>(grad_factors);
    for_each_row(rows, pixels, [&](int64_t row) {
      const int64_t first = row * pixels;
      grad_factor[row] =
          AVATAR_ISA_CALL(scale_backward_row, image + first, other + first, grad + first, factor[row],
                          grad_sum[row], grad_image + first, grad_other + first, pixels);
    });
  });
  return {grad_images, grad_others, grad_factors};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avatar_ops, CPU, m) {
  m.impl("modulated_conv2d_scale", TORCH_BOX(&modulated_conv2d_scale_cpu));
  m.impl("modulated_conv2d_styles_backward", TORCH_BOX(&modulated_conv2d_styles_backward_cpu));
  m.impl("modulated_conv2d_sums_backward", TORCH_BOX(&modulated_conv2d_sums_backward_cpu));
  m.impl("modulated_conv2d_scale_backward", TORCH_BOX(&modulated_conv2d_scale_backward_cpu));
}

}  // namespace avatar
