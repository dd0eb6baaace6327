#include <algorithm>

#include "bias_act/bias_act_simd.h"
#include "common/tensor.h"

namespace avatar {
namespace {

// How x (B, C, ...) splits into rows: one for each channel of each image, or, where those are single numbers,
// one for each sample, with a bias for each number of the row.
struct Rows {
  int64_t channels, count, size;
  bool of_samples;

  explicit Rows(const Tensor& x) : channels(x.size(1)), size(1) {
    for (int64_t dim = 2; dim < x.dim(); ++dim) size *= x.size(dim);
    of_samples = size == 1;
    count = of_samples ? x.size(0) : x.size(0) * channels;
    if (of_samples) size = channels;
  }
  int64_t per_task() const { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, size)); }
  template <typename T>
  T bias_of(int64_t row, const std::optional<Tensor>& bias) const {
    return bias && !of_samples ? const_data<T>(*bias)[row % channels] : T(0);
  }
};

template <typename T>
T clamp_of(const std::optional<double>& clamp) {
  return clamp ? static_cast<T>(*clamp) : std::numeric_limits<T>::infinity();
}

// x (B, C, ...), bias (C,) -> the shape of x.
Tensor bias_act_cpu(const Tensor& x_in, const std::optional<Tensor>& bias_in, double slope, double gain,
                    std::optional<double> clamp) {
  const Tensor x = to_compute(x_in);
  const Rows rows(x);
  std::optional<Tensor> bias;
  if (bias_in) bias = as_contiguous(to_type(*bias_in, x.scalar_type()));
  Tensor y = new_result(x, x.sizes());
  dispatch_compute(x.scalar_type(), "bias_act", [&](auto zero) {
    using T = decltype(zero);
    torch::stable::parallel_for(0, rows.count, rows.per_task(), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const BiasActRow<T> args{const_data<T>(x) + row * rows.size,
                                 bias && rows.of_samples ? const_data<T>(*bias) : nullptr,
                                 mutable_data<T>(y) + row * rows.size,
                                 nullptr,
                                 T(1),
                                 rows.bias_of<T>(row, bias),
                                 static_cast<T>(slope),
                                 static_cast<T>(gain),
                                 clamp_of<T>(clamp),
                                 rows.size};
        AVATAR_ISA_CALL(bias_act_row, args);
      }
    });
  });
  return to_type(y, x_in.scalar_type());
}

// Sums of the columns of (count, size), in an order that does not depend on threads.
template <typename T>
void sum_columns(const T* values, int64_t count, int64_t size, T* sums) {
  constexpr int64_t kBlock = 256;
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  std::vector<T> partial(blocks * size);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      T* target = partial.data() + block * size;
      for (int64_t row = block * kBlock; row < std::min(count, (block + 1) * kBlock); ++row) {
        for (int64_t i = 0; i < size; ++i) target[i] += values[row * size + i];
      }
    }
  });
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t i = 0; i < size; ++i) sums[i] += partial[block * size + i];
  }
}

// Gradients of x and, where sum_bias is set, of the bias (C,), else an empty tensor. `saved` with `bias`
// added has the sign, and where it is clamped the size, of what was activated; without it nothing depends on
// that.
std::tuple<Tensor, Tensor> bias_act_backward_cpu(const Tensor& grad_in, const std::optional<Tensor>& saved_in,
                                                 const std::optional<Tensor>& bias_in, bool sum_bias,
                                                 double slope, double gain, std::optional<double> clamp) {
  const Tensor grad = to_compute(grad_in);
  const Rows rows(grad);
  std::optional<Tensor> saved, bias;
  if (saved_in) saved = to_compute(to_type(*saved_in, grad.scalar_type()));
  if (bias_in) bias = to_compute(to_type(*bias_in, grad.scalar_type()));
  Tensor grad_x = new_result(grad, grad.sizes());
  Tensor grad_bias = torch::stable::new_zeros(grad, {sum_bias ? rows.channels : 0});
  dispatch_compute(grad.scalar_type(), "bias_act_backward", [&](auto zero) {
    using T = decltype(zero);
    std::vector<T> sums(rows.count);
    torch::stable::parallel_for(0, rows.count, rows.per_task(), [&](int64_t begin, int64_t end) {
      std::vector<T> biased(saved && bias && rows.of_samples ? rows.size : 0);
      for (int64_t row = begin; row < end; ++row) {
        const T* values = saved ? const_data<T>(*saved) + row * rows.size : nullptr;
        if (!biased.empty()) {
          const T* added = const_data<T>(*bias);
          for (int64_t i = 0; i < rows.size; ++i) biased[i] = values[i] + added[i];
          values = biased.data();
        }
        const BiasActBackwardRow<T> args{const_data<T>(grad) + row * rows.size,
                                         values,
                                         mutable_data<T>(grad_x) + row * rows.size,
                                         rows.bias_of<T>(row, bias),
                                         static_cast<T>(slope),
                                         static_cast<T>(gain),
                                         clamp_of<T>(clamp),
                                         rows.size};
        sums[row] = AVATAR_ISA_CALL(bias_act_backward_row, args);
      }
    });
    if (!sum_bias) return;
    T* target = mutable_data<T>(grad_bias);
    if (rows.of_samples) {
      sum_columns(const_data<T>(grad_x), rows.count, rows.size, target);
    } else {
      for (int64_t row = 0; row < rows.count; ++row) target[row % rows.channels] += sums[row];
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
