// Convolutions of 1x1 with few outputs, built once per instruction set.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/pixel_type.h"

namespace avatar {

// Of one sample.
template <typename T>
struct PointwiseConv2d {
  const void* x;     // (channels, pixels)
  const T* weights;  // (channels, kPointwiseOutputs)
  T* y;              // (outputs, pixels)
  int64_t channels, pixels, outputs;
  PixelType type;
};

// The most outputs of a call.
constexpr int64_t kPointwiseOutputs = 4;

// pointwise_convolve: pixels [begin, end).
#define AVATAR_DECLARE(ISA)                                                                 \
  namespace ISA {                                                                           \
  void pointwise_convolve(const PointwiseConv2d<float>& args, int64_t begin, int64_t end);  \
  void pointwise_convolve(const PointwiseConv2d<double>& args, int64_t begin, int64_t end); \
  }
AVATAR_FOR_EACH_ISA(AVATAR_DECLARE)
#undef AVATAR_DECLARE

}  // namespace avatar
