#include "common/reverse_adjacency.cuh"

namespace avatar {
namespace {

constexpr int kThreads = 128;
// Neighbours whose features are on their way at once.
constexpr int kAhead = 4;

// x of a block covers packs of channels, y rows.
template <typename T, typename A, int kPack>
__global__ void __launch_bounds__(kThreads)
    edge_max_kernel(const T* __restrict__ features, NeighborList list, T* __restrict__ values,
                    int64_t* __restrict__ argmax, int64_t num_rows, int64_t channels) {
  const int64_t channel = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * kPack;
  if (channel >= channels) return;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.y;
  const int k = static_cast<int>(list.k);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < num_rows;
       row += stride) {
    const T* cloud = features + row / list.rows * list.num_points * channels + channel;
    Pack<T, kPack> best;
    int chosen[kPack];
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      best[i] = T(0.f);
      chosen[i] = -1;
    }
    for (int first = 0; first < k; first += kAhead) {
      Pack<T, kPack> seen[kAhead];
      bool exists[kAhead];
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ++ahead) {
        const int slot = first + ahead;
        const int64_t point = slot < k ? checked_neighbor(list, row * k + slot) : -1;
        exists[ahead] = point >= 0;
        if (exists[ahead]) seen[ahead] = load_pack<T, kPack>(cloud + point * channels);
      }
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ++ahead) {
        if (!exists[ahead]) continue;
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
          const A value = static_cast<A>(seen[ahead][i]), most = static_cast<A>(best[i]);
          // The first, a greater one, or the first NaN.
          if (chosen[i] < 0 || (!(value <= most) && most == most)) {
            best[i] = seen[ahead][i];
            chosen[i] = first + ahead;
          }
        }
      }
    }
    store_pack(values + row * channels + channel, best);
    constexpr int kIndices = kPack < 2 ? 1 : 2;
#pragma unroll
    for (int i = 0; i < kPack; i += kIndices) {
      Pack<int64_t, kIndices> points;
#pragma unroll
      for (int j = 0; j < kIndices; ++j) {
        points[j] = chosen[i + j] < 0 ? -1 : list.neighbors[row * k + chosen[i + j]];
      }
      store_pack(argmax + row * channels + channel + i, points);
    }
  }
}

// One block a point and a range of channels: x covers packs of channels, y takes the point's edges in turn.
template <typename T, typename A, int kPack>
__global__ void __launch_bounds__(kThreads)
    edge_max_backward_kernel(const T* __restrict__ grad, const int64_t* __restrict__ argmax,
                             IncomingEdgesOf incoming, T* __restrict__ grad_features, int64_t channels) {
  AVATAR_SHARED(A, partial, kThreads * kPack);
  const int64_t cloud = blockIdx.x / incoming.num_points, point = blockIdx.x - cloud * incoming.num_points;
  const int64_t channel = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * kPack;
  const IncomingEdges edges = incoming.point(cloud, point);
  A sum[kPack] = {};
  if (channel < channels) {
    for (int64_t i = threadIdx.y; i < edges.count; i += blockDim.y) {
      const int64_t row = edges.row(i);
      // A row that names the point twice counts once.
      if (i > 0 && edges.row(i - 1) == row) continue;
      const int64_t at = (cloud * incoming.rows + row) * channels + channel;
      const Pack<T, kPack> flow = load_pack<T, kPack>(grad + at);
      constexpr int kIndices = kPack < 2 ? 1 : 2;
#pragma unroll
      for (int c = 0; c < kPack; c += kIndices) {
        const Pack<int64_t, kIndices> chosen = load_pack<int64_t, kIndices>(argmax + at + c);
#pragma unroll
        for (int j = 0; j < kIndices; ++j) {
          if (chosen[j] == point) sum[c + j] += static_cast<A>(flow[c + j]);
        }
      }
    }
  }
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
  for (int c = 0; c < kPack; ++c) partial[c * kThreads + thread] = sum[c];
  for (int half = blockDim.y / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.y < half) {
#pragma unroll
      for (int c = 0; c < kPack; ++c) {
        partial[c * kThreads + thread] += partial[c * kThreads + thread + half * blockDim.x];
      }
    }
  }
  if (threadIdx.y > 0 || channel >= channels) return;
  Pack<T, kPack> result;
#pragma unroll
  for (int c = 0; c < kPack; ++c) result[c] = static_cast<T>(partial[c * kThreads + thread]);
  store_pack(grad_features + (cloud * incoming.num_points + point) * channels + channel, result);
}

// Calls body with the number of channels that a thread takes, as a constant.
template <typename T, typename Body>
void dispatch_pack(int64_t channels, bool aligned, const Body& body) {
  constexpr int kPack = kPackBytes / sizeof(T);
  if (aligned && channels % kPack == 0) return body(std::integral_constant<int, kPack>{});
  body(std::integral_constant<int, 1>{});
}

// features (B, N, C), neighbors (B, M, K) int64 -> values (B, M, C), argmax (B, M, C).
std::tuple<Tensor, Tensor> edge_max_cuda(const Tensor& features_in, const Tensor& neighbors_in) {
  const torch::stable::accelerator::DeviceGuard guard(features_in.get_device_index());
  const Tensor features = as_contiguous(features_in);
  const Tensor neighbors = as_contiguous(neighbors_in);
  const int64_t batch = features.size(0), num_points = features.size(1), channels = features.size(2);
  const int64_t rows = neighbors.size(1), k = neighbors.size(2);
  Tensor values = torch::stable::new_empty(features, {batch, rows, channels});
  Tensor argmax = torch::stable::new_empty(neighbors, {batch, rows, channels});
  const NeighborList list{"edge_max", const_data<int64_t>(neighbors), rows, k, num_points};
  dispatch_floating(features.scalar_type(), "edge_max", [&](auto zero) {
    using T = decltype(zero);
    using A = typename Accumulate<T>::type;
    const T* data = static_cast<const T*>(features.const_data_ptr());
    dispatch_pack<T>(channels, is_aligned(data), [&](auto pack) {
      constexpr int kPack = decltype(pack)::value;
      const dim3 block = block_for_columns(channels / kPack, kThreads);
      const dim3 grid =
          grid_of(grid_size(divide_up(batch * rows, block.y)), divide_up(channels / kPack, block.x));
      launch("edge_max", edge_max_kernel<T, A, kPack>, grid, block, 0, current_stream(features), data, list,
             static_cast<T*>(values.mutable_data_ptr()), mutable_data<int64_t>(argmax), batch * rows,
             channels);
    });
  });
  return {values, argmax};
}

Tensor edge_max_backward_cuda(const Tensor& grad_in, const Tensor& argmax_in, const Tensor& neighbors_in,
                              int64_t num_points) {
  const torch::stable::accelerator::DeviceGuard guard(grad_in.get_device_index());
  const Tensor grad = as_contiguous(grad_in);
  const Tensor argmax = as_contiguous(argmax_in);
  const Tensor neighbors = as_contiguous(neighbors_in);
  const int64_t batch = grad.size(0), channels = grad.size(2);
  Tensor grad_features = torch::stable::new_empty(grad, {batch, num_points, channels});
  if (grad_features.numel() == 0) return grad_features;
  const ReverseAdjacency reverse = reverse_adjacency("edge_max_backward", neighbors, num_points);
  dispatch_floating(grad.scalar_type(), "edge_max_backward", [&](auto zero) {
    using T = decltype(zero);
    using A = typename Accumulate<T>::type;
    const T* data = static_cast<const T*>(grad.const_data_ptr());
    const bool aligned = is_aligned(data) && is_aligned(argmax.const_data_ptr());
    dispatch_pack<T>(channels, aligned, [&](auto pack) {
      constexpr int kPack = decltype(pack)::value;
      const dim3 block = block_for_columns(channels / kPack, kThreads);
      launch("edge_max_backward", edge_max_backward_kernel<T, A, kPack>,
             grid_of(batch * num_points, divide_up(channels / kPack, block.x)), block, 0,
             current_stream(grad), data, const_data<int64_t>(argmax),
             incoming_edges(reverse, neighbors, num_points),
             static_cast<T*>(grad_features.mutable_data_ptr()), channels);
    });
  });
  return grad_features;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avatar_ops, CUDA, m) {
  m.impl("edge_max", TORCH_BOX(&edge_max_cuda));
  m.impl("edge_max_backward", TORCH_BOX(&edge_max_backward_cuda));
}

}  // namespace avatar
