#include <algorithm>

#include "common/reverse_adjacency.cuh"

namespace avatar {
namespace {

constexpr int kThreads = 256;
// Tiles are squares of this many pixels a side, a thread for each.
constexpr int kTile = 16;
static_assert(kTile * kTile == kThreads, "a thread for each pixel of a tile");
constexpr int kWordBits = 32;
// A tile's points are the bits set in its row of a mask, whose columns are points in depth order. The mask is
// this large at most, to stay in the second-level cache; more points than it has columns come in portions.
constexpr int64_t kMaskWords = int64_t(1) << 22, kPortionWordsMin = 32;

// Products and sums that no compiler may contract: which pixels a point covers is the same on every device.
__device__ float product(float a, float b) {
  return __fmul_rn(a, b);
}
__device__ double product(double a, double b) {
  return __dmul_rn(a, b);
}
__device__ float sum(float a, float b) {
  return __fadd_rn(a, b);
}
__device__ double sum(double a, double b) {
  return __dadd_rn(a, b);
}

template <typename T>
struct Clouds {
  const T* points;         // (batch, num_points, 3)
  const T* radius;         // point n of all has element n * radius_stride
  const int64_t* lengths;  // (batch,) or none
  int64_t radius_stride, batch, num_points;

  __device__ int64_t length(int64_t b) const {
    return lengths ? min(max(lengths[b], int64_t(0)), num_points) : num_points;
  }
  // Whether point n of all may cover a pixel at all. Written so that NaN fails.
  __device__ bool present(int64_t n) const {
    constexpr T kInfinity = std::numeric_limits<T>::infinity();
    const T* point = points + 3 * n;
    return n % num_points < length(n / num_points) && point[2] > 0 && radius[n * radius_stride] > 0 &&
           point[0] > -kInfinity && point[0] < kInfinity && point[1] > -kInfinity && point[1] < kInfinity;
  }
};

struct Image {
  int64_t height, width, tile_rows, tile_columns;

  Image(int64_t height, int64_t width)
      : height(height),
        width(width),
        tile_rows(divide_up(height, kTile)),
        tile_columns(divide_up(width, kTile)) {}
  __host__ __device__ int64_t tiles() const { return tile_rows * tile_columns; }
};

template <typename T>
struct alignas(16) Splat {
  T x, y, depth;
  T limit;  // radius squared
};

// Depths to sort by; points that cover nothing come last.
template <typename T>
__global__ void __launch_bounds__(kThreads) depth_keys_kernel(Clouds<T> clouds, T* __restrict__ keys) {
  if (clouds.lengths && blockIdx.x == 0 && threadIdx.x == 0) {
    for (int64_t b = 0; b < clouds.batch; ++b) {
      AVATAR_DEVICE_ASSERT_VALUE(
          clouds.lengths[b] >= 0 && clouds.lengths[b] <= clouds.num_points,
          "rasterize_points: lengths[%lld] = %lld; expected 0 to %lld, the number of points",
          static_cast<long long>(b), static_cast<long long>(clouds.lengths[b]),
          static_cast<long long>(clouds.num_points));
    }
  }
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= clouds.batch * clouds.num_points) return;
  keys[n] = clouds.present(n) ? clouds.points[3 * n + 2] : std::numeric_limits<T>::infinity();
}

// Pixels along one axis whose centre may be closer than reach: [*first, *last].
__device__ bool pixel_span(double position, double reach, int64_t size, int64_t* first, int64_t* last) {
  const double low = max(0.0, ceil(position - 0.5 - reach));
  const double high = min(static_cast<double>(size - 1), floor(position - 0.5 + reach));
  if (!(low <= high)) return false;
  *first = static_cast<int64_t>(low);
  *last = static_cast<int64_t>(high);
  return true;
}

// How far a position is from the pixel centres of a tile, along one axis.
__device__ double distance_to_tile(double position, int64_t tile) {
  const double first = static_cast<double>(tile * kTile) + 0.5, last = first + (kTile - 1);
  return max(0.0, max(first - position, position - last));
}

// Points of rank [first_rank, first_rank + kWordBits * words) in depth order: their splats, and their bits in
// the mask (batch, tiles, words) of the tiles that they may touch.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    bin_kernel(Clouds<T> clouds, const int64_t* __restrict__ order, Splat<T>* __restrict__ splats,
               unsigned* __restrict__ mask, Image image, int64_t first_rank, int64_t words) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t b = i / (kWordBits * words), bit = i - b * kWordBits * words;
  if (b >= clouds.batch || first_rank + bit >= clouds.num_points) return;
  const int64_t place = b * clouds.num_points + first_rank + bit, n = b * clouds.num_points + order[place];
  if (!clouds.present(n)) return;
  const T* point = clouds.points + 3 * n;
  const T radius = clouds.radius[n * clouds.radius_stride];
  splats[place] = {point[0], point[1], point[2], product(radius, radius)};
  // Never too few pixels, whatever the rounding of the test itself.
  const double longer_side = static_cast<double>(max(image.height, image.width));
  const double reach = radius * 1.00001 + (1.0 + longer_side) * 1.2e-7, x = point[0], y = point[1];
  int64_t first_row, last_row, first_column, last_column;
  if (!pixel_span(x, reach, image.width, &first_column, &last_column) ||
      !pixel_span(y, reach, image.height, &first_row, &last_row)) {
    return;
  }
  unsigned* const word = mask + b * image.tiles() * words + bit / kWordBits;
  for (int64_t row = first_row / kTile; row <= last_row / kTile; ++row) {
    const double down = distance_to_tile(y, row);
    for (int64_t column = first_column / kTile; column <= last_column / kTile; ++column) {
      const double across = distance_to_tile(x, column);
      if (down * down + across * across > reach * reach) continue;
      atomicOr(word + (row * image.tile_columns + column) * words, 1u << (bit % kWordBits));
    }
  }
}

template <typename T>
struct Slots {
  int64_t* indices;  // (batch, height, width, points_per_pixel), as the next two
  T* depths;
  T* distances;
  int64_t points_per_pixel;
  // (batch, height, width): how many each pixel has taken in the portions before; none if there is but one.
  int64_t* used;
  bool first, last;  // whether this portion is
};

// One block a tile: its points come nearest first, and each pixel takes those that cover it until it is full.
template <typename T, typename A>
__global__ void __launch_bounds__(kThreads, 4)
    tile_kernel(const Splat<A>* __restrict__ splats, const int64_t* __restrict__ order,
                const unsigned* __restrict__ mask, Slots<T> slots, Image image, int64_t num_points,
                int64_t first_rank, int64_t words) {
  AVATAR_SHARED(int64_t, places, kThreads);
  AVATAR_SHARED(Splat<A>, splat, kThreads);
  AVATAR_SHARED(int64_t, index, kThreads);
  const int64_t b = blockIdx.x / image.tiles(), tile = blockIdx.x % image.tiles();
  const int64_t row = tile / image.tile_columns * kTile + threadIdx.x / kTile;
  const int64_t column = tile % image.tile_columns * kTile + threadIdx.x % kTile;
  const bool inside = row < image.height && column < image.width;
  const int64_t pixel = (b * image.height + row) * image.width + column, k = slots.points_per_pixel;
  const A center_x = static_cast<A>(column) + A(0.5), center_y = static_cast<A>(row) + A(0.5);
  int64_t slot = k;
  if (inside) slot = slots.first ? 0 : slots.used[pixel];

  const unsigned* const own = mask + blockIdx.x * words;
  for (int64_t first_word = 0; first_word < words; first_word += kThreads) {
    if (__syncthreads_count(slot < k) == 0) break;
    const int64_t w = first_word + threadIdx.x;
    const unsigned word = w < words ? own[w] : 0u;
    int total;
    const int before = block_exclusive_sum(__popc(word), &total);
    for (int first = 0; first < total; first += kThreads) {
      int position = before - first;
      for (unsigned bits = word; bits != 0; bits &= bits - 1, ++position) {
        if (position < 0 || position >= kThreads) continue;
        places[position] = b * num_points + first_rank + w * kWordBits + __ffs(bits) - 1;
      }
      __syncthreads();
      const int count = min(total - first, kThreads);
      if (threadIdx.x < count) {
        const int64_t place = places[threadIdx.x];
        splat[threadIdx.x] = splats[place];
        index[threadIdx.x] = order[place];
      }
      __syncthreads();
      for (int e = 0; e < count && slot < k; ++e) {
        const A across = splat[e].x - center_x, down = splat[e].y - center_y;
        const A distance = sum(product(across, across), product(down, down));
        if (!(distance < splat[e].limit)) continue;
        slots.indices[pixel * k + slot] = index[e];
        slots.depths[pixel * k + slot] = static_cast<T>(splat[e].depth);
        slots.distances[pixel * k + slot] = static_cast<T>(distance);
        ++slot;
      }
      if (__syncthreads_count(slot < k) == 0) break;
    }
  }
  if (!inside) return;
  if (!slots.last) {
    slots.used[pixel] = slot;
    return;
  }
  const T far = static_cast<T>(std::numeric_limits<A>::infinity());
  for (; slot < k; ++slot) {
    slots.indices[pixel * k + slot] = -1;
    slots.depths[pixel * k + slot] = far;
    slots.distances[pixel * k + slot] = far;
  }
}

// One warp a point, whose lanes take its slots in turn and then add up what they have.
template <typename T, typename A>
__global__ void __launch_bounds__(kThreads, 4)
    rasterize_backward_kernel(const T* __restrict__ grad_depths, const T* __restrict__ grad_distances,
                              const T* __restrict__ points, IncomingEdgesOf incoming,
                              T* __restrict__ grad_points, int64_t count, int64_t width) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (n >= count) return;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t b = n / incoming.num_points, first_slot = b * incoming.rows * incoming.k;
  const IncomingEdges edges = incoming.point(b, n - b * incoming.num_points);
  const A x = static_cast<A>(points[3 * n]), y = static_cast<A>(points[3 * n + 1]);
  A grads[3] = {};
  for (int64_t e = lane; e < edges.count; e += kWarpSize) {
    const int64_t slot = edges.edges[e], pixel = edges.row(e), row = pixel / width;
    const A twice = A(2) * static_cast<A>(grad_distances[first_slot + slot]);
    grads[0] += twice * (x - (static_cast<A>(pixel - row * width) + A(0.5)));
    grads[1] += twice * (y - (static_cast<A>(row) + A(0.5)));
    grads[2] += static_cast<A>(grad_depths[first_slot + slot]);
  }
#pragma unroll
  for (int axis = 0; axis < 3; ++axis) {
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
      grads[axis] += __shfl_xor_sync(0xffffffffu, grads[axis], step);
    }
    if (lane == 0) grad_points[3 * n + axis] = static_cast<T>(grads[axis]);
  }
}

// The points of each cloud in ascending (depth, index): (batch, num_points) int64.
template <typename T>
Tensor depth_order(const Clouds<T>& clouds, const Tensor& points, cudaStream_t stream) {
  const std::vector<int64_t> shape{clouds.batch, clouds.num_points};
  Tensor keys = torch::stable::new_empty(points, shape);
  launch("rasterize_depth_keys", depth_keys_kernel<T>, grid_of(divide_up(keys.numel(), kThreads)),
         dim3(kThreads), 0, stream, clouds, mutable_data<T>(keys));
  return std::get<1>(stable_sort(keys));
}

// Fills `slots` of the images of all clouds.
template <typename T, typename A>
void rasterize_clouds(const Clouds<A>& clouds, const Tensor& points, Slots<T> slots, const Image& image,
                      cudaStream_t stream) {
  const int64_t count = clouds.batch * clouds.num_points, tiles = clouds.batch * image.tiles();
  const int64_t all_words = divide_up(clouds.num_points, kWordBits);
  const int64_t words = std::min(std::max(kMaskWords / tiles, kPortionWordsMin), all_words);
  const int64_t portions = words ? divide_up(all_words, words) : 1;
  const Tensor order = depth_order(clouds, points, stream);
  const Tensor splats = torch::stable::new_empty(points, {count, 4});
  const Tensor mask = torch::stable::new_empty(points, {tiles, words}, ScalarType::Int);
  const Tensor used = torch::stable::new_empty(
      points, {portions > 1 ? clouds.batch * image.height * image.width : 0}, ScalarType::Long);
  slots.used = mutable_data<int64_t>(used);
  const auto ranks = const_data<int64_t>(order);
  const auto splat_data = static_cast<Splat<A>*>(splats.mutable_data_ptr());
  const auto mask_data = static_cast<unsigned*>(mask.mutable_data_ptr());
  for (int64_t portion = 0; portion < portions; ++portion) {
    const int64_t first_rank = portion * words * kWordBits;
    slots.first = portion == 0;
    slots.last = portion + 1 == portions;
    if (words) {
      check_cuda(cudaMemsetAsync(mask_data, 0, sizeof(unsigned) * tiles * words, stream), "rasterize_bins");
    }
    launch("rasterize_bins", bin_kernel<A>, grid_of(divide_up(clouds.batch * words * kWordBits, kThreads)),
           dim3(kThreads), 0, stream, clouds, ranks, splat_data, mask_data, image, first_rank, words);
    launch("rasterize_tiles", tile_kernel<T, A>, grid_of(tiles), dim3(kThreads), 0, stream,
           static_cast<const Splat<A>*>(splat_data), ranks, static_cast<const unsigned*>(mask_data), slots,
           image, clouds.num_points, first_rank, words);
  }
}

// points (B, N, 3), radius () or (B, N), lengths (B,) -> depths, distances, indices, each
// (B, height, width, points_per_pixel).
std::tuple<Tensor, Tensor, Tensor> rasterize_points_cuda(const Tensor& points_in, const Tensor& radius_in,
                                                         int64_t height, int64_t width,
                                                         int64_t points_per_pixel,
                                                         const std::optional<Tensor>& lengths_in) {
  const torch::stable::accelerator::DeviceGuard guard(points_in.get_device_index());
  const Tensor points = to_compute(points_in);
  const Tensor radius = as_contiguous(to_type(radius_in, points.scalar_type()));
  const int64_t batch = points.size(0), num_points = points.size(1);
  std::optional<Tensor> lengths;
  if (lengths_in) lengths = as_contiguous(*lengths_in);
  const std::vector<int64_t> shape{batch, height, width, points_per_pixel};
  Tensor indices = torch::stable::new_empty(points, shape, ScalarType::Long);
  Tensor depths = torch::stable::new_empty(points_in, shape);
  Tensor distances = torch::stable::new_empty(points_in, shape);
  if (indices.numel() > 0) {
    dispatch_floating(points_in.scalar_type(), "rasterize_points", [&](auto zero) {
      using T = decltype(zero);
      using A = typename Accumulate<T>::type;
      const Clouds<A> clouds{const_data<A>(points),
                             const_data<A>(radius),
                             lengths ? const_data<int64_t>(*lengths) : nullptr,
                             radius.dim() == 0 ? 0 : 1,
                             batch,
                             num_points};
      const Slots<T> slots{mutable_data<int64_t>(indices),
                           static_cast<T*>(depths.mutable_data_ptr()),
                           static_cast<T*>(distances.mutable_data_ptr()),
                           points_per_pixel,
                           nullptr,
                           true,
                           true};
      rasterize_clouds<T, A>(clouds, points, slots, Image(height, width), current_stream(points));
    });
  }
  return {depths, distances, indices};
}

Tensor rasterize_points_backward_cuda(const Tensor& grad_depths_in, const Tensor& grad_distances_in,
                                      const Tensor& indices_in, const Tensor& points_in) {
  const torch::stable::accelerator::DeviceGuard guard(points_in.get_device_index());
  const Tensor points = as_contiguous(points_in);
  const Tensor indices = as_contiguous(indices_in);
  const Tensor grad_depths = as_contiguous(grad_depths_in);
  const Tensor grad_distances = as_contiguous(grad_distances_in);
  const int64_t num_points = points.size(1), count = points.size(0) * num_points;
  const cudaStream_t stream = current_stream(points);
  const ReverseAdjacency slots_of = reverse_adjacency("rasterize_points_backward", indices, num_points);
  Tensor grad_points = torch::stable::new_empty(points, points.sizes());
  dispatch_floating(points.scalar_type(), "rasterize_points_backward", [&](auto zero) {
    using T = decltype(zero);
    using A = typename Accumulate<T>::type;
    launch("rasterize_points_backward", rasterize_backward_kernel<T, A>,
           grid_of(divide_up(count, kThreads / kWarpSize)), dim3(kThreads), 0, stream,
           static_cast<const T*>(grad_depths.const_data_ptr()),
           static_cast<const T*>(grad_distances.const_data_ptr()),
           static_cast<const T*>(points.const_data_ptr()), incoming_edges(slots_of, indices, num_points),
           static_cast<T*>(grad_points.mutable_data_ptr()), count, indices.size(2));
  });
  return grad_points;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avatar_ops, CUDA, m) {
  m.impl("rasterize_points", TORCH_BOX(&rasterize_points_cuda));
  m.impl("rasterize_points_backward", TORCH_BOX(&rasterize_points_backward_cuda));
}

}  // namespace avatar
