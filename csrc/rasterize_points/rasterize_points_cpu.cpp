#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "common/adjacency.h"
#include "common/radix_sort.h"
#include "common/tensor.h"
#include "rasterize_points/rasterize_points_simd.h"

namespace avatar {
namespace {

// Points are brought to tiles in depth order, this many at a time ...
constexpr int64_t kSegmentPoints = 1 << 19;
// ... and with at most about this many (point, tile) pairs at a time, so that memory stays bounded however
// many tiles each point covers. Tiles whose pixels are all full take no more points.
constexpr int64_t kPairsMax = 1 << 22;

// The tiles that a point may touch; empty where first_row > last_row.
struct TileRange {
  int32_t first_row, last_row, first_column, last_column;

  bool empty() const { return first_row > last_row; }
  int64_t area() const {
    return (int64_t(last_row) - first_row + 1) * (int64_t(last_column) - first_column + 1);
  }
};

constexpr TileRange kNoTiles{0, -1, 0, -1};

// Pixels along one axis whose centre may be closer than radius, as tiles: never too few, whatever the
// rounding of the test itself.
bool tile_span(double position, double radius, int64_t size, int32_t* first, int32_t* last) {
  const double reach = radius * 1.00001 + (1.0 + static_cast<double>(size)) * 1.2e-7;
  const double low = std::max(0.0, std::ceil(position - 0.5 - reach));
  const double high = std::min(static_cast<double>(size - 1), std::floor(position - 0.5 + reach));
  if (!(low <= high)) return false;
  *first = static_cast<int32_t>(static_cast<int64_t>(low) / kTile);
  *last = static_cast<int32_t>(static_cast<int64_t>(high) / kTile);
  return true;
}

template <typename T>
TileRange tile_range(const T* point, T radius, int64_t height, int64_t width) {
  // Written so that NaN fails.
  const bool present = point[2] > 0 && radius > 0 && std::isfinite(point[0]) && std::isfinite(point[1]);
  TileRange range = kNoTiles;
  if (!present || !tile_span(point[0], radius, width, &range.first_column, &range.last_column) ||
      !tile_span(point[1], radius, height, &range.first_row, &range.last_row)) {
    return kNoTiles;
  }
  return range;
}

template <typename T>
struct Cloud {
  const T* points;  // (num_points, 3)
  const T* radius;  // element n * radius_stride
  int64_t radius_stride, num_points, height, width, points_per_pixel;
  int64_t* indices;  // (height, width, points_per_pixel), as the next two
  T* depths;
  T* distances;
};

// The visible points in ascending (depth, index), and the tiles of every point.
template <typename Index>
struct DepthOrder {
  Buffer<TileRange> ranges;
  Buffer<Index> order;
  int64_t count = 0;
};

template <typename Index, typename T>
DepthOrder<Index> depth_order(const Cloud<T>& cloud) {
  using Key = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  constexpr int64_t kBlockPoints = 1 << 14;
  const int64_t blocks = (cloud.num_points + kBlockPoints - 1) / kBlockPoints;
  DepthOrder<Index> result;
  result.ranges = buffer<TileRange>(cloud.num_points);
  std::vector<int64_t> places(blocks + 1, 0);
  parallel_tasks(blocks, [&](int64_t block) {
    const int64_t end = std::min(cloud.num_points, (block + 1) * kBlockPoints);
    int64_t visible = 0;
    for (int64_t n = block * kBlockPoints; n < end; ++n) {
      result.ranges[n] =
          tile_range(cloud.points + 3 * n, cloud.radius[n * cloud.radius_stride], cloud.height, cloud.width);
      visible += !result.ranges[n].empty();
    }
    places[block + 1] = visible;
  });
  for (int64_t block = 0; block < blocks; ++block) places[block + 1] += places[block];
  result.count = places[blocks];
  result.order = buffer<Index>(result.count);
  Buffer<Key> keys = buffer<Key>(result.count);
  parallel_tasks(blocks, [&](int64_t block) {
    int64_t place = places[block];
    const int64_t end = std::min(cloud.num_points, (block + 1) * kBlockPoints);
    for (int64_t n = block * kBlockPoints; n < end; ++n) {
      if (result.ranges[n].empty()) continue;
      // Positive floating numbers are ordered as their bits are.
      std::memcpy(&keys[place], cloud.points + 3 * n + 2, sizeof(T));
      result.order[place++] = static_cast<Index>(n);
    }
  });
  sort_by_key(keys, result.order, result.count);
  return result;
}

// The tiles of one image and what they have taken so far.
template <typename T>
class TileGrid {
 public:
  explicit TileGrid(const Cloud<T>& cloud)
      : cloud_(cloud),
        rows_((cloud.height + kTile - 1) / kTile),
        columns_((cloud.width + kTile - 1) / kTile),
        full_(rows_ * columns_, 0),
        used_(buffer<int64_t>(cloud.height * cloud.width)) {
    torch::stable::parallel_for(0, cloud.height * cloud.width, 1 << 15, [&](int64_t begin, int64_t end) {
      std::fill(used_.get() + begin, used_.get() + end, 0);
    });
  }

  int64_t tiles() const { return rows_ * columns_; }
  bool all_full() const { return num_full_ == tiles(); }

  // Adds splats [0, count), which are nearer than any added later.
  void add(const Splat<T>* splats, const TileRange* ranges, int64_t count) {
    constexpr int64_t kBlockSplats = 1 << 12, kCountsMax = 1 << 20, kBlocksMax = 16;
    const int64_t blocks =
        std::clamp<int64_t>(std::min(count / kBlockSplats, kCountsMax / tiles()), 1, kBlocksMax);
    const int64_t block_size = (count + blocks - 1) / blocks;
    // For each tile, what each block brings; then where it goes.
    std::vector<int64_t> places(blocks * tiles(), 0);
    const auto for_each_pair = [&](int64_t block, const auto& visit) {
      int64_t* place = places.data() + block * tiles();
      const int64_t end = std::min(count, (block + 1) * block_size);
      for (int64_t i = block * block_size; i < end; ++i) {
        for (int64_t row = ranges[i].first_row; row <= ranges[i].last_row; ++row) {
          for (int64_t column = ranges[i].first_column; column <= ranges[i].last_column; ++column) {
            const int64_t tile = row * columns_ + column;
            if (!full_[tile]) visit(place[tile], i);
          }
        }
      }
    };
    parallel_tasks(blocks,
                   [&](int64_t block) { for_each_pair(block, [](int64_t& place, int64_t) { ++place; }); });
    Buffer<int64_t> offsets = buffer<int64_t>(tiles() + 1);
    int64_t total = 0;
    for (int64_t tile = 0; tile < tiles(); ++tile) {
      offsets[tile] = total;
      for (int64_t block = 0; block < blocks; ++block) {
        total += std::exchange(places[block * tiles() + tile], total);
      }
    }
    offsets[tiles()] = total;
    Buffer<int32_t> entries = buffer<int32_t>(total);
    parallel_tasks(blocks, [&](int64_t block) {
      for_each_pair(block, [&](int64_t& place, int64_t i) { entries[place++] = static_cast<int32_t>(i); });
    });
    parallel_tasks(tiles(), [&](int64_t tile) {
      const int64_t begin = offsets[tile], end = offsets[tile + 1];
      if (begin == end) return;
      const int64_t row = tile / columns_ * kTile, column = tile % columns_ * kTile;
      const RasterizeTileArgs<T> args{splats,
                                      entries.get() + begin,
                                      end - begin,
                                      row,
                                      std::min(row + kTile, cloud_.height),
                                      column,
                                      std::min(column + kTile, cloud_.width),
                                      cloud_.width,
                                      cloud_.points_per_pixel,
                                      used_.get(),
                                      cloud_.indices,
                                      cloud_.depths,
                                      cloud_.distances};
      full_[tile] = AVATAR_ISA_CALL(rasterize_tile, args);
    });
    num_full_ = std::count(full_.begin(), full_.end(), 1);
  }

  // Marks the slots that nobody took.
  void finish() {
    const int64_t k = cloud_.points_per_pixel;
    constexpr T kFar = std::numeric_limits<T>::infinity();
    torch::stable::parallel_for(0, cloud_.height * cloud_.width, 1 << 12, [&](int64_t begin, int64_t end) {
      for (int64_t pixel = begin; pixel < end; ++pixel) {
        const int64_t first = pixel * k + used_[pixel], last = (pixel + 1) * k;
        std::fill(cloud_.indices + first, cloud_.indices + last, -1);
        std::fill(cloud_.depths + first, cloud_.depths + last, kFar);
        std::fill(cloud_.distances + first, cloud_.distances + last, kFar);
      }
    });
  }

 private:
  const Cloud<T>& cloud_;
  int64_t rows_, columns_, num_full_ = 0;
  std::vector<uint8_t> full_;
  Buffer<int64_t> used_;
};

template <typename Index, typename T>
void rasterize_cloud(const Cloud<T>& cloud) {
  const DepthOrder<Index> order = depth_order<Index>(cloud);
  TileGrid<T> grid(cloud);
  const int64_t capacity = std::min(order.count, kSegmentPoints);
  const Buffer<Splat<T>> splats = buffer<Splat<T>>(capacity);
  const Buffer<TileRange> ranges = buffer<TileRange>(capacity);
  for (int64_t segment = 0; segment < order.count && !grid.all_full(); segment += capacity) {
    const int64_t count = std::min(capacity, order.count - segment);
    torch::stable::parallel_for(0, count, 1 << 13, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = order.order[segment + i];
        const T* point = cloud.points + 3 * n;
        const T radius = cloud.radius[n * cloud.radius_stride];
        splats[i] = {point[0], point[1], point[2], radius * radius, n};
        ranges[i] = order.ranges[n];
      }
    });
    for (int64_t begin = 0, end = 0; begin < count && !grid.all_full(); begin = end) {
      for (int64_t pairs = 0; end < count && pairs < kPairsMax; ++end) pairs += ranges[end].area();
      grid.add(splats.get() + begin, ranges.get() + begin, end - begin);
    }
  }
  grid.finish();
}

void check_lengths(const Tensor& lengths, int64_t num_points) {
  const int64_t* length = const_data<int64_t>(lengths);
  for (int64_t b = 0; b < lengths.size(0); ++b) {
    if (length[b] < 0 || length[b] > num_points) {
      throw std::invalid_argument("rasterize_points: lengths[" + std::to_string(b) +
                                  "] = " + std::to_string(length[b]) + "; expected 0 to " +
                                  std::to_string(num_points) + ", the number of points");
    }
  }
}

// points (B, N, 3), radius () or (B, N), lengths (B,) -> depths, distances, indices, each
// (B, height, width, points_per_pixel).
std::tuple<Tensor, Tensor, Tensor> rasterize_points_cpu(const Tensor& points_in, const Tensor& radius_in,
                                                        int64_t height, int64_t width,
                                                        int64_t points_per_pixel,
                                                        const std::optional<Tensor>& lengths_in) {
  const Tensor points = to_compute(points_in);
  const Tensor radius = as_contiguous(to_type(radius_in, points.scalar_type()));
  const int64_t batch = points.size(0), num_points = points.size(1);
  std::optional<Tensor> lengths;
  if (lengths_in.has_value()) {
    lengths = as_contiguous(*lengths_in);
    check_lengths(*lengths, num_points);
  }
  const std::vector<int64_t> shape{batch, height, width, points_per_pixel};
  Tensor indices = torch::stable::new_empty(points, shape, ScalarType::Long);
  Tensor depths = torch::stable::new_empty(points, shape);
  Tensor distances = torch::stable::new_empty(points, shape);
  const int64_t slots = height * width * points_per_pixel;
  dispatch_compute(points.scalar_type(), "rasterize_points", [&](auto zero) {
    using T = decltype(zero);
    for (int64_t b = 0; b < batch && slots > 0; ++b) {
      const bool uniform = radius.dim() == 0;
      const Cloud<T> cloud{const_data<T>(points) + b * num_points * 3,
                           const_data<T>(radius) + (uniform ? 0 : b * num_points),
                           uniform ? 0 : 1,
                           lengths ? const_data<int64_t>(*lengths)[b] : num_points,
                           height,
                           width,
                           points_per_pixel,
                           mutable_data<int64_t>(indices) + b * slots,
                           mutable_data<T>(depths) + b * slots,
                           mutable_data<T>(distances) + b * slots};
      if (num_points <= int64_t(std::numeric_limits<uint32_t>::max())) {
        rasterize_cloud<uint32_t>(cloud);
      } else {
        rasterize_cloud<int64_t>(cloud);
      }
    }
  });
  return {to_type(depths, points_in.scalar_type()), to_type(distances, points_in.scalar_type()), indices};
}

// Each point sums over the slots that hold it in their order, whatever the threads.
Tensor rasterize_points_backward_cpu(const Tensor& grad_depths_in, const Tensor& grad_distances_in,
                                     const Tensor& indices_in, const Tensor& points_in) {
  const Tensor points = to_compute(points_in);
  const Tensor indices = as_contiguous(indices_in);
  const Tensor grad_depths = to_compute(grad_depths_in), grad_distances = to_compute(grad_distances_in);
  const int64_t batch = points.size(0), num_points = points.size(1);
  const int64_t height = indices.size(1), width = indices.size(2), k = indices.size(3);
  const int64_t bad =
      first_bad_neighbor(const_data<int64_t>(indices), batch * height * width * k, num_points);
  if (bad >= 0) {
    throw std::out_of_range("rasterize_points_backward: an index is outside [-1, " +
                            std::to_string(num_points) + ")");
  }
  const ReverseAdjacency slots_of =
      reverse_adjacency(const_data<int64_t>(indices), batch, height * width, k, num_points);
  Tensor grad_points = torch::stable::new_empty(points, {batch, num_points, 3});
  dispatch_compute(points.scalar_type(), "rasterize_points_backward", [&](auto zero) {
    using T = decltype(zero);
    for (int64_t b = 0; b < batch; ++b) {
      torch::stable::parallel_for(0, num_points, 1 << 11, [&](int64_t begin, int64_t end) {
        const RasterizeBackwardArgs<T> args{const_data<T>(grad_depths),
                                            const_data<T>(grad_distances),
                                            const_data<T>(points) + b * num_points * 3,
                                            slots_of.offsets.data() + b * num_points,
                                            slots_of.edges.data(),
                                            mutable_data<T>(grad_points) + b * num_points * 3,
                                            b * height,
                                            width,
                                            k};
        AVATAR_ISA_CALL(rasterize_backward_points, args, begin, end);
      });
    }
  });
  return to_type(grad_points, points_in.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avatar_ops, CPU, m) {
  m.impl("rasterize_points", TORCH_BOX(&rasterize_points_cpu));
  m.impl("rasterize_points_backward", TORCH_BOX(&rasterize_points_backward_cpu));
}

}  // namespace avatar
