// Inner loops of bias_act, built once per instruction set.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace avatar {

// One image of one channel: value = input * scale + noise + bias, output = clamp(leaky_relu(value) * gain).
// Either of output and scaled may be input.
template <typename T>
struct BiasActRow {
  const T* input;
  const T* noise;  // null for none
  T* output;
  T* scaled;  // receives input * scale where not null
  T scale, bias, slope, gain, clamp;
  int64_t size;
};

// Gradient with respect to the value: gradient * gain * (value > 0 ? 1 : slope), 0 where it was clamped;
// value = saved + bias, and a null `saved` stands for positive values.
template <typename T>
struct BiasActBackwardRow {
  const T* grad;
  const T* saved;
  T* grad_value;
  T bias, slope, gain, clamp;
  int64_t size;
};

// bias_act_backward_row returns the sum of grad_value. No clamp is a clamp of infinity, which lets NaN
// through.
#define AVATAR_DECLARE(ISA)                                            \
  namespace ISA {                                                      \
  void bias_act_row(const BiasActRow<float>& row);                     \
  void bias_act_row(const BiasActRow<double>& row);                    \
  float bias_act_backward_row(const BiasActBackwardRow<float>& row);   \
  double bias_act_backward_row(const BiasActBackwardRow<double>& row); \
  }
AVATAR_FOR_EACH_ISA(AVATAR_DECLARE)
#undef AVATAR_DECLARE

}  // namespace avatar
