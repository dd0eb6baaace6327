#include <cmath>

#include "linear_act/linear_act_cpu.h"

namespace avatar {
namespace {

// Of a linear map and the normalisation that follows it.
struct NormedLayer {
  const Tensor weight, bias, scale, shift, mean, variance;

  explicit NormedLayer(const Tensor* parts)
      : weight(to_compute(parts[0])),
        bias(to_compute(parts[1])),
        scale(to_compute(parts[2])),
        shift(to_compute(parts[3])),
        mean(to_compute(parts[4])),
        variance(to_compute(parts[5])) {
    for (const Tensor* part : {&bias, &scale, &shift, &mean, &variance}) {
      if (part->numel() == weight.size(0)) continue;
      throw std::invalid_argument("linear_norm_fold: got " + std::to_string(part->numel()) +
                                  " numbers in a layer of " + std::to_string(weight.size(0)) +
                                  " outputs, expected one for each");
    }
  }

  // Writes rows `stride` apart, and adds to the bias or sets it.
  template <typename T>
  void fold(T eps, T* to_weight, int64_t stride, T* to_bias, bool adds) const {
    const int64_t rows = weight.size(0), columns = weight.size(1);
    const T *w = const_data<T>(weight), *b = const_data<T>(bias), *g = const_data<T>(scale);
    const T *s = const_data<T>(shift), *m = const_data<T>(mean), *v = const_data<T>(variance);
    torch::stable::parallel_for(0, rows, 1 + 16384 / (columns + 1), [=](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T factor = g[row] / std::sqrt(v[row] + eps);
        for (int64_t c = 0; c < columns; ++c) to_weight[row * stride + c] = w[row * columns + c] * factor;
        to_bias[row] = (adds ? to_bias[row] : T(0)) + (b[row] - m[row]) * factor + s[row];
      }
    });
  }
};

std::vector<Tensor> linear_norm_fold_cpu(std::vector<Tensor> parts, std::vector<double> eps) {
  std::vector<Tensor> folded;
  for (size_t l = 0; l < eps.size(); ++l) {
    LinearMap map = fold_norms(parts.data() + l * kNormedParts, eps.data() + l, 1);
    folded.push_back(std::move(map.weight));
    folded.push_back(std::move(map.bias));
  }
  return folded;
}

}  // namespace

LinearMap fold_norms(const Tensor* parts, const double* eps, size_t count) {
  std::vector<NormedLayer> layers;
  int64_t inputs = 0;
  for (size_t l = 0; l < count; ++l) {
    layers.emplace_back(parts + l * kNormedParts);
    inputs += layers.back().weight.size(1);
  }
  const Tensor& first = layers[0].weight;
  const LinearMap map{torch::stable::new_empty(first, {first.size(0), inputs}),
                      torch::stable::new_empty(first, {first.size(0)})};
  dispatch_compute(first.scalar_type(), "linear_norm_fold", [&](auto zero) {
    using T = decltype(zero);
    T* to_weight = mutable_data<T>(map.weight);
    for (size_t l = 0; l < count; ++l) {
      layers[l].fold(static_cast<T>(eps[l]), to_weight, inputs, mutable_data<T>(map.bias), l > 0);
      to_weight += layers[l].weight.size(1);
    }
  });
  return {to_type(map.weight, parts[0].scalar_type()), to_type(map.bias, parts[1].scalar_type())};
}

STABLE_TORCH_LIBRARY_IMPL(avatar_ops, CPU, m) {
  m.impl("linear_norm_fold", TORCH_BOX(&linear_norm_fold_cpu));
}

}  // namespace avatar
