// edge_conv with batch normalisation by the statistics of the edges that exist: see edge_conv_norm_cpu.cpp.
// A channel whose gamma is negative runs with its weight negated, so that the largest edge is always that of
// the smallest q. One reference point serves the whole batch, since the statistics do.
#include "edge_conv/edge_conv_device.cuh"

namespace avatar {
namespace {

constexpr int kStatisticsLanes = 8;
constexpr int kApplyThreads = 256;

// Number, mean and sum of squared deviations of some values.
// Source: Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances,
// 1979.
template <typename A>
struct Moments {
  A count = 0, mean = 0, squares = 0;

  __device__ void merge(A other_count, A other_mean, A other_squares) {
    if (other_count == 0) return;
    const A share = other_count / (count + other_count), step = other_mean - mean;
    mean += step * share;
    squares += other_squares + step * step * (count * share);
    count += other_count;
  }
};

template <typename A>
__global__ void __launch_bounds__(kFinishThreads)
    edge_sign_kernel(const A* __restrict__ gamma, A* __restrict__ signs, int64_t channels) {
  const int64_t o = static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x;
  if (o < channels) signs[o] = gamma[o] < 0 ? A(-1) : A(1);
}

// What the rows of a block leave: padded means and sums of squared deviations of its edges, their number.
template <typename A>
struct BlockStatistics {
  A* means;
  A* squares;
  int64_t* counts;
};

// The largest hidden value, padded, in place of u; and what normalising it takes. x of a block covers packs
// of columns, y rows.
template <typename A, typename Slot>
__global__ void __launch_bounds__(kRowThreads)
    edge_norm_gather_kernel(A* __restrict__ u, const A* __restrict__ q, NeighborList list, EdgeSizes sizes,
                            const A* __restrict__ gamma, Slot* __restrict__ slots,
                            int32_t* __restrict__ degrees, BlockStatistics<A> statistics) {
  AVATAR_SHARED(A, means, kRowThreads);
  AVATAR_SHARED(A, squares, kRowThreads);
  AVATAR_SHARED(A, counts, kRowThreads);
  AVATAR_SHARED(int64_t, totals, kRowThreads);
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * kColumns<A>;
  const bool inside = column < sizes.stride;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kBlockRows;
  const int k = static_cast<int>(sizes.k);
  bool first_only[kColumns<A>];
#pragma unroll
  for (int i = 0; i < kColumns<A>; ++i) {
    first_only[i] = column + i < sizes.channels && gamma[column + i] == 0;
  }
  Moments<A> moments[kColumns<A>];
  int64_t edges = 0;
  for (int n = threadIdx.y; n < kBlockRows && first + n < sizes.rows(); n += blockDim.y) {
    const int64_t row = first + n, at = row * sizes.stride + column;
    const A* cloud = q + row / sizes.num_points * sizes.num_points * sizes.stride + column;
    if (!inside) {
      // The first thread of a row counts even where there are no channels.
      for (int slot = 0; slot < k && column == 0; ++slot) {
        edges += checked_neighbor(list, row * k + slot) >= 0;
      }
      continue;
    }
    const SmallestNeighbor<A> smallest(cloud, sizes.stride, list, row, first_only);
    edges += smallest.count;
    if (column == 0) degrees[row] = smallest.count;
    if (slots) store_slots(slots + at, smallest.slot);
    if (smallest.count == 0) continue;
    Pack<A, kColumns<A>> base = load_pack<A, kColumns<A>>(u + at);
    const Pack<A, kColumns<A>> own = load_pack<A, kColumns<A>>(q + at);
    Pack<A, kColumns<A>> mean = {}, deviation = {};
    for (int slot = 0; slot < k; ++slot) {
      const int64_t point = list.neighbors[row * k + slot];
      if (point < 0) continue;
      const Pack<A, kColumns<A>> other = load_pack<A, kColumns<A>>(cloud + point * sizes.stride);
#pragma unroll
      for (int i = 0; i < kColumns<A>; ++i) mean[i] += other[i];
    }
    const A count = static_cast<A>(smallest.count);
#pragma unroll
    for (int i = 0; i < kColumns<A>; ++i) mean[i] /= count;
    for (int slot = 0; slot < k; ++slot) {
      const int64_t point = list.neighbors[row * k + slot];
      if (point < 0) continue;
      const Pack<A, kColumns<A>> other = load_pack<A, kColumns<A>>(cloud + point * sizes.stride);
#pragma unroll
      for (int i = 0; i < kColumns<A>; ++i) deviation[i] += (other[i] - mean[i]) * (other[i] - mean[i]);
    }
#pragma unroll
    for (int i = 0; i < kColumns<A>; ++i) {
      moments[i].merge(count, base[i] + (own[i] - mean[i]), deviation[i]);
      base[i] += own[i] - smallest.q[i];
    }
    store_pack(u + at, base);
  }
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
  for (int i = 0; i < kColumns<A>; ++i) {
    means[thread] = moments[i].mean;
    squares[thread] = moments[i].squares;
    counts[thread] = moments[i].count;
    for (int half = blockDim.y / 2; half > 0; half /= 2) {
      __syncthreads();
      if (threadIdx.y < half) {
        const int other = thread + half * blockDim.x;
        moments[i].merge(counts[other], means[other], squares[other]);
        means[thread] = moments[i].mean;
        squares[thread] = moments[i].squares;
        counts[thread] = moments[i].count;
      }
    }
    __syncthreads();
    if (threadIdx.y == 0 && inside) {
      statistics.means[blockIdx.x * sizes.stride + column + i] = moments[i].mean;
      statistics.squares[blockIdx.x * sizes.stride + column + i] = moments[i].squares;
    }
  }
  edges = column_sum(edges, totals);
  if (thread == 0 && blockIdx.y == 0) statistics.counts[blockIdx.x] = edges;
}

// Statistics over all blocks, by channel: x of a block covers channels, y takes the blocks in turn. mean is
// that of W e, center that of the centred and signed form; inverse is 1 / deviation.
template <typename A>
__global__ void __launch_bounds__(kWarpSize* kStatisticsLanes)
    edge_statistics_kernel(BlockStatistics<A> statistics, int64_t blocks, EdgeSizes sizes,
                           EdgeWeight<A> weight, const A* __restrict__ reference, double eps,
                           int64_t* __restrict__ count, A* __restrict__ mean, A* __restrict__ variance,
                           A* __restrict__ center, A* __restrict__ inverse) {
  AVATAR_SHARED(double, means, kWarpSize* kStatisticsLanes);
  AVATAR_SHARED(double, squares, kWarpSize* kStatisticsLanes);
  AVATAR_SHARED(double, counts, kWarpSize* kStatisticsLanes);
  AVATAR_SHARED(double, products, kWarpSize);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kWarpSize, o = first + threadIdx.x;
  Moments<double> moments;
  for (int64_t n = threadIdx.y; n < blocks; n += kStatisticsLanes) {
    const bool inside = o < sizes.channels;
    moments.merge(static_cast<double>(statistics.counts[n]),
                  inside ? static_cast<double>(statistics.means[n * sizes.stride + o]) : 0.,
                  inside ? static_cast<double>(statistics.squares[n * sizes.stride + o]) : 0.);
  }
  const int thread = threadIdx.y * kWarpSize + threadIdx.x;
  for (int half = kStatisticsLanes / 2; half > 0; half /= 2) {
    means[thread] = moments.mean;
    squares[thread] = moments.squares;
    counts[thread] = moments.count;
    __syncthreads();
    const int other = thread + half * kWarpSize;
    if (threadIdx.y < half) moments.merge(counts[other], means[other], squares[other]);
    __syncthreads();
  }
  // Each warp of the block takes some of its channels.
  for (int n = threadIdx.y; n < kWarpSize; n += kStatisticsLanes) {
    const double product = first + n < sizes.channels ? own_product(weight, reference, first + n) : 0.;
    if (threadIdx.x == 0) products[n] = product;
  }
  __syncthreads();
  if (threadIdx.y > 0) return;
  if (o == 0) *count = static_cast<int64_t>(moments.count);
  if (o >= sizes.channels) return;
  const double edges = moments.count > 0 ? moments.count : 1.;
  center[o] = static_cast<A>(moments.mean);
  variance[o] = static_cast<A>(moments.squares / edges);
  inverse[o] = static_cast<A>(1 / sqrt(static_cast<double>(variance[o]) + eps));
  const double true_mean = moments.mean + (moments.count > 0 ? products[threadIdx.x] : 0.);
  mean[o] = static_cast<A>(static_cast<double>(weight.factor[o]) * true_mean);
}

// The activation of the normalised hidden value; x of a block covers channels, y rows.
template <typename T, typename A>
__global__ void __launch_bounds__(kApplyThreads)
    edge_norm_apply_kernel(const A* __restrict__ hidden, const int32_t* __restrict__ degrees, EdgeSizes sizes,
                           const A* __restrict__ center, const A* __restrict__ inverse,
                           const A* __restrict__ gamma, const A* __restrict__ beta, A negative_slope,
                           T* __restrict__ output) {
  const int64_t o = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
  if (o >= sizes.channels) return;
  const A mean = center[o], factor = inverse[o], size = gamma[o] < 0 ? -gamma[o] : gamma[o], shift = beta[o];
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < sizes.rows();
       row += step) {
    A value = 0;
    if (degrees[row] > 0) {
      value = (hidden[row * sizes.stride + o] - mean) * factor * size + shift;
      value = value > 0 ? value : value * negative_slope;
    }
    output[row * sizes.channels + o] = static_cast<T>(value);
  }
}

// What the rows of a block leave for the gradients of the statistics, padded: sums of the linear gradient,
// and of its products with the hidden value's deviation from the mean.
template <typename A>
struct GradientSums {
  A* linear;
  A* products;
};

// The gradient of the activation's argument; for each row u_i + q_i - mean, in place of u, and the sum of
// deviations over its edges; all padded.
template <typename T, typename A, typename Slot>
__global__ void __launch_bounds__(kRowThreads)
    edge_norm_gradient_kernel(const T* __restrict__ grad, const T* __restrict__ output,
                              const Slot* __restrict__ slots, A* __restrict__ u, const A* __restrict__ q,
                              NeighborList list, EdgeSizes sizes, const A* __restrict__ center,
                              A negative_slope, A* __restrict__ linear, A* __restrict__ deviations,
                              int32_t* __restrict__ degrees, GradientSums<A> sums) {
  AVATAR_SHARED(A, partial, kRowThreads);
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * kColumns<A>;
  const bool inside = column < sizes.stride;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kBlockRows;
  const int k = static_cast<int>(sizes.k);
  Pack<A, kColumns<A>> sum = {}, sum_products = {};
  for (int n = threadIdx.y; n < kBlockRows && inside && first + n < sizes.rows(); n += blockDim.y) {
    const int64_t row = first + n, at = row * sizes.stride + column;
    const A* cloud = q + row / sizes.num_points * sizes.num_points * sizes.stride + column;
    const Pack<Slot, kColumns<A>> chosen = load_pack<Slot, kColumns<A>>(slots + at);
    Pack<A, kColumns<A>> base = load_pack<A, kColumns<A>>(u + at);
    const Pack<A, kColumns<A>> own = load_pack<A, kColumns<A>>(q + at);
    Pack<A, kColumns<A>> deviation = {}, largest = {}, flow = {};
#pragma unroll
    for (int i = 0; i < kColumns<A>; ++i) {
      base[i] = base[i] + own[i] - (column + i < sizes.channels ? center[column + i] : A(0));
    }
    int degree = 0;
    for (int slot = 0; slot < k; ++slot) {
      const int64_t point = checked_neighbor(list, row * k + slot);
      if (point < 0) continue;
      ++degree;
      const Pack<A, kColumns<A>> other = load_pack<A, kColumns<A>>(cloud + point * sizes.stride);
#pragma unroll
      for (int i = 0; i < kColumns<A>; ++i) {
        const A hidden = base[i] - other[i];
        deviation[i] += hidden;
        if (chosen[i] == static_cast<Slot>(slot)) largest[i] = hidden;
      }
    }
#pragma unroll
    for (int i = 0; i < kColumns<A>; ++i) {
      if (column + i >= sizes.channels || degree == 0) continue;
      const int64_t from = row * sizes.channels + column + i;
      const A value = static_cast<A>(grad[from]);
      flow[i] = static_cast<A>(output[from]) > 0 ? value : value * negative_slope;
      sum[i] += flow[i];
      sum_products[i] += flow[i] * largest[i];
    }
    store_pack(linear + at, flow);
    store_pack(deviations + at, deviation);
    store_pack(u + at, base);
    if (column == 0) degrees[row] = degree;
  }
#pragma unroll
  for (int i = 0; i < kColumns<A>; ++i) {
    sum[i] = column_sum(sum[i], partial);
    sum_products[i] = column_sum(sum_products[i], partial);
  }
  if (threadIdx.y > 0 || !inside) return;
  store_pack(sums.linear + blockIdx.x * sizes.stride + column, sum);
  store_pack(sums.products + blockIdx.x * sizes.stride + column, sum_products);
}

// One block a column: what an edge's gradient takes from those of the statistics, and those of gamma, beta.
template <typename A>
__global__ void __launch_bounds__(kFinishThreads)
    edge_norm_terms_kernel(GradientSums<A> sums, int64_t blocks, EdgeSizes sizes,
                           const int64_t* __restrict__ count, const A* __restrict__ variance, double eps,
                           const A* __restrict__ gamma, A* __restrict__ factor, A* __restrict__ mean_grad,
                           A* __restrict__ slope_grad, A* __restrict__ grad_gamma,
                           A* __restrict__ grad_beta) {
  const int64_t o = blockIdx.x;
  const double sum = sum_of_blocks(sums.linear, blocks, sizes.stride, o);
  const double products = sum_of_blocks(sums.products, blocks, sizes.stride, o);
  if (threadIdx.x > 0) return;
  const bool inside = o < sizes.channels;
  const double edges = *count > 0 ? static_cast<double>(*count) : 1.;
  const double scale = inside ? static_cast<double>(gamma[o]) : 0.;
  const double inverse = inside ? 1 / sqrt(static_cast<double>(variance[o]) + eps) : 0.;
  factor[o] = static_cast<A>((scale < 0 ? -scale : scale) * inverse);
  mean_grad[o] = static_cast<A>(sum / edges);
  slope_grad[o] = static_cast<A>(products * inverse * inverse / edges);
  if (!inside) return;
  grad_beta[o] = static_cast<A>(sum);
  grad_gamma[o] = static_cast<A>((scale < 0 ? -1 : 1) * inverse * products);
}

// One block a channel.
template <typename A>
__global__ void __launch_bounds__(kFinishThreads)
    edge_norm_finish_kernel(const A* __restrict__ partial, int64_t parts, EdgeWeight<A> weight,
                            A* __restrict__ grad_weight) {
  finish_weight(partial, parts, weight, grad_weight);
}

template <typename A>
Tensor signs_of(const Tensor& gamma) {
  Tensor signs = torch::stable::new_empty(gamma, gamma.sizes());
  launch("edge_conv_norm", edge_sign_kernel<A>, grid_of(divide_up(gamma.numel(), kFinishThreads)),
         dim3(kFinishThreads), 0, current_stream(gamma), data_of<A>(gamma), data_of<A>(signs), gamma.numel());
  return signs;
}

// Output, slots, number of edges, mean, biased variance, and the mean of the centred and signed form.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> edge_conv_norm_cuda(
    const Tensor& x_in, const Tensor& neighbors_in, const Tensor& weight_in, const Tensor& gamma_in,
    const Tensor& beta_in, double eps, double negative_slope, bool keep_slots) {
  const torch::stable::accelerator::DeviceGuard guard(x_in.get_device_index());
  const Tensor x = as_contiguous(x_in), neighbors = as_contiguous(neighbors_in);
  const Tensor weight = to_compute(weight_in), gamma = to_compute(gamma_in), beta = to_compute(beta_in);
  const EdgeSizes sizes(x, neighbors, weight);
  const NeighborList list = point_neighbors("edge_conv_norm", neighbors, sizes);
  const ScalarType type = compute_type(x.scalar_type());
  const cudaStream_t stream = current_stream(x);
  const auto padded_rows = [&](int64_t rows) {
    return torch::stable::new_empty(x, {rows, sizes.stride}, type);
  };
  const auto by_channel = [&] { return torch::stable::new_empty(x, {sizes.channels}, type); };
  Tensor output = torch::stable::new_empty(x, {sizes.batch, sizes.num_points, sizes.channels});
  const Tensor slots = empty_slots(x, sizes, keep_slots);
  const Tensor u = padded_rows(sizes.rows()), q = padded_rows(sizes.rows());
  const Tensor means = padded_rows(sizes.row_blocks()), squares = padded_rows(sizes.row_blocks());
  const Tensor counts = torch::stable::new_empty(neighbors, {sizes.row_blocks()});
  const Tensor degrees = torch::stable::new_empty(neighbors, {sizes.rows()}, ScalarType::Int);
  Tensor count = torch::stable::new_empty(neighbors, {});
  Tensor mean = by_channel(), variance = by_channel(), center = by_channel(), inverse = by_channel();
  dispatch_floating(x.scalar_type(), "edge_conv_norm", [&](auto zero) {
    using T = decltype(zero);
    using A = typename Accumulate<T>::type;
    const Tensor signs = signs_of<A>(gamma);
    const EdgeWeight<A> folded{data_of<A>(weight), data_of<A>(signs), sizes.inputs, sizes.channels};
    const Tensor reference = find_reference<T>("edge_conv_norm", x, list, sizes, true);
    edge_products<T, A>("edge_conv_norm", x, sizes, folded, {data_of<A>(reference), 0}, nullptr, u, q);
    const BlockStatistics<A> statistics{data_of<A>(means), data_of<A>(squares), data_of<int64_t>(counts)};
    dispatch_slot(sizes.k, [&](auto slot) {
      using Slot = decltype(slot);
      launch("edge_conv_norm", edge_norm_gather_kernel<A, Slot>, sizes.grid<A>(sizes.row_blocks()),
             sizes.block<A>(), 0, stream, data_of<A>(u), data_of<A>(q), list, sizes, data_of<A>(gamma),
             keep_slots ? data_of<Slot>(slots) : nullptr, data_of<int32_t>(degrees), statistics);
    });
    launch("edge_conv_norm", edge_statistics_kernel<A>,
           dim3(std::max<int64_t>(1, divide_up(sizes.channels, kWarpSize))),
           dim3(kWarpSize, kStatisticsLanes), 0, stream, statistics, sizes.row_blocks(), sizes, folded,
           data_of<A>(reference), eps, data_of<int64_t>(count), data_of<A>(mean), data_of<A>(variance),
           data_of<A>(center), data_of<A>(inverse));
    const dim3 block = block_for_columns(sizes.channels, kApplyThreads);
    launch("edge_conv_norm", edge_norm_apply_kernel<T, A>,
           grid_of(grid_size(divide_up(sizes.rows(), block.y)), divide_up(sizes.channels, block.x)), block, 0,
           stream, data_of<A>(u), data_of<int32_t>(degrees), sizes, data_of<A>(center), data_of<A>(inverse),
           data_of<A>(gamma), data_of<A>(beta), static_cast<A>(negative_slope), data_of<T>(output));
  });
  return {output, slots, count, mean, variance, center};
}

// Gradients in x, weight, gamma and beta.
std::tuple<Tensor, Tensor, Tensor, Tensor> edge_conv_norm_backward_cuda(
    const Tensor& grad_in, const Tensor& output_in, const Tensor& slots_in, const Tensor& x_in,
    const Tensor& neighbors_in, const Tensor& weight_in, const Tensor& gamma_in, const Tensor& count,
    const Tensor& variance_in, const Tensor& center_in, double eps, double negative_slope) {
  const torch::stable::accelerator::DeviceGuard guard(x_in.get_device_index());
  const Tensor grad = as_contiguous(grad_in), output = as_contiguous(output_in);
  const Tensor x = as_contiguous(x_in), neighbors = as_contiguous(neighbors_in);
  const Tensor slots = as_contiguous(slots_in);
  const Tensor weight = to_compute(weight_in), gamma = to_compute(gamma_in);
  const Tensor variance = as_contiguous(variance_in);
  const Tensor center = as_contiguous(center_in);
  const EdgeSizes sizes(x, neighbors, weight);
  const NeighborList list = point_neighbors("edge_conv_norm_backward", neighbors, sizes);
  const ScalarType type = compute_type(x.scalar_type());
  const cudaStream_t stream = current_stream(x);
  const ReverseAdjacency reverse = reverse_adjacency("edge_conv_norm_backward", neighbors, sizes.num_points);
  const auto padded_rows = [&](int64_t rows) {
    return torch::stable::new_empty(x, {rows, sizes.stride}, type);
  };
  const auto by_channel = [&] { return torch::stable::new_empty(x, {sizes.channels}, type); };
  const Tensor u = padded_rows(sizes.rows()), q = padded_rows(sizes.rows());
  const Tensor linear = padded_rows(sizes.rows()), grad_u = padded_rows(sizes.rows());
  const Tensor grad_q = padded_rows(sizes.rows());
  const Tensor linear_sums = padded_rows(sizes.row_blocks()), product_sums = padded_rows(sizes.row_blocks());
  const Tensor factor = padded_rows(1), mean_grad = padded_rows(1), slope_grad = padded_rows(1);
  const Tensor degrees = torch::stable::new_empty(neighbors, {sizes.rows()}, ScalarType::Int);
  // Without channels no kernel below has work.
  const Tensor cloud_of_row = torch::stable::new_zeros(x, {sizes.rows()}, ScalarType::Int);
  Tensor grad_x = torch::stable::new_empty(x, {sizes.batch, sizes.num_points, sizes.inputs});
  Tensor grad_weight = torch::stable::new_empty(x, {sizes.channels, 2 * sizes.inputs}, type);
  Tensor grad_gamma = by_channel(), grad_beta = by_channel();
  dispatch_floating(x.scalar_type(), "edge_conv_norm_backward", [&](auto zero) {
    using T = decltype(zero);
    using A = typename Accumulate<T>::type;
    const Tensor signs = signs_of<A>(gamma);
    const EdgeWeight<A> folded{data_of<A>(weight), data_of<A>(signs), sizes.inputs, sizes.channels};
    const Tensor reference = find_reference<T>("edge_conv_norm_backward", x, list, sizes, true);
    const EdgeReference<A> everywhere{data_of<A>(reference), 0};
    edge_products<T, A>("edge_conv_norm_backward", x, sizes, folded, everywhere, nullptr, u, q);
    const GradientSums<A> sums{data_of<A>(linear_sums), data_of<A>(product_sums)};
    const EdgeNormTerms<A> terms{
        data_of<A>(factor), data_of<A>(mean_grad), data_of<A>(slope_grad),   data_of<A>(u),
        data_of<A>(q),      data_of<A>(grad_u),    data_of<int32_t>(degrees)};
    dispatch_slot(sizes.k, [&](auto slot) {
      using Slot = decltype(slot);
      launch("edge_conv_norm_backward", edge_norm_gradient_kernel<T, A, Slot>,
             sizes.grid<A>(sizes.row_blocks()), sizes.block<A>(), 0, stream, data_of<T>(grad),
             data_of<T>(output), data_of<Slot>(slots), data_of<A>(u), data_of<A>(q), list, sizes,
             data_of<A>(center), static_cast<A>(negative_slope), data_of<A>(linear), data_of<A>(grad_u),
             data_of<int32_t>(degrees), sums);
      launch("edge_conv_norm_backward", edge_norm_terms_kernel<A>, dim3(sizes.stride), dim3(kFinishThreads),
             0, stream, sums, sizes.row_blocks(), sizes, const_data<int64_t>(count), data_of<A>(variance),
             eps, data_of<A>(gamma), data_of<A>(factor), data_of<A>(mean_grad), data_of<A>(slope_grad),
             data_of<A>(grad_gamma), data_of<A>(grad_beta));
      launch("edge_conv_norm_backward", edge_reverse_kernel<true, A, Slot>, sizes.grid<A>(sizes.rows()),
             sizes.block<A>(), 0, stream, incoming_edges(reverse, neighbors, sizes.num_points), sizes,
             data_of<A>(linear), data_of<Slot>(slots), terms, data_of<A>(grad_q),
             data_of<int32_t>(cloud_of_row));
    });
    const Tensor partial = edge_gradients<T, A>("edge_conv_norm_backward", x, sizes, folded, everywhere,
                                                grad_u, grad_q, cloud_of_row, true, grad_x);
    launch("edge_conv_norm_backward", edge_norm_finish_kernel<A>, dim3(sizes.channels), dim3(kFinishThreads),
           0, stream, data_of<A>(partial), partial.size(0), folded, data_of<A>(grad_weight));
  });
  return {grad_x, to_type(grad_weight, weight_in.scalar_type()), to_type(grad_gamma, gamma_in.scalar_type()),
          to_type(grad_beta, gamma_in.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avatar_ops, CUDA, m) {
  m.impl("edge_conv_norm", TORCH_BOX(&edge_conv_norm_cuda));
  m.impl("edge_conv_norm_backward", TORCH_BOX(&edge_conv_norm_backward_cuda));
}

}  // namespace avatar
