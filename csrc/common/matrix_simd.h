// Small matrix products inside parallel tasks, built once per instruction set. Every element is summed in
// order of the inner index, so results depend neither on the tiling nor on the number of threads.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace avatar {

// Rows of b and c hold a multiple of this many elements: the caller pads.
constexpr int64_t kColumnPad = 16;

inline int64_t pad_columns(int64_t columns) {
  return (columns + kColumnPad - 1) / kColumnPad * kColumnPad;
}

// c[r, :] (+)= sum_i a[r * a_row + i * a_inner] * b[i, :]
template <typename T>
struct MatrixProduct {
  const T* a;
  int64_t a_row, a_inner;
  const T* b;  // (inner, columns) with rows b_stride apart
  int64_t b_stride;
  T* c;  // (rows, columns) with rows c_stride apart
  int64_t c_stride;
  int64_t rows, inner, columns;
  bool accumulate;
};

#define AVATAR_DECLARE(ISA)                               \
  namespace ISA {                                         \
  void matrix_product(const MatrixProduct<float>& args);  \
  void matrix_product(const MatrixProduct<double>& args); \
  }
AVATAR_FOR_EACH_ISA(AVATAR_DECLARE)
#undef AVATAR_DECLARE

}  // namespace avatar
