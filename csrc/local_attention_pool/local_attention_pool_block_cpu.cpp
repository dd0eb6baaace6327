#include "linear_act/linear_act_cpu.h"
#include "local_attention_pool/local_attention_pool_cpu.h"

namespace avatar {
namespace {

enum BlockLayer : size_t { kReduce, kEncode, kEncodeNext, kAttend, kAttendNext, kExpand, kShortcut, kLayers };

std::string shape(int64_t rows, int64_t columns) {
  return "(" + std::to_string(rows) + ", " + std::to_string(columns) + ")";
}

void check_matrix(const std::string& name, const Tensor& matrix, int64_t rows, int64_t columns) {
  const int64_t own_rows = matrix.size(0), own_columns = matrix.size(1);
  if (own_rows == rows && own_columns == columns) return;
  throw std::invalid_argument("local_attention_pool_block: " + name + ": got shape " +
                              shape(own_rows, own_columns) + ", expected " + shape(rows, columns));
}

// Layers and scores of points and features of these widths.
void check_weights(const std::vector<Tensor>& parts, const std::vector<double>& eps,
                   const std::vector<Tensor>& scores, int64_t inputs, int64_t dims) {
  if (parts.size() != kLayers * kNormedParts || eps.size() != kLayers || scores.size() != 2) {
    throw std::invalid_argument("local_attention_pool_block: layers: expected 7 of 6 tensors, and 2 scores");
  }
  const int64_t width = scores[0].size(0), half = width / 2;
  const int64_t sizes[kLayers][2] = {{half, inputs}, {half, 3 * dims + 1}, {half, half},       {half, width},
                                     {width, width}, {2 * width, width},   {2 * width, inputs}};
  for (size_t l = 0; l < kLayers; ++l) {
    check_matrix("layers[" + std::to_string(l) + "]", parts[l * kNormedParts], sizes[l][0], sizes[l][1]);
  }
  for (const Tensor& score : scores) check_matrix("scores", score, width, width);
}

// The whole block of nn.LocalFeatureAggregation by running statistics: points (B, N, D), features (B, N, C),
// neighbors (B, N, K) int64, kNormedParts tensors and an epsilon for each layer, two scores (d, d)
// -> (B, N, 2 d).
Tensor local_attention_pool_block_cpu(const Tensor& points, const Tensor& features, const Tensor& neighbors,
                                      std::vector<Tensor> parts, std::vector<double> eps,
                                      std::vector<Tensor> scores, double negative_slope) {
  check_weights(parts, eps, scores, features.size(2), points.size(2));
  const auto fold = [&](BlockLayer first, size_t count = 1) {
    return fold_norms(parts.data() + first * kNormedParts, eps.data() + first, count);
  };
  const auto layer = [&](const Tensor& rows, const LinearMap& map) {
    return linear_act_cpu(rows, std::nullopt, map.weight, map.bias, std::nullopt, std::nullopt,
                          negative_slope);
  };
  std::vector<Tensor> weights, biases;
  const auto pool = [&](const Tensor& rows, BlockLayer encode, const Tensor& score) {
    const LinearMap map = fold(encode);
    weights.push_back(map.weight);
    biases.push_back(map.bias);
    return std::get<0>(local_attention_pool_cpu(points, rows, neighbors, weights, biases, score,
                                                negative_slope, /*save_statistics=*/false));
  };
  // Rows that are done with are handed back at each step.
  Tensor x = layer(features, fold(kReduce));
  x = pool(x, kEncode, scores[0]);
  x = layer(x, fold(kAttend));
  x = pool(x, kEncodeNext, scores[1]);
  const LinearMap attend = fold(kAttendNext), ends = fold(kExpand, 2);
  return linear_act_layers_cpu(x, features, {attend.weight, ends.weight}, {attend.bias, ends.bias},
                               std::nullopt, std::nullopt, std::nullopt, {negative_slope, negative_slope});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avatar_ops, CPU, m) {
  m.impl("local_attention_pool_block", TORCH_BOX(&local_attention_pool_block_cpu));
}

}  // namespace avatar
