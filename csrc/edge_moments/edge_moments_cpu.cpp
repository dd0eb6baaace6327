#include <algorithm>

#include "common/position_weights.h"
#include "edge_moments/edge_moments_simd.h"

namespace avatar {
namespace {

Tensor flat_points(const Tensor& points) {
  return torch::stable::view(to_compute(points), {points.size(0) * points.size(1), points.size(2)});
}

// points (B, N, D), neighbors (B, N, K) int64, layers of the position network
// -> mean (P,), covariance (P, P), both over all edges, number of edges (); all float64.
std::tuple<Tensor, Tensor, Tensor> edge_moments_cpu(const Tensor& points_in, const Tensor& neighbors_in,
                                                    std::vector<Tensor> weight, std::vector<Tensor> bias,
                                                    double negative_slope) {
  const Tensor points = flat_points(points_in);
  const Tensor neighbors = as_contiguous(neighbors_in);
  const int64_t rows = points.size(0), cloud = neighbors.size(1), k = neighbors.size(2);
  const Tensor like = to_type(torch::stable::new_empty(points, {0}), ScalarType::Double);
  std::optional<Tensor> mean, covariance;
  Tensor count = torch::stable::new_empty(like, {});
  FirstBad bad;
  dispatch_compute(points.scalar_type(), "edge_moments", [&](auto zero) {
    using T = decltype(zero);
    const TileLayout<T> layout{current_isa()};
    PositionWeights<T> position(layout, points, weight, bias, negative_slope);
    position.add_center_part();
    const EdgeMomentsArgs<T> args{position.mlp(), const_data<int64_t>(neighbors), k, cloud};
    const int64_t width = args.position.out_padded, size = width * (width + 1);
    // Blocks of rows do not depend on the number of threads, nor does the order in which they are merged.
    const int64_t blocks = std::clamp<int64_t>(rows / std::max<int64_t>(256, width), 1, 64);
    const int64_t rows_a_block = (rows + blocks - 1) / blocks;
    std::vector<double> numbers(blocks * size, 0.);
    std::vector<EdgeMoments> moments(blocks);
    parallel_tasks(blocks, [&](int64_t b) {
      moments[b] = {0., numbers.data() + b * size, numbers.data() + b * size + width};
      const int64_t begin = std::min(b * rows_a_block, rows), end = std::min(begin + rows_a_block, rows);
      bad.report(AVATAR_ISA_CALL(edge_moments_rows, args, begin, end, moments[b]));
    });
    raise_bad_neighbor(bad, "edge_moments", neighbors, cloud);
    for (int64_t b = 1; b < blocks; ++b) {
      AVATAR_ISA_CALL(merge_edge_moments, moments[b], width, moments[0]);
    }
    const int64_t channels = position.width();
    mean = torch::stable::new_empty(like, {channels});
    covariance = torch::stable::new_empty(like, {channels, channels});
    mutable_data<double>(count)[0] = moments[0].count;
    std::copy_n(moments[0].mean, channels, mutable_data<double>(*mean));
    double* entries = mutable_data<double>(*covariance);
    for (int64_t i = 0; i < channels; ++i) {
      for (int64_t j = 0; j < channels; ++j) {
        entries[i * channels + j] = moments[0].scatter[i * width + j] / std::max(moments[0].count, 1.);
      }
    }
  });
  return {*mean, *covariance, count};
}

// Gradients of points (empty unless `points_gradient`); of weights and then biases.
std::tuple<Tensor, std::vector<Tensor>> edge_moments_backward_cpu(
    const Tensor& grad_mean_in, const Tensor& grad_covariance_in, const Tensor& points_in,
    const Tensor& neighbors_in, std::vector<Tensor> weight, std::vector<Tensor> bias, const Tensor& mean_in,
    const Tensor& count_in, double negative_slope, bool points_gradient) {
  const Tensor points = flat_points(points_in);
  const Tensor neighbors = as_contiguous(neighbors_in);
  const Tensor grad_mean = as_contiguous(grad_mean_in);
  const Tensor grad_covariance = as_contiguous(grad_covariance_in);
  const int64_t batch = neighbors.size(0), cloud = neighbors.size(1), dims = points.size(1);
  const int64_t channels = mean_in.size(0);
  const double count = std::max(const_data<double>(count_in)[0], 1.);
  const double* by_mean = const_data<double>(grad_mean);
  const double* by_covariance = const_data<double>(grad_covariance);
  const double* mean_of = const_data<double>(mean_in);
  Tensor grad_points = torch::stable::new_zeros(points, {points_gradient ? batch : 0, cloud, dims});
  std::vector<Tensor> grad_layers;
  dispatch_compute(points.scalar_type(), "edge_moments_backward", [&](auto zero) {
    using T = decltype(zero);
    FirstBad bad;
    bad.report(first_bad_neighbor(const_data<int64_t>(neighbors), batch * cloud * neighbors.size(2), cloud));
    raise_bad_neighbor(bad, "edge_moments_backward", neighbors, cloud);
    const TileLayout<T> layout{current_isa()};
    PositionWeights<T> position(layout, points, weight, bias, negative_slope);
    position.add_center_part();
    position.add_transposed();
    const int64_t width = position.mlp().out_padded;
    std::vector<T> mean(width, T(0)), constant(width, T(0));
    for (int64_t i = 0; i < channels; ++i) {
      mean[i] = static_cast<T>(mean_of[i]);
      constant[i] = static_cast<T>(by_mean[i] / count);
    }
    const auto slope = layout.pack(width, width, [&](int64_t i, int64_t j) {
      if (i >= channels || j >= channels) return T(0);
      return static_cast<T>((by_covariance[i * channels + j] + by_covariance[j * channels + i]) / count);
    });
    EdgeMomentsBackwardArgs<T> args{position.mlp(), {}, mean.data(), constant.data(), slope.get()};
    const std::vector<T> weights =
        backward_by_points<T>(neighbors, position.gradient_size(), dims, width,
                              points_gradient ? mutable_data<T>(grad_points) : nullptr,
                              [&](const IncomingEdges<T>& incoming, int64_t begin, int64_t end, T* block) {
                                EdgeMomentsBackwardArgs<T> round = args;
                                round.incoming = incoming;
                                AVATAR_ISA_CALL(edge_moments_backward_points, round, begin, end, block);
                              });
    for (const Tensor& gradient : position.gradients(weights.data())) {
      grad_layers.push_back(to_type(gradient, points_in.scalar_type()));
    }
  });
  return {to_type(grad_points, points_in.scalar_type()), grad_layers};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avatar_ops, CPU, m) {
  m.impl("edge_moments", TORCH_BOX(&edge_moments_cpu));
  m.impl("edge_moments_backward", TORCH_BOX(&edge_moments_backward_cpu));
}

}  // namespace avatar
