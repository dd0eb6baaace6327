#include <cmath>

#include "common/tensor.h"

namespace avatar {
namespace {

// Of a linear map and the normalisation that follows it.
struct NormedLayer {
  static constexpr size_t kParts = 6;
  const Tensor weight, bias, scale, shift, mean, variance;
  // Those of both at once.
  const Tensor folded_weight, folded_bias;

  explicit NormedLayer(const Tensor* parts)
      : weight(to_compute(parts[0])),
        bias(to_compute(parts[1])),
        scale(to_compute(parts[2])),
        shift(to_compute(parts[3])),
        mean(to_compute(parts[4])),
        variance(to_compute(parts[5])),
        folded_weight(torch::stable::new_empty(weight, {weight.size(0), weight.size(1)})),
        folded_bias(torch::stable::new_empty(weight, {weight.size(0)})) {}

  template <typename T>
  void fold(T eps) const {
    const int64_t rows = weight.size(0), columns = weight.size(1);
    const T *w = const_data<T>(weight), *b = const_data<T>(bias), *g = const_data<T>(scale);
    const T *s = const_data<T>(shift), *m = const_data<T>(mean), *v = const_data<T>(variance);
    T *to_weight = mutable_data<T>(folded_weight), *to_bias = mutable_data<T>(folded_bias);
    torch::stable::parallel_for(0, rows, 1 + 16384 / (columns + 1), [=](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T factor = g[row] / std::sqrt(v[row] + eps);
        for (int64_t c = 0; c < columns; ++c) to_weight[row * columns + c] = w[row * columns + c] * factor;
        to_bias[row] = (b[row] - m[row]) * factor + s[row];
      }
    });
  }
};

// For each layer its weight and bias, the scale, shift, mean and variance of its norm: weight and bias that
// do both.
std::vector<Tensor> linear_norm_fold_cpu(std::vector<Tensor> parts, std::vector<double> eps) {
  std::vector<Tensor> folded;
  for (size_t l = 0; l < eps.size(); ++l) {
    const Tensor* own = parts.data() + l * NormedLayer::kParts;
    const NormedLayer layer(own);
    dispatch_compute(layer.weight.scalar_type(), "linear_norm_fold",
                     [&](auto zero) { layer.fold(static_cast<decltype(zero)>(eps[l])); });
    folded.push_back(to_type(layer.folded_weight, own[0].scalar_type()));
    folded.push_back(to_type(layer.folded_bias, own[1].scalar_type()));
  }
  return folded;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avatar_ops, CPU, m) {
  m.impl("linear_norm_fold", TORCH_BOX(&linear_norm_fold_cpu));
}

}  // namespace avatar
