// Inner loops of edge_max, built once per instruction set.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace avatar {

template <typename T>
struct EdgeMaxArgs {
  const T* features;         // (num_points, channels)
  const int64_t* neighbors;  // (rows, k), or more rows where some are chosen; -1 for none
  const int64_t* chosen;     // (rows), the row of `neighbors` for each, which is its own with null
  T* values;                 // (rows, channels)
  int64_t* argmax;           // (rows, channels), or null
  int64_t num_points, channels, k;

  const int64_t* neighbors_of(int64_t row) const { return neighbors + (chosen ? chosen[row] : row) * k; }
};

template <typename T>
struct EdgeMaxBackwardArgs {
  const T* grad;          // (rows, channels)
  const int64_t* argmax;  // (rows, channels), -1 for none
  T* grad_features;       // (num_points, channels), zeroed
  int64_t rows, channels;
};

// edge_max_rows: rows [begin, end), with `slots` to hold k + 1 numbers; returns the flat position of the
// first neighbour out of range, or -1. edge_max_backward_columns: channels [begin, end) of all rows.
#define AVATAR_DECLARE(ISA)                                                                            \
  namespace ISA {                                                                                      \
  int64_t edge_max_rows(const EdgeMaxArgs<float>& args, int64_t begin, int64_t end, int32_t* slots);   \
  int64_t edge_max_rows(const EdgeMaxArgs<double>& args, int64_t begin, int64_t end, int32_t* slots);  \
  void edge_max_backward_columns(const EdgeMaxBackwardArgs<float>& args, int64_t begin, int64_t end);  \
  void edge_max_backward_columns(const EdgeMaxBackwardArgs<double>& args, int64_t begin, int64_t end); \
  }
AVATAR_FOR_EACH_ISA(AVATAR_DECLARE)
#undef AVATAR_DECLARE

}  // namespace avatar
