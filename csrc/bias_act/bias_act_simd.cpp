#include "bias_act/bias_act_simd.h"

#include <limits>

namespace avatar {
namespace AVATAR_ISA {
namespace {

template <typename T>
inline T activate(T value, const BiasActRow<T>& row) {
  value = (value > 0 ? value : value * row.slope) * row.gain;
  value = value < -row.clamp ? -row.clamp : value;
  return value > row.clamp ? row.clamp : value;
}

template <typename T, bool kNoise, bool kScaled>
void forward_loop(const BiasActRow<T>& row_in) {
  // A copy tells the compiler that stores do not change it; rows are either disjoint or the same.
  const BiasActRow<T> row = row_in;
  const T* input = row.input;
  const T* noise = row.noise;
  T* output = row.output;
  T* scaled = row.scaled;
#pragma GCC ivdep
  for (int64_t i = 0; i < row.size; ++i) {
    const T product = input[i] * row.scale;
    if (kScaled) scaled[i] = product;
    output[i] = activate((kNoise ? product + noise[i] : product) + row.bias, row);
  }
}

template <typename T>
void forward(const BiasActRow<T>& row) {
  if (row.noise) {
    row.scaled ? forward_loop<T, true, true>(row) : forward_loop<T, true, false>(row);
  } else {
    row.scaled ? forward_loop<T, false, true>(row) : forward_loop<T, false, false>(row);
  }
}

template <typename T, bool kSaved, bool kClamped>
T backward_loop(const BiasActBackwardRow<T>& row_in) {
  const BiasActBackwardRow<T> row = row_in;
  const T* __restrict__ grad = row.grad;
  const T* __restrict__ saved = row.saved;
  T* __restrict__ grad_value = row.grad_value;
  const auto slope_at = [&](int64_t i) -> T {
    if (!kSaved) return row.gain;
    const T value = saved[i] + row.bias;
    const T slope = value > 0 ? row.gain : row.gain * row.slope;
    if (!kClamped) return slope;
    const T result = (value > 0 ? value : value * row.slope) * row.gain;
    return (result > -row.clamp) & (result < row.clamp) ? slope : T(0);
  };
  // Several running sums, in an order that is the same for every instruction set.
  constexpr int64_t kLanes = 32;
  T sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= row.size; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const T value = grad[i + lane] * slope_at(i + lane);
      grad_value[i + lane] = value;
      sums[lane] += value;
    }
  }
  for (int64_t lane = 0; i < row.size; ++i, ++lane) {
    const T value = grad[i] * slope_at(i);
    grad_value[i] = value;
    sums[lane] += value;
  }
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
  }
  return sums[0];
}

template <typename T>
T backward(const BiasActBackwardRow<T>& row) {
  if (!row.saved) return backward_loop<T, false, false>(row);
  return row.clamp == std::numeric_limits<T>::infinity() ? backward_loop<T, true, false>(row)
                                                         : backward_loop<T, true, true>(row);
}

}  // namespace

void bias_act_row(const BiasActRow<float>& row) {
  forward(row);
}
void bias_act_row(const BiasActRow<double>& row) {
  forward(row);
}
float bias_act_backward_row(const BiasActBackwardRow<float>& row) {
  return backward(row);
}
double bias_act_backward_row(const BiasActBackwardRow<double>& row) {
  return backward(row);
}

}  // namespace AVATAR_ISA
}  // namespace avatar
