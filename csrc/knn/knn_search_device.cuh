// What the searches on the device share: what they are told, their queries, and what they start from.
#pragma once

#include "knn/knn_build_device.cuh"
#include "knn/knn_list_device.cuh"

namespace avatar {
namespace {

constexpr int kThreads = 256;

template <typename A>
struct KnnArgs {
  const A* coordinates;
  const int32_t* order;
  const int64_t* counts;
  // Of the tree.
  const A* boxes;
  const int32_t* lowest;
  // In feature space: squared norms of the points minus their cloud's center, and the centers.
  const A* norms;
  const A* centers;
  int64_t num_points, leaves, dims;
  // Null where the points in the index are the queries.
  const A* queries;
  const int64_t* query_lengths;
  const A* points;
  int64_t batch, num_queries, k;
  bool exclude_self;
  A* distances;      // (batch, num_queries, k)
  int64_t* indices;  // (batch, num_queries, k)

  // Places of queries in a cloud: those of the index or rows.
  __host__ __device__ int64_t places() const { return queries ? num_queries : leaves * kLeaf; }
};

// Rounded once, so that a box is never farther than what it holds.
__device__ inline float add_square(float sum, float difference) {
  return __fmaf_rn(difference, difference, sum);
}
__device__ inline double add_square(double sum, double difference) {
  return __fma_rn(difference, difference, sum);
}

// A row of the index; one that does not belong to the points ends the kernel.
template <typename A>
__device__ int32_t indexed_row(const KnnArgs<A>& args, int64_t place) {
  const int32_t row = args.order[place];
  AVATAR_DEVICE_ASSERT_VALUE(row >= -1 && row < args.num_points,
                             "knn_search: index: does not fit the points, expected what knn_build makes of "
                             "them");
  return row;
}

// The query row at a place of a cloud, or -1 where there is none that is in use and finite. For a whole warp.
template <typename A>
__device__ int64_t query_row(const KnnArgs<A>& args, int64_t cloud, int64_t place) {
  if (place >= args.places()) return -1;
  if (!args.queries) return indexed_row(args, cloud * args.leaves * kLeaf + place);
  if (args.query_lengths) {
    const int64_t length = args.query_lengths[cloud];
    AVATAR_DEVICE_ASSERT_VALUE(length >= 0 && length <= args.num_queries,
                               "knn: query_lengths[%lld] = %lld; expected a length in [0, %lld]",
                               static_cast<long long>(cloud), static_cast<long long>(length),
                               static_cast<long long>(args.num_queries));
    if (place >= length) return -1;
  }
  const A* query = args.queries + (cloud * args.num_queries + place) * args.dims;
  bool finite = true;
  for (int64_t d = threadIdx.x % kWarpSize; d < args.dims; d += kWarpSize) finite &= is_finite(query[d]);
  return __all_sync(kAllLanes, finite) ? place : -1;
}

template <typename A>
__device__ const A* query_at(const KnnArgs<A>& args, int64_t cloud, int64_t row) {
  return args.queries ? args.queries + (cloud * args.num_queries + row) * args.dims
                      : args.points + (cloud * args.num_points + row) * args.dims;
}

// "Missing" for every neighbour.
template <typename A, typename Index>
__global__ void __launch_bounds__(kThreads)
    knn_fill_kernel(A* __restrict__ distances, Index* __restrict__ indices, int64_t count) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += stride) {
    distances[i] = std::numeric_limits<A>::infinity();
    indices[i] = -1;
  }
}

template <typename A, typename Index>
void fill_missing(A* distances, Index* indices, int64_t count, cudaStream_t stream) {
  launch("knn", knn_fill_kernel<A, Index>, grid_of(grid_size(divide_up(count, kThreads))), dim3(kThreads), 0,
         stream, distances, indices, count);
}

}  // namespace
}  // namespace avatar
