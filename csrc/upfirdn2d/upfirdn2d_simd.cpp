#include "upfirdn2d/upfirdn2d_simd.h"

#include <algorithm>
#include <cstring>

namespace avatar {
namespace AVATAR_ISA {
namespace {

template <typename T>
void fir(const FirTap<T>* taps, int64_t num_taps, T* target, int64_t count) {
  typedef T Vector __attribute__((vector_size(32)));
  constexpr int64_t kLanes = sizeof(Vector) / sizeof(T);
  // Four vectors of sums stay in registers over all taps; they have names since an array would not.
  constexpr int64_t kStep = 4 * kLanes;
  static_assert(kFirBlock % kStep == 0, "blocks hold whole steps");
  const auto add = [](Vector& sum, T coefficient, const T* source) {
    Vector part;
    std::memcpy(&part, source, sizeof part);
    sum += coefficient * part;
  };
  for (int64_t m = 0; m < fir_padded(count); m += kStep) {
    Vector sum0 = {}, sum1 = {}, sum2 = {}, sum3 = {};
    for (int64_t t = 0; t < num_taps; ++t) {
      const T* source = taps[t].source + m;
      const T coefficient = taps[t].coefficient;
      add(sum0, coefficient, source);
      add(sum1, coefficient, source + kLanes);
      add(sum2, coefficient, source + 2 * kLanes);
      add(sum3, coefficient, source + 3 * kLanes);
    }
    std::memcpy(target + m, &sum0, sizeof sum0);
    std::memcpy(target + m + kLanes, &sum1, sizeof sum1);
    std::memcpy(target + m + 2 * kLanes, &sum2, sizeof sum2);
    std::memcpy(target + m + 3 * kLanes, &sum3, sizeof sum3);
  }
}

template <typename T>
void split(const T* row, int64_t size, int64_t first, int64_t step, T* target, int64_t count) {
  // Positions [begin, end) of the target lie inside the row.
  const int64_t begin = std::clamp<int64_t>(first >= 0 ? 0 : (step - 1 - first) / step, 0, count);
  const int64_t end = std::clamp<int64_t>(first >= size ? 0 : (size - first + step - 1) / step, begin, count);
  std::fill_n(target, begin, T(0));
  std::fill_n(target + end, count - end, T(0));
  if (step == 1) {
    if (begin < end) std::copy_n(row + (first + begin), end - begin, target + begin);
  } else if (step == 2) {
    for (int64_t m = begin; m < end; ++m) target[m] = row[2 * m + first];
  } else {
    for (int64_t m = begin; m < end; ++m) target[m] = row[step * m + first];
  }
}

template <typename T>
void merge(const T* source, int64_t stride, int64_t phases, T* row, int64_t size) {
  if (phases == 1) {
    std::copy_n(source, size, row);
    return;
  }
  if (phases == 2) {
    const T* odd = source + stride;
    for (int64_t m = 0; m < size / 2; ++m) {
      row[2 * m] = source[m];
      row[2 * m + 1] = odd[m];
    }
    if (size % 2) row[size - 1] = source[size / 2];
    return;
  }
  for (int64_t r = 0; r < phases; ++r) {
    for (int64_t m = 0, position = r; position < size; ++m, position += phases) {
      row[position] = source[r * stride + m];
    }
  }
}

}  // namespace

#define AVATAR_DEFINE(T)                                                                                 \
  void fir_row(const FirTap<T>* taps, int64_t num_taps, T* target, int64_t count) {                      \
    fir(taps, num_taps, target, count);                                                                  \
  }                                                                                                      \
  void deinterleave(const T* row, int64_t size, int64_t first, int64_t step, T* target, int64_t count) { \
    split(row, size, first, step, target, count);                                                        \
  }                                                                                                      \
  void interleave(const T* source, int64_t stride, int64_t phases, T* row, int64_t size) {               \
    merge(source, stride, phases, row, size);                                                            \
  }
AVATAR_DEFINE(float)
AVATAR_DEFINE(double)
#undef AVATAR_DEFINE

}  // namespace AVATAR_ISA
}  // namespace avatar
