// A product of tall rows with a small packed matrix, built once per instruction set.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace avatar {

// target (rows, columns) = a (rows, depth) times packed b, plus bias (columns) where given.
#define AVATAR_DECLARE(ISA)                                                                              \
  namespace ISA {                                                                                        \
  void project_rows(int64_t rows, int64_t depth, int64_t columns, const float* a, const float* packed,   \
                    const float* bias, float* target);                                                   \
  void project_rows(int64_t rows, int64_t depth, int64_t columns, const double* a, const double* packed, \
                    const double* bias, double* target);                                                 \
  }
AVATAR_FOR_EACH_ISA(AVATAR_DECLARE)
#undef AVATAR_DECLARE

}  // namespace avatar
