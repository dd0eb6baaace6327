// The index of knn on the device, in the same parts as on the CPU (see knn_index.h): points packed into
// leaves of a warp's width, in Morton order where a tree is used. The tree is 32 wide: level 0 are the
// leaves, each node of a level covers 32 of the level before, up to the first level of at most 32 nodes; the
// boxes and the smallest rows of all levels lie one after another. In feature space `bounds` are squared
// norms of the points minus a center, +inf after the last, and `extra` the centers. Source: Karras,
// Maximizing Parallelism in the Construction of BVHs, Octrees, and k-d Trees, HPG 2012.
#pragma once

#include <algorithm>

#include "common/reverse_adjacency.cuh"
#include "knn/knn_simd.h"

namespace avatar {
namespace {

constexpr int kLeafBits = 5;
static_assert(kLeaf == kWarpSize && kLeaf == 1 << kLeafBits, "one lane a point of a leaf");

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kBuildThreads = 256, kBuildWarps = kBuildThreads / kWarpSize;
// Enough for clouds of less than 2^31 points.
constexpr int kMaxLevels = 6;
// Points whose mean is the center of a cloud in feature space.
constexpr int64_t kCenterSamples = 512;

struct TreeLevels {
  int64_t leaves;
  int count = 0;

  explicit TreeLevels(int64_t leaves) : leaves(leaves) {
    while (leaves > 0 && (count == 0 || size(count - 1) > kLeaf)) ++count;
  }
  __host__ __device__ int64_t size(int level) const {
    const int bits = kLeafBits * level;
    return (leaves + (int64_t(1) << bits) - 1) >> bits;
  }
  // Number of the first node of a level.
  __host__ __device__ int64_t first(int level) const {
    int64_t sum = 0;
    for (int before = 0; before < level; ++before) sum += size(before);
    return sum;
  }
};

struct DeviceIndex {
  Tensor coordinates, order, counts, bounds, extra;
};

template <typename A>
__device__ bool is_finite(A value) {
  return value - value == 0;
}

// Unsigned numbers in the order of the values.
__device__ inline unsigned long long ordered_bits(double value) {
  const long long bits = __double_as_longlong(value);
  return static_cast<unsigned long long>(bits < 0 ? ~bits : bits | (1ll << 63));
}

__device__ inline double from_ordered_bits(unsigned long long bits) {
  const long long value = static_cast<long long>(bits);
  return __longlong_as_double(value < 0 ? value & ~(1ll << 63) : ~value);
}

template <typename A>
__device__ A warp_min(A value) {
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    const A other = __shfl_xor_sync(kAllLanes, value, step);
    value = other < value ? other : value;
  }
  return value;
}

// extent (batch, 2, dims): ordered bits of the smallest coordinates and, inverted, of the largest, all ones
// before. Each cloud has `blocks` blocks.
template <typename A>
__global__ void __launch_bounds__(kBuildThreads)
    knn_extent_kernel(const A* __restrict__ points, int64_t blocks, int64_t rows, int dims,
                      const int64_t* __restrict__ lengths, unsigned long long* __restrict__ extent) {
  const int64_t cloud = blockIdx.x / blocks, first = (blockIdx.x - cloud * blocks) * kBuildThreads;
  const int64_t used = lengths && lengths[cloud] < rows ? lengths[cloud] : rows;
  const A* cloud_points = points + cloud * rows * dims;
  for (int d = 0; d < dims; ++d) {
    unsigned long long least = ~0ull, most = ~0ull;
    for (int64_t row = first + threadIdx.x; row < used; row += blocks * kBuildThreads) {
      const A value = cloud_points[row * dims + d];
      if (!is_finite(value)) continue;
      const unsigned long long bits = ordered_bits(static_cast<double>(value));
      least = bits < least ? bits : least;
      most = ~bits < most ? ~bits : most;
    }
    least = warp_min(least);
    most = warp_min(most);
    if (threadIdx.x % kWarpSize == 0) {
      atomicMin(&extent[cloud * 2 * dims + d], least);
      atomicMin(&extent[(cloud * 2 + 1) * dims + d], most);
    }
  }
}

// Sort keys (batch, rows): the Morton code of a point, 0 without extent; the largest number for a point that
// is not in the index. Adds the others to counts. Each cloud has `blocks` blocks.
template <typename A>
__global__ void __launch_bounds__(kBuildThreads)
    knn_key_kernel(const A* __restrict__ points, int64_t blocks, int64_t rows, int64_t dims,
                   const int64_t* __restrict__ lengths, const unsigned long long* __restrict__ extent,
                   int64_t* __restrict__ keys, unsigned long long* __restrict__ counts) {
  const int64_t cloud = blockIdx.x / blocks;
  const int64_t row = (blockIdx.x - cloud * blocks) * kBuildThreads + threadIdx.x;
  const int64_t length = lengths ? lengths[cloud] : rows;
  AVATAR_DEVICE_ASSERT_VALUE(
      length >= 0 && length <= rows, "knn: lengths[%lld] = %lld; expected a length in [0, %lld]",
      static_cast<long long>(cloud), static_cast<long long>(length), static_cast<long long>(rows));
  bool used = row < length;
  const A* point = points + (cloud * rows + row) * dims;
  for (int64_t d = 0; used && d < dims; ++d) used = is_finite(point[d]);
  if (row < rows) {
    int64_t key = used ? 0 : std::numeric_limits<int64_t>::max();
    if (used && extent) {
      const int bits = dims == 1 ? 31 : static_cast<int>(62 / dims);
      for (int d = 0; d < dims; ++d) {
        // Halves, so that the difference cannot overflow.
        const double least = from_ordered_bits(extent[cloud * 2 * dims + d]) / 2;
        const double most = from_ordered_bits(~extent[(cloud * 2 + 1) * dims + d]) / 2;
        const double cells = static_cast<double>(1ll << bits);
        const double within = static_cast<double>(point[d]) / 2 - least;
        const double cell = most > least ? within / (most - least) * cells : 0.;
        const int64_t last = (1ll << bits) - 1;
        const int64_t code = cell < static_cast<double>(last) ? static_cast<int64_t>(cell) : last;
        for (int bit = 0; bit < bits; ++bit) key |= (code >> bit & 1) << (bit * dims + d);
      }
    }
    keys[cloud * rows + row] = key;
  }
  const int count = __syncthreads_count(used);
  if (threadIdx.x == 0 && count > 0) atomicAdd(&counts[cloud], static_cast<unsigned long long>(count));
}

// One side each of a node's box, from those of its lanes.
template <typename A>
__device__ void store_box(A* boxes, int64_t node, int dims, int d, A least, A most) {
  least = warp_min(least);
  most = -warp_min(-most);
  if (threadIdx.x % kWarpSize == 0) {
    boxes[node * 2 * dims + d] = least;
    boxes[(node * 2 + 1) * dims + d] = most;
  }
}

__device__ inline void store_lowest(int32_t* lowest, int64_t node, int32_t row) {
  const int32_t none = std::numeric_limits<int32_t>::max();
  const int32_t least = warp_min(row < 0 ? none : row);
  if (threadIdx.x % kWarpSize == 0) lowest[node] = least == none ? -1 : least;
}

// In feature space: the mean of some of a cloud's points, or 0 where it overflows. A block kWarpSize
// coordinates of a cloud.
template <typename A>
__global__ void __launch_bounds__(kBuildThreads)
    knn_center_kernel(const A* __restrict__ points, const int64_t* __restrict__ sorted,
                      const int64_t* __restrict__ counts, int64_t rows, int64_t dims,
                      A* __restrict__ centers) {
  AVATAR_SHARED(A, partial, kBuildThreads);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t groups = (dims + kWarpSize - 1) / kWarpSize, cloud = blockIdx.x / groups;
  const int64_t d = (blockIdx.x - cloud * groups) * kWarpSize + lane;
  const int64_t count = counts[cloud], samples = count < kCenterSamples ? count : kCenterSamples;
  A sum = 0;
  for (int64_t i = warp; i < samples && d < dims; i += kBuildWarps) {
    sum += points[(cloud * rows + sorted[cloud * rows + i * count / samples]) * dims + d];
  }
  partial[threadIdx.x] = sum;
  __syncthreads();
  if (warp > 0 || d >= dims) return;
  for (int other = 1; other < kBuildWarps; ++other) sum += partial[other * kWarpSize + lane];
  const A mean = samples > 0 ? sum / static_cast<A>(samples) : A(0);
  centers[cloud * dims + d] = is_finite(mean) ? mean : A(0);
}

// A warp a leaf: order, coordinates and the leaf's node with boxes, norms with centers.
template <typename A>
__global__ void __launch_bounds__(kBuildThreads, 4)
    knn_pack_kernel(const A* __restrict__ points, const int64_t* __restrict__ sorted,
                    const int64_t* __restrict__ counts, int64_t batch, int64_t rows, int64_t leaves, int dims,
                    A* __restrict__ coordinates, int32_t* __restrict__ order, A* __restrict__ boxes,
                    int32_t* __restrict__ lowest, const A* __restrict__ centers, A* __restrict__ norms) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kBuildWarps + threadIdx.x / kWarpSize;
  if (warp >= batch * leaves) return;
  const int64_t cloud = warp / leaves, leaf = warp - cloud * leaves, slot = leaf * kLeaf + lane;
  const int32_t row = slot < counts[cloud] ? static_cast<int32_t>(sorted[cloud * rows + slot]) : -1;
  const A* point = points + (cloud * rows + row) * dims;
  const A infinity = std::numeric_limits<A>::infinity();
  order[warp * kLeaf + lane] = row;
  A norm = row < 0 ? infinity : A(0);
  for (int d = 0; d < dims; ++d) {
    const A value = row < 0 ? A(0) : point[d];
    if (centers) norm += (value - centers[cloud * dims + d]) * (value - centers[cloud * dims + d]);
    coordinates[(warp * dims + d) * kLeaf + lane] = value;
    if (boxes) {
      store_box(boxes, cloud * 2 * leaves + leaf, dims, d, row < 0 ? infinity : value,
                row < 0 ? -infinity : value);
    }
  }
  if (boxes) store_lowest(lowest, cloud * 2 * leaves + leaf, row);
  if (centers) norms[warp * kLeaf + lane] = norm;
}

// A warp a node of a level, from the level before.
template <typename A>
__global__ void __launch_bounds__(kBuildThreads)
    knn_level_kernel(TreeLevels levels, int level, int64_t batch, int64_t leaves, int dims,
                     A* __restrict__ boxes, int32_t* __restrict__ lowest) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kBuildWarps + threadIdx.x / kWarpSize;
  if (warp >= batch * levels.size(level)) return;
  const int64_t cloud = warp / levels.size(level), index = warp - cloud * levels.size(level);
  const int64_t nodes = cloud * 2 * leaves, node = nodes + levels.first(level) + index;
  const int64_t child = index * kLeaf + lane, from = nodes + levels.first(level - 1) + child;
  const bool exists = child < levels.size(level - 1);
  const int32_t row = exists ? lowest[from] : -1;
  const A infinity = std::numeric_limits<A>::infinity();
  for (int d = 0; d < dims; ++d) {
    store_box(boxes, node, dims, d, row < 0 ? infinity : boxes[from * 2 * dims + d],
              row < 0 ? -infinity : boxes[(from * 2 + 1) * dims + d]);
  }
  store_lowest(lowest, node, row);
}

// points (B, N, D), contiguous, in a compute dtype.
template <typename A>
DeviceIndex build_index(const Tensor& points, const std::optional<Tensor>& lengths_in) {
  const int64_t batch = points.size(0), rows = points.size(1), dims = points.size(2);
  if (rows > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("knn: got clouds of " + std::to_string(rows) +
                                " points, expected less than 2^31");
  }
  const int64_t leaves = divide_up(rows, kLeaf);
  const bool tree = dims <= kTreeDims;
  const cudaStream_t stream = current_stream(points);
  const ScalarType type = points.scalar_type();
  const auto empty = [&](torch::headeronly::IntHeaderOnlyArrayRef size, ScalarType of) {
    return torch::stable::new_empty(points, size, of);
  };
  // What no point fills is defined too.
  DeviceIndex index{
      empty({batch, leaves, dims, kLeaf}, type), empty({batch, leaves, kLeaf}, ScalarType::Int),
      torch::stable::new_zeros(points, {batch}, ScalarType::Long),
      tree ? torch::stable::new_zeros(points, {batch, 2 * leaves, 2, dims})
           : torch::stable::new_zeros(points, {batch, leaves, kLeaf}),
      tree ? empty({batch, 2 * leaves}, ScalarType::Int) : torch::stable::new_zeros(points, {batch, dims})};
  if (tree) torch::stable::fill_(index.extra, -1.);
  std::optional<Tensor> lengths;
  if (lengths_in) lengths = as_contiguous(*lengths_in);
  const Tensor extent = empty({batch, 2, tree ? dims : 0}, ScalarType::Long);
  Tensor keys = empty({batch, rows}, ScalarType::Long);
  const A* data = const_data<A>(points);
  auto* bits = reinterpret_cast<unsigned long long*>(mutable_data<int64_t>(extent));
  const int64_t* used = lengths ? const_data<int64_t>(*lengths) : nullptr;
  // An empty cloud still has its length checked.
  const int64_t blocks = std::max<int64_t>(1, divide_up(rows, kBuildThreads));
  if (tree) {
    check_cuda(cudaMemsetAsync(bits, 0xff, extent.numel() * sizeof(*bits), stream), "knn");
    const int64_t some = std::min<int64_t>(blocks, 512);
    launch("knn", knn_extent_kernel<A>, grid_of(batch * some), dim3(kBuildThreads), 0, stream, data, some,
           rows, static_cast<int>(dims), used, bits);
  }
  launch("knn", knn_key_kernel<A>, grid_of(batch * blocks), dim3(kBuildThreads), 0, stream, data, blocks,
         rows, dims, used, tree ? bits : nullptr, mutable_data<int64_t>(keys),
         reinterpret_cast<unsigned long long*>(mutable_data<int64_t>(index.counts)));
  const Tensor sorted = std::get<1>(stable_sort(keys));
  A* boxes = tree ? mutable_data<A>(index.bounds) : nullptr;
  int32_t* lowest = tree ? mutable_data<int32_t>(index.extra) : nullptr;
  A* norms = tree ? nullptr : mutable_data<A>(index.bounds);
  A* centers = tree ? nullptr : mutable_data<A>(index.extra);
  if (!tree) {
    launch("knn", knn_center_kernel<A>, grid_of(batch * divide_up(dims, kWarpSize)), dim3(kBuildThreads), 0,
           stream, data, const_data<int64_t>(sorted), const_data<int64_t>(index.counts), rows, dims, centers);
  }
  launch("knn", knn_pack_kernel<A>, grid_of(divide_up(batch * leaves, kBuildWarps)), dim3(kBuildThreads), 0,
         stream, data, const_data<int64_t>(sorted), const_data<int64_t>(index.counts), batch, rows, leaves,
         dims, mutable_data<A>(index.coordinates), mutable_data<int32_t>(index.order), boxes, lowest, centers,
         norms);
  const TreeLevels levels(leaves);
  for (int level = 1; tree && level < levels.count; ++level) {
    launch("knn", knn_level_kernel<A>, grid_of(divide_up(batch * levels.size(level), kBuildWarps)),
           dim3(kBuildThreads), 0, stream, levels, level, batch, leaves, static_cast<int>(dims), boxes,
           lowest);
  }
  return index;
}

}  // namespace
}  // namespace avatar
