// Layers over points, for ops that are made of them.
#pragma once

#include "common/tensor.h"

namespace avatar {

struct LinearMap {
  Tensor weight, bias;  // (O, I), (O,)
};

// Of a linear map its weight and bias, of the norm that follows it scale, shift, mean and variance.
constexpr size_t kNormedParts = 6;

// One linear map that does `count` maps of inputs side by side, each with its norm, and sums what they give.
// All have as many outputs.
LinearMap fold_norms(const Tensor* parts, const double* eps, size_t count);

Tensor linear_act_cpu(const Tensor& x, const std::optional<Tensor>& beside, const Tensor& weight,
                      const std::optional<Tensor>& bias, const std::optional<Tensor>& rest,
                      const std::optional<Tensor>& places, double negative_slope);

Tensor linear_act_layers_cpu(const Tensor& x, const std::optional<Tensor>& beside,
                             std::vector<Tensor> weights, std::vector<Tensor> biases,
                             const std::optional<Tensor>& rest, const std::optional<Tensor>& places,
                             const std::optional<Tensor>& targets, std::vector<double> negative_slopes);

}  // namespace avatar
