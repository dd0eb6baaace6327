#include "upfirdn2d/upfirdn2d_simd.h"

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

}  // namespace

void fir_row(const FirTap<float>* taps, int64_t num_taps, float* target, int64_t count) {
  fir(taps, num_taps, target, count);
}
void fir_row(const FirTap<double>* taps, int64_t num_taps, double* target, int64_t count) {
  fir(taps, num_taps, target, count);
}

}  // namespace AVATAR_ISA
}  // namespace avatar
