// The activation of bias_act and of modulated_conv2d's epilogue, in CUDA.
#pragma once

#include <limits>

#include "common/cuda.cuh"

namespace avatar {

template <typename A>
struct Activation {
  A slope, gain, clamp;

  __device__ A forward(A value) const {
    value = (value > A(0) ? value : value * slope) * gain;
    if (value > clamp) return clamp;
    return value < -clamp ? -clamp : value;
  }

  // The derivative by what is activated, from a value of the same sign and, where clamped, the same size.
  __device__ A derivative(A value) const {
    const A scale = value > A(0) ? gain : slope * gain;
    const A output = value * scale;
    const bool open = clamp == std::numeric_limits<A>::infinity() || (output > -clamp && output < clamp);
    return open ? scale : A(0);
  }
};

template <typename A>
Activation<A> activation_of(double slope, double gain, std::optional<double> clamp) {
  return {static_cast<A>(slope), static_cast<A>(gain),
          clamp ? static_cast<A>(*clamp) : std::numeric_limits<A>::infinity()};
}

}  // namespace avatar
