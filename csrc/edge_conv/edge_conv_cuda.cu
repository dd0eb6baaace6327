#include "edge_conv/edge_conv_device.cuh"

namespace avatar {
namespace {

constexpr int kConstantThreads = 128;

// What u_i has besides A (x_i - c), (clouds, channels): scale * (A c + bias) + shift. A warp each.
template <typename A>
__global__ void __launch_bounds__(kConstantThreads)
    edge_constant_kernel(EdgeSizes sizes, EdgeWeight<A> weight, const A* __restrict__ reference,
                         const A* __restrict__ bias, const A* __restrict__ shift, A* __restrict__ constant) {
  const int64_t n =
      static_cast<int64_t>(blockIdx.x) * (kConstantThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (n >= sizes.batch * sizes.channels) return;
  const int64_t cloud = n / sizes.channels, o = n - cloud * sizes.channels;
  double value = own_product(weight, reference + cloud * sizes.inputs, o);
  if (bias) value += static_cast<double>(weight.factor[o]) * static_cast<double>(bias[o]);
  if (shift) value += static_cast<double>(shift[o]);
  if (threadIdx.x % kWarpSize == 0) constant[n] = static_cast<A>(value);
}

// x of a block covers packs of columns, y rows.
template <typename T, typename A, typename Slot>
__global__ void __launch_bounds__(kRowThreads)
    edge_gather_kernel(const A* __restrict__ u, const A* __restrict__ q, NeighborList list, EdgeSizes sizes,
                       A negative_slope, T* __restrict__ output, Slot* __restrict__ slots) {
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * kColumns<A>;
  if (column >= sizes.stride) return;
  const bool first_only[kColumns<A>] = {};
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < sizes.rows();
       row += step) {
    const A* cloud = q + row / sizes.num_points * sizes.num_points * sizes.stride + column;
    const SmallestNeighbor<A> smallest(cloud, sizes.stride, list, row, first_only);
    const int64_t at = row * sizes.stride + column;
    if (slots) store_slots(slots + at, smallest.slot);
    const Pack<A, kColumns<A>> base = load_pack<A, kColumns<A>>(u + at);
    const Pack<A, kColumns<A>> own = load_pack<A, kColumns<A>>(q + at);
    Pack<A, kColumns<A>> result = {};
    if (smallest.count > 0) {
#pragma unroll
      for (int i = 0; i < kColumns<A>; ++i) {
        // Neighbours' products differ little from the own one, so their difference comes first.
        const A hidden = base[i] + (own[i] - smallest.q[i]);
        result[i] = hidden > 0 ? hidden : hidden * negative_slope;
      }
    }
    store_columns(output + row * sizes.channels, column, sizes.channels, result);
  }
}

// The gradient of the activation's argument, padded, and its sums over the rows of each block, padded.
template <typename T, typename A, typename Slot>
__global__ void __launch_bounds__(kRowThreads)
    edge_linear_gradient_kernel(const T* __restrict__ grad, const T* __restrict__ output,
                                const Slot* __restrict__ slots, EdgeSizes sizes, A negative_slope,
                                A* __restrict__ linear, A* __restrict__ sums) {
  AVATAR_SHARED(A, partial, kRowThreads);
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * kColumns<A>;
  const bool inside = column < sizes.stride;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kBlockRows;
  Pack<A, kColumns<A>> sum = {};
  for (int n = threadIdx.y; n < kBlockRows && inside && first + n < sizes.rows(); n += blockDim.y) {
    const int64_t row = first + n, at = row * sizes.stride + column;
    Pack<A, kColumns<A>> flow = {};
#pragma unroll
    for (int i = 0; i < kColumns<A>; ++i) {
      if (column + i >= sizes.channels || slots[at + i] == kNone<Slot>) continue;
      const int64_t from = row * sizes.channels + column + i;
      const A value = static_cast<A>(grad[from]);
      flow[i] = static_cast<A>(output[from]) > 0 ? value : value * negative_slope;
      sum[i] += flow[i];
    }
    store_pack(linear + at, flow);
  }
#pragma unroll
  for (int i = 0; i < kColumns<A>; ++i) sum[i] = column_sum(sum[i], partial);
  if (threadIdx.y == 0 && inside) store_pack(sums + blockIdx.x * sizes.stride + column, sum);
}

// Gradients by channel, one block each, from that of the folded weight and the sums of the linear gradient.
template <typename A>
__global__ void __launch_bounds__(kFinishThreads)
    edge_finish_kernel(const A* __restrict__ partial, int64_t parts, const A* __restrict__ sums,
                       int64_t blocks, EdgeSizes sizes, EdgeWeight<A> weight, const A* __restrict__ bias,
                       A* __restrict__ grad_weight, A* __restrict__ grad_bias, A* __restrict__ grad_scale,
                       A* __restrict__ grad_shift) {
  const int64_t o = blockIdx.x;
  const double product = block_sum(finish_weight(partial, parts, weight, grad_weight));
  const double sum = sum_of_blocks(sums, blocks, sizes.stride, o);
  if (threadIdx.x > 0) return;
  grad_shift[o] = static_cast<A>(sum);
  grad_bias[o] = static_cast<A>(static_cast<double>(weight.factor[o]) * sum);
  grad_scale[o] = static_cast<A>(product + (bias ? static_cast<double>(bias[o]) * sum : 0.));
}

// Row o of the linear map is scale_o * (W_o e + bias_o) + shift_o: with the scale folded into the weight, the
// largest edge is that of the smallest q whatever the sign of the scale.
struct EdgeFold {
  Tensor weight, scale;
  std::optional<Tensor> bias, shift;

  EdgeFold(const Tensor& weight_in, const std::optional<Tensor>& bias_in,
           const std::optional<Tensor>& scale_in, const std::optional<Tensor>& shift_in)
      : weight(to_compute(weight_in)), scale(scale_in ? to_compute(*scale_in) : ones_like(weight)) {
    if (bias_in) bias = to_compute(*bias_in);
    if (shift_in) shift = to_compute(*shift_in);
  }

  template <typename A>
  EdgeWeight<A> folded(const EdgeSizes& sizes) const {
    return {data_of<A>(weight), data_of<A>(scale), sizes.inputs, sizes.channels};
  }

 private:
  static Tensor ones_like(const Tensor& weight) {
    Tensor ones = torch::stable::new_empty(weight, {weight.size(0)});
    return torch::stable::fill_(ones, 1.);
  }
};

template <typename A>
const A* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? data_of<A>(*tensor) : nullptr;
}

std::tuple<Tensor, Tensor> edge_conv_cuda(const Tensor& x_in, const Tensor& neighbors_in,
                                          const Tensor& weight, const std::optional<Tensor>& bias,
                                          const std::optional<Tensor>& scale,
                                          const std::optional<Tensor>& shift, double negative_slope,
                                          bool keep_slots) {
  const torch::stable::accelerator::DeviceGuard guard(x_in.get_device_index());
  const Tensor x = as_contiguous(x_in), neighbors = as_contiguous(neighbors_in);
  const EdgeSizes sizes(x, neighbors, weight);
  const EdgeFold fold(weight, bias, scale, shift);
  const NeighborList list = point_neighbors("edge_conv", neighbors, sizes);
  const ScalarType type = compute_type(x.scalar_type());
  const cudaStream_t stream = current_stream(x);
  Tensor output = torch::stable::new_empty(x, {sizes.batch, sizes.num_points, sizes.channels});
  const Tensor slots = empty_slots(x, sizes, keep_slots);
  const Tensor u = torch::stable::new_empty(x, {sizes.rows(), sizes.stride}, type);
  const Tensor q = torch::stable::new_empty(x, {sizes.rows(), sizes.stride}, type);
  const Tensor constant = torch::stable::new_empty(x, {sizes.batch, sizes.channels}, type);
  dispatch_floating(x.scalar_type(), "edge_conv", [&](auto zero) {
    using T = decltype(zero);
    using A = typename Accumulate<T>::type;
    const EdgeWeight<A> folded = fold.folded<A>(sizes);
    const Tensor reference = find_reference<T>("edge_conv", x, list, sizes, false);
    launch("edge_conv", edge_constant_kernel<A>,
           grid_of(divide_up(constant.numel(), kConstantThreads / kWarpSize)), dim3(kConstantThreads), 0,
           stream, sizes, folded, data_of<A>(reference), data_or_null<A>(fold.bias),
           data_or_null<A>(fold.shift), data_of<A>(constant));
    edge_products<T, A>("edge_conv", x, sizes, folded, {data_of<A>(reference), sizes.inputs},
                        data_of<A>(constant), u, q);
    dispatch_slot(sizes.k, [&](auto slot) {
      using Slot = decltype(slot);
      const dim3 block = sizes.block<A>();
      launch("edge_conv", edge_gather_kernel<T, A, Slot>,
             sizes.grid<A>(grid_size(divide_up(sizes.rows(), block.y))), block, 0, stream, data_of<A>(u),
             data_of<A>(q), list, sizes, static_cast<A>(negative_slope), data_of<T>(output),
             keep_slots ? data_of<Slot>(slots) : nullptr);
    });
  });
  return {output, slots};
}

// Gradients in x, weight, bias, scale and shift.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> edge_conv_backward_cuda(
    const Tensor& grad_in, const Tensor& output_in, const Tensor& slots_in, const Tensor& x_in,
    const Tensor& neighbors_in, const Tensor& weight, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& scale, double negative_slope) {
  const torch::stable::accelerator::DeviceGuard guard(x_in.get_device_index());
  const Tensor grad = as_contiguous(grad_in), output = as_contiguous(output_in);
  const Tensor x = as_contiguous(x_in), neighbors = as_contiguous(neighbors_in);
  const Tensor slots = as_contiguous(slots_in);
  const EdgeSizes sizes(x, neighbors, weight);
  const EdgeFold fold(weight, bias, scale, std::nullopt);
  const NeighborList list = point_neighbors("edge_conv_backward", neighbors, sizes);
  const ScalarType type = compute_type(x.scalar_type());
  const cudaStream_t stream = current_stream(x);
  const ReverseAdjacency reverse = reverse_adjacency("edge_conv_backward", neighbors, sizes.num_points);
  const auto padded_rows = [&](int64_t rows) {
    return torch::stable::new_empty(x, {rows, sizes.stride}, type);
  };
  const Tensor linear = padded_rows(sizes.rows()), grad_q = padded_rows(sizes.rows());
  const Tensor sums = padded_rows(sizes.row_blocks());
  // Without channels no kernel below has work.
  const Tensor cloud_of_row = torch::stable::new_zeros(x, {sizes.rows()}, ScalarType::Int);
  Tensor grad_x = torch::stable::new_empty(x, {sizes.batch, sizes.num_points, sizes.inputs});
  const auto by_channel = [&] { return torch::stable::new_empty(x, {sizes.channels}, type); };
  Tensor grad_weight = torch::stable::new_empty(x, {sizes.channels, 2 * sizes.inputs}, type);
  Tensor grad_bias = by_channel(), grad_scale = by_channel(), grad_shift = by_channel();
  dispatch_floating(x.scalar_type(), "edge_conv_backward", [&](auto zero) {
    using T = decltype(zero);
    using A = typename Accumulate<T>::type;
    const EdgeWeight<A> folded = fold.folded<A>(sizes);
    const Tensor reference = find_reference<T>("edge_conv_backward", x, list, sizes, false);
    dispatch_slot(sizes.k, [&](auto slot) {
      using Slot = decltype(slot);
      launch("edge_conv_backward", edge_linear_gradient_kernel<T, A, Slot>, sizes.grid<A>(sizes.row_blocks()),
             sizes.block<A>(), 0, stream, data_of<T>(grad), data_of<T>(output), data_of<Slot>(slots), sizes,
             static_cast<A>(negative_slope), data_of<A>(linear), data_of<A>(sums));
      launch("edge_conv_backward", edge_reverse_kernel<false, A, Slot>, sizes.grid<A>(sizes.rows()),
             sizes.block<A>(), 0, stream, incoming_edges(reverse, neighbors, sizes.num_points), sizes,
             data_of<A>(linear), data_of<Slot>(slots), EdgeNormTerms<A>{}, data_of<A>(grad_q),
             data_of<int32_t>(cloud_of_row));
    });
    const Tensor partial =
        edge_gradients<T, A>("edge_conv_backward", x, sizes, folded, {data_of<A>(reference), sizes.inputs},
                             linear, grad_q, cloud_of_row, false, grad_x);
    launch("edge_conv_backward", edge_finish_kernel<A>, dim3(sizes.channels), dim3(kFinishThreads), 0, stream,
           data_of<A>(partial), partial.size(0), data_of<A>(sums), sizes.row_blocks(), sizes, folded,
           data_or_null<A>(fold.bias), data_of<A>(grad_weight), data_of<A>(grad_bias), data_of<A>(grad_scale),
           data_of<A>(grad_shift));
  });
  const ScalarType weight_type = weight.scalar_type();
  const ScalarType bias_type = bias ? bias->scalar_type() : weight_type;
  const ScalarType scale_type = scale ? scale->scalar_type() : weight_type;
  return {grad_x, to_type(grad_weight, weight_type), to_type(grad_bias, bias_type),
          to_type(grad_scale, scale_type), to_type(grad_shift, scale_type)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avatar_ops, CUDA, m) {
  m.impl("edge_conv", TORCH_BOX(&edge_conv_cuda));
  m.impl("edge_conv_backward", TORCH_BOX(&edge_conv_backward_cuda));
}

}  // namespace avatar
