// Neighbour lists on the device: checking them, and the edges that lead to each point, with which gradients
// flow back along edges in a fixed order without atomics.
#pragma once

#include <array>

#include "common/cuda.cuh"
#include "common/pack.cuh"

namespace avatar {

// neighbors (batch, ..., k), taken as (batch, rows, k), with entries in [-1, num_points); `op` is for
// messages.
struct NeighborList {
  const char* op;
  const int64_t* neighbors;
  int64_t rows, k, num_points;
};

// The entry at a flat position, or -1; a bad one ends the kernel.
__device__ inline int64_t checked_neighbor(const NeighborList& list, int64_t position) {
  const int64_t point = list.neighbors[position];
  if (point >= -1 && point < list.num_points) return point;
#if !defined(__CUDACC__)
  // Whatever the order of threads, the message names the first.
  int64_t first = 0;
  while (list.neighbors[first] >= -1 && list.neighbors[first] < list.num_points) ++first;
  AVATAR_DEVICE_ASSERT(
      false, "%s: neighbors[%lld, %lld, %lld] = %lld; expected -1 (none) or an index in [0, %lld)", list.op,
      static_cast<long long>(first / (list.rows * list.k)),
      static_cast<long long>(first / list.k % list.rows), static_cast<long long>(first % list.k),
      static_cast<long long>(list.neighbors[first]), static_cast<long long>(list.num_points));
#else
  AVATAR_DEVICE_ASSERT(point >= -1 && point < list.num_points);
#endif
  return -1;
}

// The edges into point n of cloud b are edges[b, offsets[b, n]] up to before edges[b, offsets[b, n + 1]],
// ascending; an edge is a position in the cloud's (rows, k).
struct ReverseAdjacency {
  Tensor edges;    // (batch, rows * k) int64
  Tensor offsets;  // (batch, num_points + 1) int64
};

// One point's edges.
struct IncomingEdges {
  const int64_t* edges;
  int64_t count;
  uint32_t k;
  // Edges of a cloud number less than 2^31.
  __device__ int64_t row(int64_t i) const { return static_cast<uint32_t>(edges[i]) / k; }
  __device__ int64_t slot(int64_t i) const { return static_cast<uint32_t>(edges[i]) % k; }
};

struct IncomingEdgesOf {
  const int64_t* edges;
  const int64_t* offsets;
  int64_t rows, k, num_points;

  __device__ IncomingEdges point(int64_t cloud, int64_t point) const {
    const int64_t* range = offsets + cloud * (num_points + 1) + point;
    return {edges + cloud * rows * k + range[0], range[1] - range[0], static_cast<uint32_t>(k)};
  }
};

namespace {

constexpr int kAdjacencyThreads = 256;

// The point that each edge leads to, or -1.
__global__ void __launch_bounds__(kAdjacencyThreads)
    edge_target_kernel(NeighborList list, int32_t* __restrict__ targets, int64_t count) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kAdjacencyThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kAdjacencyThreads + threadIdx.x; i < count;
       i += stride) {
    targets[i] = static_cast<int32_t>(checked_neighbor(list, i));
  }
}

// offsets[b, n]: how many of the cloud's ascending targets are below n.
__global__ void __launch_bounds__(kAdjacencyThreads)
    edge_offset_kernel(const int32_t* __restrict__ sorted, int64_t* __restrict__ offsets, int64_t batch,
                       int64_t num_points, int64_t edges) {
  const int64_t count = batch * (num_points + 1);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kAdjacencyThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kAdjacencyThreads + threadIdx.x; i < count;
       i += stride) {
    const int64_t cloud = i / (num_points + 1), point = i - cloud * (num_points + 1);
    const int32_t* targets = sorted + cloud * edges;
    int64_t begin = 0, end = edges;
    while (begin < end) {
      const int64_t middle = begin + (end - begin) / 2;
      if (targets[middle] < point) {
        begin = middle + 1;
      } else {
        end = middle;
      }
    }
    offsets[i] = begin;
  }
}

}  // namespace

inline int64_t rows_of(const Tensor& neighbors) {
  int64_t rows = 1;
  for (int64_t d = 1; d + 1 < neighbors.dim(); ++d) rows *= neighbors.size(d);
  return rows;
}

// Ascending values along the last dimension, equal ones in the order given, and where each came from.
inline std::tuple<Tensor, Tensor> stable_sort(const Tensor& values) {
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(values), torch::stable::detail::from(std::optional<bool>(true)),
      torch::stable::detail::from(static_cast<int64_t>(-1)), torch::stable::detail::from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

// neighbors (batch, ..., k) contiguous.
inline ReverseAdjacency reverse_adjacency(const char* op, const Tensor& neighbors, int64_t num_points) {
  const int64_t batch = neighbors.size(0), k = neighbors.size(-1), rows = rows_of(neighbors);
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (num_points > kMost || rows * k > kMost) {
    throw std::invalid_argument(std::string(op) + ": got a cloud of " + std::to_string(num_points) +
                                " points and " + std::to_string(rows * k) +
                                " edges, expected less than 2^31");
  }
  const cudaStream_t stream = current_stream(neighbors);
  Tensor targets = torch::stable::new_empty(neighbors, {batch, rows * k}, ScalarType::Int);
  launch(op, edge_target_kernel, grid_of(grid_size(divide_up(neighbors.numel(), kAdjacencyThreads))),
         dim3(kAdjacencyThreads), 0, stream,
         NeighborList{op, const_data<int64_t>(neighbors), rows, k, num_points},
         mutable_data<int32_t>(targets), neighbors.numel());
  auto [sorted, edges] = stable_sort(targets);
  Tensor offsets = torch::stable::new_empty(neighbors, {batch, num_points + 1});
  launch(op, edge_offset_kernel, grid_of(grid_size(divide_up(offsets.numel(), kAdjacencyThreads))),
         dim3(kAdjacencyThreads), 0, stream, const_data<int32_t>(sorted), mutable_data<int64_t>(offsets),
         batch, num_points, rows * k);
  return {edges, offsets};
}

inline IncomingEdgesOf incoming_edges(const ReverseAdjacency& reverse, const Tensor& neighbors,
                                      int64_t num_points) {
  return {const_data<int64_t>(reverse.edges), const_data<int64_t>(reverse.offsets), rows_of(neighbors),
          neighbors.size(-1), num_points};
}

}  // namespace avatar
