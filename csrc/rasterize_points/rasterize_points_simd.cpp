#include "rasterize_points/rasterize_points_simd.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace avatar {
namespace AVATAR_ISA {
namespace {

// Bit i says whether values[i] + addend < limit, for i < kTile.
#if defined(__AVX512F__)
uint32_t bits_below(const float* values, float addend, float limit) {
  const __m512 sums = _mm512_add_ps(_mm512_loadu_ps(values), _mm512_set1_ps(addend));
  return _mm512_cmp_ps_mask(sums, _mm512_set1_ps(limit), _CMP_LT_OQ);
}

uint32_t bits_below(const double* values, double addend, double limit) {
  uint32_t bits = 0;
  for (int64_t i = 0; i < kTile; i += 8) {
    const __m512d sums = _mm512_add_pd(_mm512_loadu_pd(values + i), _mm512_set1_pd(addend));
    bits |= static_cast<uint32_t>(_mm512_cmp_pd_mask(sums, _mm512_set1_pd(limit), _CMP_LT_OQ)) << i;
  }
  return bits;
}
#elif defined(__AVX2__)
uint32_t bits_below(const float* values, float addend, float limit) {
  uint32_t bits = 0;
  for (int64_t i = 0; i < kTile; i += 8) {
    const __m256 sums = _mm256_add_ps(_mm256_loadu_ps(values + i), _mm256_set1_ps(addend));
    const __m256 below = _mm256_cmp_ps(sums, _mm256_set1_ps(limit), _CMP_LT_OQ);
    bits |= static_cast<uint32_t>(_mm256_movemask_ps(below)) << i;
  }
  return bits;
}

uint32_t bits_below(const double* values, double addend, double limit) {
  uint32_t bits = 0;
  for (int64_t i = 0; i < kTile; i += 4) {
    const __m256d sums = _mm256_add_pd(_mm256_loadu_pd(values + i), _mm256_set1_pd(addend));
    const __m256d below = _mm256_cmp_pd(sums, _mm256_set1_pd(limit), _CMP_LT_OQ);
    bits |= static_cast<uint32_t>(_mm256_movemask_pd(below)) << i;
  }
  return bits;
}
#else
template <typename T>
uint32_t bits_below(const T* values, T addend, T limit) {
  uint32_t bits = 0;
  for (int64_t i = 0; i < kTile; ++i) bits |= static_cast<uint32_t>(values[i] + addend < limit) << i;
  return bits;
}
#endif

template <typename T>
bool tile(const RasterizeTileArgs<T>& args) {
  constexpr int64_t kAhead = 16;
  const int64_t k = args.points_per_pixel;
  // Bit c of open[r] says whether that pixel has a slot left, bit r of open_rows whether any of the row has.
  uint32_t open[kTile] = {}, open_rows = 0;
  for (int64_t row = args.first_row; row < args.end_row; ++row) {
    for (int64_t column = args.first_column; column < args.end_column; ++column) {
      if (args.used[row * args.width + column] == k) continue;
      open[row - args.first_row] |= uint32_t(1) << (column - args.first_column);
      open_rows |= uint32_t(1) << (row - args.first_row);
    }
  }
  T center_x[kTile], center_y[kTile];
  for (int64_t i = 0; i < kTile; ++i) {
    center_x[i] = static_cast<T>(args.first_column + i) + T(0.5);
    center_y[i] = static_cast<T>(args.first_row + i) + T(0.5);
  }
  for (int64_t e = 0; e < args.count && open_rows != 0; ++e) {
    // A tile's points are far apart in depth order, and their memory too.
    if (e + kAhead < args.count) __builtin_prefetch(&args.splats[args.entries[e + kAhead]]);
    const Splat<T>& splat = args.splats[args.entries[e]];
    T squared_x[kTile], squared_y[kTile];
    for (int64_t i = 0; i < kTile; ++i) squared_y[i] = (splat.y - center_y[i]) * (splat.y - center_y[i]);
    uint32_t rows = bits_below(squared_y, T(0), splat.limit) & open_rows;
    if (rows == 0) continue;
    for (int64_t i = 0; i < kTile; ++i) squared_x[i] = (splat.x - center_x[i]) * (splat.x - center_x[i]);
    for (; rows != 0; rows &= rows - 1) {
      const int row = __builtin_ctz(rows);
      uint32_t hits = bits_below(squared_x, squared_y[row], splat.limit) & open[row];
      for (; hits != 0; hits &= hits - 1) {
        const int column = __builtin_ctz(hits);
        const int64_t pixel = (args.first_row + row) * args.width + args.first_column + column;
        const int64_t slot = args.used[pixel]++;
        args.indices[pixel * k + slot] = splat.index;
        args.depths[pixel * k + slot] = splat.depth;
        args.distances[pixel * k + slot] = squared_x[column] + squared_y[row];
        if (slot + 1 < k) continue;
        open[row] &= ~(uint32_t(1) << column);
        if (open[row] == 0) open_rows &= ~(uint32_t(1) << row);
      }
    }
  }
  return open_rows == 0;
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
