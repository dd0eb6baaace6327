#include <algorithm>

#include "bias_act/bias_act_simd.h"
#include "common/tensor.h"

namespace avatar {
namespace {

int64_t inner_size(const Tensor& x) {
  int64_t size = 1;
  for (int64_t dim = 2; dim < x.dim(); ++dim) size *= x.size(dim);
  return size;
}

template <typename T>
T clamp_of(const std::optional<double>& clamp) {
  return clamp ? static_cast<T>(*clamp) : std::numeric_limits<T>::infinity();
}

int64_t rows_per_task(int64_t inner) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, inner));
}

// x (B, C, ...), bias (C,) -> the shape of x.
Tensor bias_act_cpu(const Tensor& x_in, const std::optional<Tensor>& bias_in, double slope, double gain,
                    std::optional<double> clamp) {
  const Tensor x = to_compute(x_in);
  const int64_t channels = x.size(1), inner = inner_size(x);
  std::optional<Tensor> bias;
  if (bias_in) bias = torch::stable::contiguous(to_type(*bias_in, x.scalar_type()));
  Tensor y = torch::stable::new_empty(x, x.sizes());
  dispatch_compute(x.scalar_type(), "bias_act", [&](auto zero) {
    using T = decltype(zero);
    torch::stable::parallel_for(
        0, x.size(0) * channels, rows_per_task(inner), [&](int64_t begin, int64_t end) {
          for (int64_t row = begin; row < end; ++row) {
            const BiasActRow<T> args{const_data<T>(x) + row * inner,
                                     nullptr,
                                     mutable_data<T>(y) + row * inner,
                                     nullptr,
                                     T(1),
                                     bias ? const_data<T>(*bias)[row % channels] : T(0),
                                     static_cast<T>(slope),
                                     static_cast<T>(gain),
                                     clamp_of<T>(clamp),
                                     inner};
            AVATAR_ISA_CALL(bias_act_row, args);
          }
        });
  });
  return to_type(y, x_in.scalar_type());
}

// Gradients of x and, where sum_bias is set, of the bias (C,), else an empty tensor. `saved` with `bias`
// added has the sign, and where it is clamped the size, of what was activated; without it nothing depends on
// that.
std::tuple<Tensor, Tensor> bias_act_backward_cpu(const Tensor& grad_in, const std::optional<Tensor>& saved_in,
                                                 const std::optional<Tensor>& bias_in, bool sum_bias,
                                                 double slope, double gain, std::optional<double> clamp) {
  const Tensor grad = to_compute(grad_in);
  const int64_t batch = grad.size(0), channels = grad.size(1), inner = inner_size(grad);
  std::optional<Tensor> saved, bias;
  if (saved_in) saved = to_compute(to_type(*saved_in, grad.scalar_type()));
  if (bias_in) bias = to_compute(to_type(*bias_in, grad.scalar_type()));
  Tensor grad_x = torch::stable::new_empty(grad, grad.sizes());
  Tensor grad_bias = torch::stable::new_zeros(grad, {sum_bias ? channels : 0});
  dispatch_compute(grad.scalar_type(), "bias_act_backward", [&](auto zero) {
    using T = decltype(zero);
    std::vector<T> sums(batch * channels);
    torch::stable::parallel_for(0, batch * channels, rows_per_task(inner), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const BiasActBackwardRow<T> args{const_data<T>(grad) + row * inner,
                                         saved ? const_data<T>(*saved) + row * inner : nullptr,
                                         mutable_data<T>(grad_x) + row * inner,
                                         bias ? const_data<T>(*bias)[row % channels] : T(0),
                                         static_cast<T>(slope),
                                         static_cast<T>(gain),
                                         clamp_of<T>(clamp),
                                         inner};
        sums[row] = AVATAR_ISA_CALL(bias_act_backward_row, args);
      }
    });
    if (!sum_bias) return;
    for (int64_t row = 0; row < batch * channels; ++row) {
      mutable_data<T>(grad_bias)[row % channels] += sums[row];
    }
  });
  return {to_type(grad_x, grad_in.scalar_type()), to_type(grad_bias, grad_in.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avatar_ops, CPU, m) {
  m.impl("bias_act", TORCH_BOX(&bias_act_cpu));
  m.impl("bias_act_backward", TORCH_BOX(&bias_act_backward_cpu));
}

}  // namespace avatar
