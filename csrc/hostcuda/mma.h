// The part of CUDA's warp matrix functions (wmma) that kernels use: products of 16 x 8 and 8 x 16 matrices of
// TensorFloat-32, added in float32.
#pragma once

#include <cmath>
#include <limits>

#include "block.h"
#include "device_functions.h"

namespace hostcuda {

// Each lane holds some elements of a matrix; which ones, CUDA does not say, and no kernel may depend on it.
template <int rows, int columns>
struct Fragment {
  static constexpr int num_elements = rows * columns / kWarpSize;
  float x[num_elements];

  Fragment() {
    for (float& value : x) value = std::numeric_limits<float>::quiet_NaN();
  }
  static int row(int lane, int element) { return (element * kWarpSize + lane) / columns; }
  static int column(int lane, int element) { return (element * kWarpSize + lane) % columns; }
};

inline int lane_in_warp() {
  return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % kWarpSize;
}

inline uint64_t check_same_memory(const WarpCall& call, int lane) {
  for (int other = 0; other < kWarpSize; ++other) {
    if (call.values[other] != call.values[lane] || call.arguments[other] != call.arguments[lane])
      fail("moves a matrix whose address or pitch differ from another lane's");
  }
  return 0;
}

// Calls body(element of the lane, its place in memory).
template <typename Fragment, typename Body>
void for_each_element(const float* memory, unsigned pitch, bool by_rows, Site site, const Body& body) {
  if (reinterpret_cast<uintptr_t>(memory) % 32 || pitch % 4)
    fail("moves a matrix that is not aligned to 32 bytes, with rows to 16");
  warp_call(0xffffffffu, reinterpret_cast<uintptr_t>(memory), static_cast<int>(pitch), kWarpSize,
            {check_same_memory, true}, site);
  const int lane = lane_in_warp();
  for (int i = 0; i < Fragment::num_elements; ++i) {
    const unsigned row = Fragment::row(lane, i), column = Fragment::column(lane, i);
    body(i, by_rows ? row * pitch + column : column * pitch + row);
  }
}

// Rounded towards zero, as matrix units do after each step (Fasi et al., Numerical behavior of NVIDIA tensor
// cores, PeerJ Computer Science 2021), which take several products in one; here each product is a step.
inline float add_product(float sum, float a, float b) {
  const double exact = static_cast<double>(sum) + static_cast<double>(a) * static_cast<double>(b);
  const float nearest = static_cast<float>(exact);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(exact) ? std::nextafter(nearest, 0.f) : nearest;
}

template <typename A, typename B, typename C>
struct Product {
  C* d;
  const A* a;
  const B* b;
  const C* c;
};

template <typename A, typename B, typename C>
uint64_t multiply(const WarpCall& call, int) {
  const auto of = [&](int lane) {
    return *reinterpret_cast<const Product<A, B, C>*>(static_cast<uintptr_t>(call.values[lane]));
  };
  float a[16][8], b[8][16];
  const auto checked = [](float value) {
    if (__float_as_uint(value) & 0x1fffu) fail("multiplies a number that is no TensorFloat-32");
    return value;
  };
  for (int lane = 0; lane < kWarpSize; ++lane) {
    for (int i = 0; i < A::num_elements; ++i)
      a[A::row(lane, i)][A::column(lane, i)] = checked(of(lane).a->x[i]);
    for (int i = 0; i < B::num_elements; ++i)
      b[B::row(lane, i)][B::column(lane, i)] = checked(of(lane).b->x[i]);
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    for (int i = 0; i < C::num_elements; ++i) {
      float sum = of(lane).c->x[i];
      for (int k = 0; k < 8; ++k) sum = add_product(sum, a[C::row(lane, i)][k], b[k][C::column(lane, i)]);
      of(lane).d->x[i] = sum;
    }
  }
  return 0;
}

}  // namespace hostcuda

namespace nvcuda::wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
namespace precision {
struct tf32;
}
enum layout_t { mem_row_major, mem_col_major };

template <typename Use, int m, int n, int k, typename T, typename Layout = void>
struct fragment;
template <typename Layout>
struct fragment<matrix_a, 16, 16, 8, precision::tf32, Layout> : hostcuda::Fragment<16, 8> {};
template <typename Layout>
struct fragment<matrix_b, 16, 16, 8, precision::tf32, Layout> : hostcuda::Fragment<8, 16> {};
template <>
struct fragment<accumulator, 16, 16, 8, float> : hostcuda::Fragment<16, 16> {};

template <typename Use, typename T, typename Layout>
void fill_fragment(fragment<Use, 16, 16, 8, T, Layout>& matrix, float value) {
  for (float& element : matrix.x) element = value;
}

template <typename Use, typename Layout>
void load_matrix_sync(fragment<Use, 16, 16, 8, precision::tf32, Layout>& matrix, const float* memory,
                      unsigned pitch, AVATAR_SITE) {
  using Fragment = fragment<Use, 16, 16, 8, precision::tf32, Layout>;
  hostcuda::for_each_element<Fragment>(memory, pitch, std::is_same_v<Layout, row_major>, {file, line},
                                       [&](int i, unsigned place) { matrix.x[i] = memory[place]; });
}

inline void store_matrix_sync(float* memory, const fragment<accumulator, 16, 16, 8, float>& matrix,
                              unsigned pitch, layout_t layout, AVATAR_SITE) {
  using Fragment = fragment<accumulator, 16, 16, 8, float>;
  hostcuda::for_each_element<Fragment>(memory, pitch, layout == mem_row_major, {file, line},
                                       [&](int i, unsigned place) { memory[place] = matrix.x[i]; });
}

template <typename LayoutA, typename LayoutB>
void mma_sync(fragment<accumulator, 16, 16, 8, float>& d,
              const fragment<matrix_a, 16, 16, 8, precision::tf32, LayoutA>& a,
              const fragment<matrix_b, 16, 16, 8, precision::tf32, LayoutB>& b,
              const fragment<accumulator, 16, 16, 8, float>& c, AVATAR_SITE) {
  using A = fragment<matrix_a, 16, 16, 8, precision::tf32, LayoutA>;
  using B = fragment<matrix_b, 16, 16, 8, precision::tf32, LayoutB>;
  using C = fragment<accumulator, 16, 16, 8, float>;
  const hostcuda::Product<A, B, C> product{&d, &a, &b, &c};
  hostcuda::warp_call(0xffffffffu, reinterpret_cast<uintptr_t>(&product), 0, hostcuda::kWarpSize,
                      {hostcuda::multiply<A, B, C>, true}, {file, line});
}

}  // namespace nvcuda::wmma
