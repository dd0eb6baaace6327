// A FIR filter along rows, built once per instruction set.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace avatar {

// Rows are worked on in blocks of this many samples; buffers are padded to a multiple of it.
constexpr int64_t kFirBlock = 32;

inline int64_t fir_padded(int64_t count) {
  return (count + kFirBlock - 1) / kFirBlock * kFirBlock;
}

template <typename T>
struct FirTap {
  const T* source;
  T coefficient;
};

// fir_row: target[m] = sum of coefficient * source[m] over the taps in order, for m < fir_padded(count).
#define AVATAR_DECLARE(ISA)                                                                  \
  namespace ISA {                                                                            \
  void fir_row(const FirTap<float>* taps, int64_t num_taps, float* target, int64_t count);   \
  void fir_row(const FirTap<double>* taps, int64_t num_taps, double* target, int64_t count); \
  }
AVATAR_FOR_EACH_ISA(AVATAR_DECLARE)
#undef AVATAR_DECLARE

}  // namespace avatar
