// Inner loops of upfirdn2d, built once per instruction set.
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
// deinterleave: target[m] = row[step * m + first] where that lies in [0, size), else 0, for m < count.
// interleave: row[phases * m + r] = source[r * stride + m] for every position < size.
#define AVATAR_DECLARE_TYPE(T)                                                                          \
  void fir_row(const FirTap<T>* taps, int64_t num_taps, T* target, int64_t count);                      \
  void deinterleave(const T* row, int64_t size, int64_t first, int64_t step, T* target, int64_t count); \
  void interleave(const T* source, int64_t stride, int64_t phases, T* row, int64_t size);
#define AVATAR_DECLARE(ISA)   \
  namespace ISA {             \
  AVATAR_DECLARE_TYPE(float)  \
  AVATAR_DECLARE_TYPE(double) \
  }
AVATAR_FOR_EACH_ISA(AVATAR_DECLARE)
#undef AVATAR_DECLARE
#undef AVATAR_DECLARE_TYPE

}  // namespace avatar
