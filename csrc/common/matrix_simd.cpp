#include "common/matrix_simd.h"

#include "common/vector.h"

namespace avatar {
namespace AVATAR_ISA {
namespace {

// Accumulators of one tile fill the registers: 6 x 4 of 32, or 6 x 2 of 16.
constexpr int kTileRows = 6;
constexpr int kTileVectors = kVectorBytes == 64 ? 4 : 2;

template <int kRows, int kVectors, typename T>
void tile(const MatrixProduct<T>& args, int64_t row, int64_t column) {
  constexpr int64_t kLanes = Lanes<T>::kCount;
  const T* a = args.a + row * args.a_row;
  const T* b = args.b + column;
  T* c = args.c + row * args.c_stride + column;
  // Unrolled early, so that the sums are registers throughout.
  Vector<T> sums[kRows][kVectors];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = args.accumulate ? load(c + r * args.c_stride + v * kLanes) : Vector<T>{};
    }
  }
  for (int64_t i = 0; i < args.inner; ++i) {
    Vector<T> right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + i * args.b_stride + v * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const T left = a[r * args.a_row + i * args.a_inner];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] += left * right[v];
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(c + r * args.c_stride + v * kLanes, sums[r][v]);
  }
}

template <int kVectors, typename T>
void panel(const MatrixProduct<T>& args, int64_t column) {
  int64_t row = 0;
  for (; row + kTileRows <= args.rows; row += kTileRows) tile<kTileRows, kVectors>(args, row, column);
  for (; row + 2 <= args.rows; row += 2) tile<2, kVectors>(args, row, column);
  for (; row < args.rows; ++row) tile<1, kVectors>(args, row, column);
}

template <typename T>
void product(const MatrixProduct<T>& args) {
  constexpr int64_t kLanes = Lanes<T>::kCount;
  int64_t column = 0;
  for (; column + kTileVectors * kLanes <= args.columns; column += kTileVectors * kLanes) {
    panel<kTileVectors>(args, column);
  }
  for (; column < args.columns; column += kLanes) panel<1>(args, column);
}

}  // namespace

void matrix_product(const MatrixProduct<float>& args) {
  product(args);
}
void matrix_product(const MatrixProduct<double>& args) {
  product(args);
}

}  // namespace AVATAR_ISA
}  // namespace avatar
