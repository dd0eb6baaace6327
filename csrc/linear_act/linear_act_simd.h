// Inner loop of linear_act, built once per instruction set.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace avatar {

template <typename T>
struct LinearActArgs {
  const T* x;              // (rows, own_depth)
  const T* beside;         // (rows, depth - own_depth): the columns after those of x; or null
  const T* weight;         // packed panels (depth, columns padded to whole vectors)
  const T* bias;           // padded
  const T* rest;           // (., columns), added to; or null
  const int64_t* places;   // (rows,): the row of `rest` for each, which is its own with null
  T* y;                    // (rows, columns)
  const int64_t* targets;  // (rows,): the row of y for each, which is its own with null
  int64_t depth, own_depth, columns, columns_padded;
  T negative_slope;
};

// linear_act_rows: rows [begin, end).
#define AVATAR_DECLARE(ISA)                                                            \
  namespace ISA {                                                                      \
  void linear_act_rows(const LinearActArgs<float>& args, int64_t begin, int64_t end);  \
  void linear_act_rows(const LinearActArgs<double>& args, int64_t begin, int64_t end); \
  }
AVATAR_FOR_EACH_ISA(AVATAR_DECLARE)
#undef AVATAR_DECLARE

}  // namespace avatar
