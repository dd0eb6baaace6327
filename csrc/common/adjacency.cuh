// Reverse adjacency of a neighbour list on the device: for each point, the edges that lead to it. With it,
// gradients flow back along edges in a fixed order without atomics.
#pragma once

#include "common/radix_sort.cuh"

namespace avatar {

struct ReverseAdjacency {
  // The edges into point n of batch b are edges[offsets[b * num_points + n] .. offsets[b * num_points + n +
  // 1]), ascending; an edge is a position in that batch's part of the neighbours.
  Tensor offsets;  // (batch * num_points + 1,) int64
  Tensor edges;    // uint32, held as int32; what comes after the last offset has no meaning
};

constexpr int kAdjacencyThreads = 256;

static __global__ void __launch_bounds__(kAdjacencyThreads)
    adjacency_keys_kernel(const int64_t* __restrict__ neighbors, uint32_t* __restrict__ keys,
                          uint32_t* __restrict__ edges, int64_t count, int64_t per_batch, int64_t num_points,
                          uint32_t none) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kAdjacencyThreads + threadIdx.x;
  if (e >= count) return;
  const int64_t neighbor = neighbors[e], b = e / per_batch;
  AVATAR_DEVICE_ASSERT(neighbor >= -1 && neighbor < num_points, "an index is %lld, outside [-1, %lld)",
                       static_cast<long long>(neighbor), static_cast<long long>(num_points));
  keys[e] = neighbor < 0 ? none : static_cast<uint32_t>(b * num_points + neighbor);
  edges[e] = static_cast<uint32_t>(e - b * per_batch);
}

// offsets[n]: the first position whose key is not below n, for n up to num_keys.
static __global__ void __launch_bounds__(kAdjacencyThreads)
    adjacency_offsets_kernel(const uint32_t* __restrict__ keys, int64_t* __restrict__ offsets, int64_t count,
                             int64_t num_keys) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kAdjacencyThreads + threadIdx.x;
  if (n > num_keys) return;
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (keys[middle] < n) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  offsets[n] = low;
}

// neighbors (batch, ...) int64, contiguous, every entry -1 (skipped) or in [0, num_points), which is
// asserted.
inline ReverseAdjacency reverse_adjacency(const char* op, const Tensor& neighbors, int64_t num_points,
                                          cudaStream_t stream) {
  const int64_t batch = neighbors.size(0), count = neighbors.numel(), num_keys = batch * num_points;
  const int64_t per_batch = batch ? count / batch : 0;
  if (num_keys >= int64_t(1) << 32 || per_batch > int64_t(1) << 32) {
    throw std::invalid_argument(std::string(op) + ": more than 2**32 points, or slots of one batch element");
  }
  Tensor keys = torch::stable::new_empty(neighbors, {count}, ScalarType::Int);
  Tensor edges = torch::stable::new_empty(neighbors, {count}, ScalarType::Int);
  Tensor offsets = torch::stable::new_empty(neighbors, {num_keys + 1});
  const auto data = [](const Tensor& tensor) { return static_cast<uint32_t*>(tensor.mutable_data_ptr()); };
  launch("adjacency_keys", adjacency_keys_kernel, grid_of(divide_up(count, kAdjacencyThreads)),
         dim3(kAdjacencyThreads), 0, stream, const_data<int64_t>(neighbors), data(keys), data(edges), count,
         per_batch, num_points, static_cast<uint32_t>(num_keys));
  sort_by_key<uint32_t, uint32_t>(keys, edges, bit_width(num_keys), stream);
  launch("adjacency_offsets", adjacency_offsets_kernel, grid_of(divide_up(num_keys + 1, kAdjacencyThreads)),
         dim3(kAdjacencyThreads), 0, stream, static_cast<const uint32_t*>(data(keys)),
         mutable_data<int64_t>(offsets), count, num_keys);
  return {offsets, edges};
}

}  // namespace avatar
