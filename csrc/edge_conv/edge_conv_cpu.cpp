#include "edge_conv/edge_conv_plan.h"

namespace avatar {
namespace {

// Row o of the linear map is scale_o * (W_o e + bias_o) + shift_o: with it folded into the weight, the
// largest edge is that of the smallest q whatever the sign of the scale.
template <typename T>
struct EdgeFold {
  std::vector<T> weight, bias, scale, shift;

  EdgeFold(const Tensor& weight_in, const std::optional<Tensor>& bias_in,
           const std::optional<Tensor>& scale_in, const std::optional<Tensor>& shift_in)
      : weight(to_vector<T>(weight_in)),
        bias(weight_in.size(0), 0),
        scale(weight_in.size(0), 1),
        shift(weight_in.size(0), 0) {
    if (bias_in) bias = to_vector<T>(*bias_in);
    if (scale_in) scale = to_vector<T>(*scale_in);
    if (shift_in) shift = to_vector<T>(*shift_in);
  }

  EdgePlan<T> plan(const Tensor& x, const Tensor& neighbors) const {
    EdgePlan<T> plan = edge_plan(x, neighbors, weight, scale);
    for (int64_t b = 0; b < plan.batch; ++b) {
      T* reference = plan.reference.data() + b * plan.input_stride;
      find_reference(plan, b * plan.num_points, (b + 1) * plan.num_points, reference);
      const std::vector<double> product = own_product(plan, reference);
      for (int64_t o = 0; o < plan.channels; ++o) {
        plan.constant[b * plan.stride + o] = T(product[o] + double(scale[o]) * bias[o] + shift[o]);
      }
    }
    return plan;
  }
};

std::tuple<Tensor, Tensor> edge_conv_cpu(const Tensor& x_in, const Tensor& neighbors_in, const Tensor& weight,
                                         const std::optional<Tensor>& bias,
                                         const std::optional<Tensor>& scale,
                                         const std::optional<Tensor>& shift, double negative_slope,
                                         bool keep_slots) {
  const Tensor x = to_compute(x_in), neighbors = as_contiguous(neighbors_in);
  const int64_t batch = x.size(0), num_points = x.size(1), k = neighbors.size(2);
  const int64_t channels = weight.size(0), stride = pad_columns(channels);
  Tensor output = new_result(x, {batch, num_points, channels});
  Tensor slots = keep_slots ? torch::stable::new_empty(x, {batch, num_points, stride}, slot_type(k))
                            : torch::stable::new_empty(x, {0}, slot_type(k));
  Tensor products = new_result(x, {batch, num_points, stride});
  FirstBad bad;
  dispatch_compute(x.scalar_type(), "edge_conv", [&](auto zero) {
    using T = decltype(zero);
    const EdgePlan<T> plan = EdgeFold<T>(weight, bias, scale, shift).plan(x, neighbors);
    const bool ordered = neighbor_products(plan, mutable_data<T>(products));
    const int64_t input_tile = kBlockRows * plan.input_stride;
    for_each_block(plan, input_tile + kBlockRows * stride, [&](int64_t, const EdgeBlock& block, T* tile) {
      T* u = tile + input_tile;
      copy_centered_rows(plan, block, tile);
      own_products(plan, block, tile, u);
      const int64_t first_row = block.cloud * num_points;
      const EdgeGatherArgs<T> args{edge_cloud(plan, const_data<T>(products), ordered, block.cloud),
                                   mutable_data<T>(output) + first_row * channels,
                                   keep_slots ? slots_at(plan, slots.mutable_data_ptr(), first_row) : nullptr,
                                   T(negative_slope),
                                   true,
                                   nullptr,
                                   0};
      const int64_t position = AVATAR_ISA_CALL(edge_conv_gather, args, block.begin, block.end, u, nullptr);
      if (position >= 0) bad.report(first_row * k + position);
    });
  });
  raise_bad_neighbor(bad, "edge_conv", neighbors, num_points);
  return {to_type(output, x_in.scalar_type()), slots};
}

// Gradients in x, weight, bias, scale and shift.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> edge_conv_backward_cpu(
    const Tensor& grad_in, const Tensor& output_in, const Tensor& slots_in, const Tensor& x_in,
    const Tensor& neighbors_in, const Tensor& weight, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& scale, double negative_slope) {
  const Tensor grad = to_compute(grad_in), output = to_compute(output_in), x = to_compute(x_in);
  const Tensor neighbors = as_contiguous(neighbors_in), slots = as_contiguous(slots_in);
  const int64_t batch = x.size(0), num_points = x.size(1), channels = weight.size(0);
  Tensor grad_x = torch::stable::new_empty(x, {batch, num_points, x.size(2)});
  std::vector<Tensor> grads;
  dispatch_compute(x.scalar_type(), "edge_conv_backward", [&](auto zero) {
    using T = decltype(zero);
    const EdgeFold<T> fold(weight, bias, scale, std::nullopt);
    const EdgePlan<T> plan = fold.plan(x, neighbors);
    const int64_t stride = plan.stride;
    Tensor linear = torch::stable::new_empty(x, {batch, num_points, stride});
    T* grad_linear = mutable_data<T>(linear);
    std::vector<T> block_sums(plan.blocks() * stride, 0);
    for_each_block(plan, 0, [&](int64_t n, const EdgeBlock& block, T*) {
      for (int64_t row = block.begin; row < block.end; ++row) {
        const int64_t flat = block.cloud * num_points + row;
        const T* from = const_data<T>(grad) + flat * channels;
        const T* out = const_data<T>(output) + flat * channels;
        T* to = grad_linear + flat * stride;
        T* sums = block_sums.data() + n * stride;
        std::fill_n(to, stride, T(0));
        if (is_empty_row(plan, flat)) continue;
        for (int64_t c = 0; c < channels; ++c) {
          to[c] = out[c] > 0 ? from[c] : from[c] * T(negative_slope);
          sums[c] += to[c];
        }
      }
    });
    const ReverseAdjacency reverse = reverse_adjacency(plan.neighbors, batch, num_points, plan.k, num_points);
    const auto combine = [&](const EdgeBlock& block, const int64_t*, T* sums, const T*, T* grad_own) {
      const T* own = grad_linear + (block.cloud * num_points + block.begin) * stride;
      for (int64_t c = 0; c < block.rows() * stride; ++c) {
        grad_own[c] = own[c];
        sums[c] = own[c] - sums[c];
      }
    };
    const std::vector<double> folded =
        edge_gradients<T>(plan, reverse, grad_linear, slots.mutable_data_ptr(), nullptr, nullptr,
                          mutable_data<T>(grad_x), false, combine);
    const std::vector<double> sums = sum_blocks(plan, block_sums);

    const int64_t inputs = 2 * plan.inputs;
    std::vector<double> grad_weight(folded), grad_bias(channels), grad_scale(channels), grad_shift(channels);
    for (int64_t o = 0; o < channels; ++o) {
      grad_shift[o] = sums[o];
      grad_bias[o] = fold.scale[o] * sums[o];
      grad_scale[o] = fold.bias[o] * sums[o];
      for (int64_t c = 0; c < inputs; ++c) {
        grad_scale[o] += folded[o * inputs + c] * double(fold.weight[o * inputs + c]);
        grad_weight[o * inputs + c] *= fold.scale[o];
      }
    }
    const ScalarType bias_type = bias ? bias->scalar_type() : weight.scalar_type();
    const ScalarType scale_type = scale ? scale->scalar_type() : weight.scalar_type();
    grads = {from_double<T>(grad_weight, {channels, inputs}, x, weight.scalar_type()),
             from_double<T>(grad_bias, {channels}, x, bias_type),
             from_double<T>(grad_scale, {channels}, x, scale_type),
             from_double<T>(grad_shift, {channels}, x, scale_type)};
  });
  return {to_type(grad_x, x_in.scalar_type()), grads[0], grads[1], grads[2], grads[3]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avatar_ops, CPU, m) {
  m.impl("edge_conv", TORCH_BOX(&edge_conv_cpu));
  m.impl("edge_conv_backward", TORCH_BOX(&edge_conv_backward_cpu));
}

}  // namespace avatar
