// Geometry of a point's edges in lanes, and the limits of softmax without its maximum. For *_simd.cpp with
// AVX-512 only.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/tile_product.h"

namespace avatar {
namespace AVATAR_ISA {
namespace {

typedef float Half __attribute__((vector_size(8 * sizeof(float)), aligned(4), may_alias));
typedef float Quad __attribute__((vector_size(4 * sizeof(float)), aligned(4), may_alias));

inline Vector<float> both(Half low, Half high) {
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
// From each four lanes of a and b in turn: lanes k and k + 1 one after the other, and as they are.
template <int k>
inline Vector<float> unpack(Vector<float> a, Vector<float> b) {
  return __builtin_shufflevector(a, b, k, k + 16, k + 1, k + 17, k + 4, k + 20, k + 5, k + 21, k + 8, k + 24,
                                 k + 9, k + 25, k + 12, k + 28, k + 13, k + 29);
}
template <int k>
inline Vector<float> pairs(Vector<float> a, Vector<float> b) {
  return __builtin_shufflevector(a, b, k, k + 1, k + 16, k + 17, k + 4, k + 5, k + 20, k + 21, k + 8, k + 9,
                                 k + 24, k + 25, k + 12, k + 13, k + 28, k + 29);
}

// Coordinates of a vector's lanes of points, which are rows of four numbers.
inline void load_points(const float* points, const int64_t* rows, Vector<float> (&axes)[3]) {
  const auto quad = [=](int lane) { return *reinterpret_cast<const Quad*>(points + 4 * rows[lane]); };
  Vector<float> fours[4];
  for (int r = 0; r < 4; ++r) {
    const Half low = __builtin_shufflevector(quad(r), quad(4 + r), 0, 1, 2, 3, 4, 5, 6, 7);
    const Half high = __builtin_shufflevector(quad(8 + r), quad(12 + r), 0, 1, 2, 3, 4, 5, 6, 7);
    fours[r] = both(low, high);
  }
  const Vector<float> low0 = unpack<0>(fours[0], fours[1]), low1 = unpack<0>(fours[2], fours[3]);
  const Vector<float> high0 = unpack<2>(fours[0], fours[1]), high1 = unpack<2>(fours[2], fours[3]);
  axes[0] = pairs<0>(low0, low1);
  axes[1] = pairs<2>(low0, low1);
  axes[2] = pairs<0>(high0, high1);
}
inline void load_points(const double* points, const int64_t* rows, Vector<double> (&axes)[3]) {
  for (int d = 0; d < 3; ++d) {
    double lanes[kLanes<double>];
    for (int lane = 0; lane < kLanes<double>; ++lane) lanes[lane] = points[4 * rows[lane] + d];
    axes[d] = load(lanes);
  }
}

// p - q and |p - q| of a row p of points and `count` others q, number by number, these `stride` apart. Takes
// and writes whole vectors.
template <typename T>
inline void edge_codes(const T* points, int64_t row, const int64_t* others, int64_t count, int64_t stride,
                       T* codes) {
  const T* center = points + 4 * row;
  for (int64_t e = 0; e < count; e += kLanes<T>) {
    Vector<T> axes[3];
    load_points(points, others + e, axes);
    T distances[kLanes<T>];
    Vector<T> squared{};
    for (int d = 0; d < 3; ++d) {
      const Vector<T> difference = splat(center[d]) - axes[d];
      store(codes + d * stride + e, difference);
      squared = d == 0 ? difference * difference : squared + difference * difference;
    }
    store(distances, squared);
    for (T& distance : distances) distance = std::sqrt(distance);
    store(codes + 3 * stride + e, load(distances));
  }
}

// Whether a softmax whose weights 2^score have this sum, and weigh numbers of this sum, is as good as one
// relative to its largest score: no weight is near where float ends, and all are finite.
inline bool is_moderate(Vector<float> sum, Vector<float> pooled) {
  constexpr float least = 0x1p-30f, most = 0x1p30f;
  // NaN where something is not finite.
  const Vector<float> checked = pooled * 0.f + sum;
  return !(_mm512_cmp_ps_mask((__m512)checked, _mm512_set1_ps(least), _CMP_NGT_UQ) |
           _mm512_cmp_ps_mask(_mm512_set1_ps(most), (__m512)checked, _CMP_NGT_UQ));
}

}  // namespace
}  // namespace AVATAR_ISA
}  // namespace avatar
