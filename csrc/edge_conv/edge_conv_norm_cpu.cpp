// edge_conv with batch normalisation by the statistics of the edges that exist. A channel whose gamma is
// negative runs with its weight negated, so that the largest edge is always that of the smallest q.
#include "edge_conv/edge_conv_plan.h"

namespace avatar {
namespace {

// One reference point serves the whole batch, since the statistics do; u carries no constant.
template <typename T>
EdgePlan<T> norm_plan(const Tensor& x, const Tensor& neighbors, const Tensor& weight,
                      const std::vector<T>& signs) {
  EdgePlan<T> plan = edge_plan(x, neighbors, to_vector<T>(weight), signs);
  std::vector<T> reference(plan.input_stride, 0);
  find_reference(plan, 0, plan.rows(), reference.data());
  for (int64_t b = 0; b < plan.batch; ++b) {
    std::copy(reference.begin(), reference.end(), plan.reference.begin() + b * plan.input_stride);
  }
  return plan;
}

template <typename T>
std::vector<T> signs_of(const std::vector<T>& gamma) {
  std::vector<T> signs(gamma.size());
  std::transform(gamma.begin(), gamma.end(), signs.begin(), [](T value) { return T(value < 0 ? -1 : 1); });
  return signs;
}

template <typename T>
std::vector<T> inverse_deviations(const std::vector<T>& variance, double eps, int64_t stride) {
  std::vector<T> inverse(stride, 0);
  for (size_t o = 0; o < variance.size(); ++o) inverse[o] = T(1 / std::sqrt(double(variance[o]) + eps));
  return inverse;
}

template <typename T>
void normalize(T* __restrict values, const T* __restrict center, const T* __restrict scale,
               const T* __restrict shift, int64_t channels, T negative_slope) {
  for (int64_t o = 0; o < channels; ++o) {
    const T value = (values[o] - center[o]) * scale[o] + shift[o];
    values[o] = value > 0 ? value : value * negative_slope;
  }
}

// Output, slots, number of edges, mean, biased variance, and the mean of the centred and signed form.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> edge_conv_norm_cpu(
    const Tensor& x_in, const Tensor& neighbors_in, const Tensor& weight, const Tensor& gamma_in,
    const Tensor& beta_in, double eps, double negative_slope, bool keep_slots) {
  const Tensor x = to_compute(x_in), neighbors = as_contiguous(neighbors_in);
  const int64_t batch = x.size(0), num_points = x.size(1), k = neighbors.size(2);
  const int64_t channels = weight.size(0), stride = pad_columns(channels);
  Tensor output = torch::stable::new_empty(x, {batch, num_points, channels});
  Tensor slots = keep_slots ? torch::stable::new_empty(x, {batch, num_points, stride}, slot_type(k))
                            : torch::stable::new_empty(x, {0}, slot_type(k));
  Tensor products = torch::stable::new_empty(x, {batch, num_points, stride});
  Tensor count = torch::stable::new_empty(neighbors, {});
  std::vector<Tensor> statistics;
  FirstBad bad;
  dispatch_compute(x.scalar_type(), "edge_conv_norm", [&](auto zero) {
    using T = decltype(zero);
    const std::vector<T> gamma = to_vector<T>(gamma_in), beta = to_vector<T>(beta_in);
    const std::vector<T> signs = signs_of(gamma);
    const EdgePlan<T> plan = norm_plan(x, neighbors, weight, signs);
    std::vector<int64_t> constant_channels;
    for (int64_t o = 0; o < channels; ++o) {
      if (gamma[o] == 0) constant_channels.push_back(o);
    }
    const bool ordered = neighbor_products(plan, mutable_data<T>(products));
    const int64_t input_tile = kBlockRows * plan.input_stride;
    std::vector<T> means(plan.blocks() * stride, 0), squares(plan.blocks() * stride, 0);
    std::vector<int64_t> counts(plan.blocks(), 0);
    for_each_block(plan, input_tile + kBlockRows * stride, [&](int64_t n, const EdgeBlock& block, T* tile) {
      T* u = tile + input_tile;
      copy_centered_rows(plan, block, tile);
      own_products(plan, block, tile, u);
      const int64_t first_row = block.cloud * num_points;
      const EdgeGatherArgs<T> args{edge_cloud(plan, const_data<T>(products), ordered, block.cloud),
                                   mutable_data<T>(output) + first_row * channels,
                                   keep_slots ? slots_at(plan, slots.mutable_data_ptr(), first_row) : nullptr,
                                   T(1),
                                   false,
                                   constant_channels.data(),
                                   int64_t(constant_channels.size())};
      EdgeStatistics<T> part{means.data() + n * stride, squares.data() + n * stride, 0};
      const int64_t position = AVATAR_ISA_CALL(edge_conv_gather, args, block.begin, block.end, u, &part);
      if (position >= 0) bad.report(first_row * k + position);
      counts[n] = part.count;
    });
    if (bad.found()) return;

    int64_t edges = 0;
    std::vector<double> mean(channels, 0), variance(channels, 0);
    for (int64_t n = 0; n < plan.blocks(); ++n) {
      if (counts[n] == 0) continue;
      const double share = double(counts[n]) / double(edges + counts[n]);
      for (int64_t o = 0; o < channels; ++o) {
        const double step = means[n * stride + o] - mean[o];
        mean[o] += step * share;
        variance[o] += squares[n * stride + o] + step * step * (double(edges) * share);
      }
      edges += counts[n];
    }
    for (double& value : variance) value /= double(std::max<int64_t>(edges, 1));

    const std::vector<T> center(mean.begin(), mean.end());
    const std::vector<T> inverse =
        inverse_deviations(std::vector<T>(variance.begin(), variance.end()), eps, stride);
    std::vector<T> scale(channels);
    for (int64_t o = 0; o < channels; ++o) scale[o] = inverse[o] * std::abs(gamma[o]);
    for_each_block(plan, 0, [&](int64_t, const EdgeBlock& block, T*) {
      for (int64_t row = block.begin; row < block.end; ++row) {
        const int64_t flat = block.cloud * num_points + row;
        T* out = mutable_data<T>(output) + flat * channels;
        if (!is_empty_row(plan, flat))
          normalize(out, center.data(), scale.data(), beta.data(), channels, T(negative_slope));
      }
    });

    *mutable_data<int64_t>(count) = edges;
    std::vector<double> true_mean(channels, 0);
    if (edges > 0) true_mean = own_product(plan, plan.reference.data());
    for (int64_t o = 0; o < channels; ++o) true_mean[o] = signs[o] * (mean[o] + true_mean[o]);
    const ScalarType type = x.scalar_type();
    statistics = {from_double<T>(true_mean, {channels}, x, type),
                  from_double<T>(variance, {channels}, x, type), from_double<T>(mean, {channels}, x, type)};
  });
  raise_bad_neighbor(bad, "edge_conv_norm", neighbors, num_points);
  return {to_type(output, x_in.scalar_type()), slots, count, statistics[0], statistics[1], statistics[2]};
}

// Gradients in x, weight, gamma and beta. With z = |gamma| n + beta, n = (h - mean) / deviation over E edges
// and g the gradient of z, which is zero but on the largest edges,
//   dL/dh_e = |gamma| / deviation * (g_e - sum(g) / E - n_e sum(g n) / E)
// Source: Ioffe and Szegedy, Batch Normalization, ICML 2015, section 3.
std::tuple<Tensor, Tensor, Tensor, Tensor> edge_conv_norm_backward_cpu(
    const Tensor& grad_in, const Tensor& output_in, const Tensor& slots_in, const Tensor& x_in,
    const Tensor& neighbors_in, const Tensor& weight, const Tensor& gamma_in, const Tensor& count_in,
    const Tensor& variance_in, const Tensor& center_in, double eps, double negative_slope) {
  const Tensor grad = to_compute(grad_in), output = to_compute(output_in), x = to_compute(x_in);
  const Tensor neighbors = as_contiguous(neighbors_in), slots = as_contiguous(slots_in);
  const int64_t batch = x.size(0), num_points = x.size(1), channels = weight.size(0);
  const double edges = double(std::max<int64_t>(*const_data<int64_t>(count_in), 1));
  Tensor grad_x = torch::stable::new_empty(x, {batch, num_points, x.size(2)});
  std::vector<Tensor> grads;
  dispatch_compute(x.scalar_type(), "edge_conv_norm_backward", [&](auto zero) {
    using T = decltype(zero);
    const std::vector<T> gamma = to_vector<T>(gamma_in), signs = signs_of(gamma);
    const EdgePlan<T> plan = norm_plan(x, neighbors, weight, signs);
    const int64_t stride = plan.stride;
    std::vector<T> center = to_vector<T>(center_in);
    center.resize(stride, 0);
    const std::vector<T> inverse = inverse_deviations(to_vector<T>(variance_in), eps, stride);
    const std::vector<int64_t> shape{batch, num_points, stride};
    Tensor products = torch::stable::new_empty(x, shape), linear = torch::stable::new_empty(x, shape);
    Tensor centers = torch::stable::new_empty(x, shape), deviations = torch::stable::new_empty(x, shape);
    const T* q = const_data<T>(products);
    const bool ordered = neighbor_products(plan, mutable_data<T>(products));
    std::vector<T> grad_sums(plan.blocks() * stride, 0), normalized_sums(plan.blocks() * stride, 0);
    const int64_t input_tile = kBlockRows * plan.input_stride;
    for_each_block(plan, input_tile + kBlockRows * stride, [&](int64_t n, const EdgeBlock& block, T* tile) {
      T* u = tile + input_tile;
      copy_centered_rows(plan, block, tile);
      own_products(plan, block, tile, u);
      const int64_t first_row = block.cloud * num_points;
      const EdgeNormBackwardArgs<T> args{edge_cloud(plan, q, ordered, block.cloud),
                                         const_data<T>(grad) + first_row * channels,
                                         const_data<T>(output) + first_row * channels,
                                         slots_at(plan, slots.mutable_data_ptr(), first_row),
                                         center.data(),
                                         inverse.data(),
                                         T(negative_slope),
                                         mutable_data<T>(linear) + first_row * stride,
                                         mutable_data<T>(centers) + first_row * stride,
                                         mutable_data<T>(deviations) + first_row * stride};
      AVATAR_ISA_CALL(edge_conv_norm_backward, args, block.begin, block.end, u, grad_sums.data() + n * stride,
                      normalized_sums.data() + n * stride);
    });
    const std::vector<double> sums = sum_blocks(plan, grad_sums);
    const std::vector<double> sums_normalized = sum_blocks(plan, normalized_sums);
    std::vector<T> factor(stride, 0), mean_grad(stride, 0), slope_grad(stride, 0);
    for (int64_t o = 0; o < channels; ++o) {
      factor[o] = std::abs(gamma[o]) * inverse[o];
      mean_grad[o] = T(sums[o] / edges);
      slope_grad[o] = T(sums_normalized[o] * inverse[o] / edges);
    }

    const ReverseAdjacency reverse = reverse_adjacency(plan.neighbors, batch, num_points, plan.k, num_points);
    const auto combine = [&](const EdgeBlock& block, const int64_t* offsets, T* grad_neighbor,
                             const T* incoming_deviations, T* grad_own) {
      for (int64_t row = block.begin; row < block.end; ++row) {
        const int64_t flat = block.cloud * num_points + row;
        const int64_t* slots_of_row = plan.neighbors + flat * plan.k;
        const T outgoing =
            T(std::count_if(slots_of_row, slots_of_row + plan.k, [](int64_t p) { return p >= 0; }));
        const T incoming = T(offsets[row + 1] - offsets[row]);
        const T* own = const_data<T>(linear) + flat * stride;
        const T* own_deviations = const_data<T>(deviations) + flat * stride;
        const int64_t at = (row - block.begin) * stride;
        for (int64_t o = 0; o < stride; ++o) {
          const T from = factor[o] * (own[o] - outgoing * mean_grad[o] - slope_grad[o] * own_deviations[o]);
          const T to = factor[o] * (grad_neighbor[at + o] - incoming * mean_grad[o] -
                                    slope_grad[o] * incoming_deviations[at + o]);
          grad_own[at + o] = from;
          grad_neighbor[at + o] = from - to;
        }
      }
    };
    std::vector<double> grad_weight =
        edge_gradients<T>(plan, reverse, const_data<T>(linear), slots.mutable_data_ptr(),
                          const_data<T>(centers), q, mutable_data<T>(grad_x), true, combine);
    const int64_t inputs = 2 * plan.inputs;
    std::vector<double> grad_gamma(channels), grad_beta(channels);
    for (int64_t o = 0; o < channels; ++o) {
      grad_beta[o] = sums[o];
      grad_gamma[o] = signs[o] * sums_normalized[o];
      for (int64_t c = 0; c < inputs; ++c) grad_weight[o * inputs + c] *= signs[o];
    }
    grads = {from_double<T>(grad_weight, {channels, inputs}, x, weight.scalar_type()),
             from_double<T>(grad_gamma, {channels}, x, gamma_in.scalar_type()),
             from_double<T>(grad_beta, {channels}, x, gamma_in.scalar_type())};
  });
  return {to_type(grad_x, x_in.scalar_type()), grads[0], grads[1], grads[2]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avatar_ops, CPU, m) {
  m.impl("edge_conv_norm", TORCH_BOX(&edge_conv_norm_cpu));
  m.impl("edge_conv_norm_backward", TORCH_BOX(&edge_conv_norm_backward_cpu));
}

}  // namespace avatar
