#include "rasterize_points/rasterize_points_simd.h"

namespace avatar {
namespace AVATAR_ISA {
namespace {

// Integers as wide as T, so that comparisons of T and bit masks fill the same vector lanes.
template <typename T>
struct BitsOf;
template <>
struct BitsOf<float> {
  using type = uint32_t;
};
template <>
struct BitsOf<double> {
  using type = uint64_t;
};

// Bit i says whether values[i] + addend < limit.
template <typename T>
uint32_t bits_below(const T* values, T addend, T limit) {
  using Bits = typename BitsOf<T>::type;
  Bits bits = 0;
  for (int64_t i = 0; i < kTile; ++i) bits |= values[i] + addend < limit ? Bits(1) << i : Bits(0);
  return static_cast<uint32_t>(bits);
}

template <typename T>
bool tile(const RasterizeTileArgs<T>& args) {
  const int64_t k = args.points_per_pixel;
  // Bit c of open[r] says whether that pixel has a slot left.
  uint32_t open[kTile] = {};
  int64_t left = 0;
  for (int64_t row = args.first_row; row < args.end_row; ++row) {
    for (int64_t column = args.first_column; column < args.end_column; ++column) {
      if (args.used[row * args.width + column] == k) continue;
      open[row - args.first_row] |= uint32_t(1) << (column - args.first_column);
      ++left;
    }
  }
  T center_x[kTile], center_y[kTile];
  for (int64_t i = 0; i < kTile; ++i) {
    center_x[i] = static_cast<T>(args.first_column + i) + T(0.5);
    center_y[i] = static_cast<T>(args.first_row + i) + T(0.5);
  }
  for (int64_t e = 0; e < args.count && left > 0; ++e) {
    const Splat<T>& splat = args.splats[args.entries[e]];
    T squared_x[kTile], squared_y[kTile];
    for (int64_t i = 0; i < kTile; ++i) {
      const T x = splat.x - center_x[i], y = splat.y - center_y[i];
      squared_x[i] = x * x;
      squared_y[i] = y * y;
    }
    if (bits_below(squared_x, T(0), splat.limit) == 0) continue;
    for (uint32_t rows = bits_below(squared_y, T(0), splat.limit); rows != 0; rows &= rows - 1) {
      const int row = __builtin_ctz(rows);
      uint32_t hits = bits_below(squared_x, squared_y[row], splat.limit) & open[row];
      for (; hits != 0; hits &= hits - 1) {
        const int column = __builtin_ctz(hits);
        const int64_t pixel = (args.first_row + row) * args.width + args.first_column + column;
        const int64_t slot = args.used[pixel]++;
        args.indices[pixel * k + slot] = splat.index;
        args.depths[pixel * k + slot] = splat.depth;
        args.distances[pixel * k + slot] = squared_x[column] + squared_y[row];
        if (slot + 1 == k) {
          open[row] &= ~(uint32_t(1) << column);
          --left;
        }
      }
    }
  }
  return left == 0;
}

template <typename T>
void backward_points(const RasterizeBackwardArgs<T>& args, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const T x = args.points[3 * n], y = args.points[3 * n + 1];
    T grad_x = 0, grad_y = 0, grad_z = 0;
    for (int64_t s = args.offsets[n]; s < args.offsets[n + 1]; ++s) {
      const int64_t slot = args.slots[s], pixel = slot / args.points_per_pixel, row = pixel / args.width;
      const T twice = T(2) * args.grad_distances[slot];
      grad_x += twice * (x - (static_cast<T>(pixel - row * args.width) + T(0.5)));
      grad_y += twice * (y - (static_cast<T>(row - args.first_row) + T(0.5)));
      grad_z += args.grad_depths[slot];
    }
    args.grad_points[3 * n] = grad_x;
    args.grad_points[3 * n + 1] = grad_y;
    args.grad_points[3 * n + 2] = grad_z;
  }
}

}  // namespace

bool rasterize_tile(const RasterizeTileArgs<float>& args) {
  return tile(args);
}
bool rasterize_tile(const RasterizeTileArgs<double>& args) {
  return tile(args);
}
void rasterize_backward_points(const RasterizeBackwardArgs<float>& args, int64_t begin, int64_t end) {
  backward_points(args, begin, end);
}
void rasterize_backward_points(const RasterizeBackwardArgs<double>& args, int64_t begin, int64_t end) {
  backward_points(args, begin, end);
}

}  // namespace AVATAR_ISA
}  // namespace avatar
