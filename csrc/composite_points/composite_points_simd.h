// Inner loops of composite_points, built once per instruction set.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace avatar {

// One image: pixels = height * width.
template <typename T>
struct CompositeArgs {
  const int64_t* indices;  // (pixels, k), -1 for none
  const T* alphas;         // (pixels, k)
  const T* features;       // (num_points, channels)
  T* image;                // (channels, pixels)
  T* opacity;              // (pixels,)
  int64_t pixels, k, channels, num_points;
};

template <typename T>
struct CompositeAlphasArgs {
  const T* grad_image;    // (channels, pixels)
  const T* grad_opacity;  // (pixels,)
  const int64_t* indices;
  const T* alphas;
  const T* features;
  T* grad_alphas;  // (pixels, k)
  int64_t pixels, k, channels;
};

template <typename T>
struct CompositeWeightsArgs {
  const T* grad_image;  // (channels, pixels)
  const int64_t* indices;
  const T* alphas;
  T* grad_pixels;  // (pixels, channels): grad_image with the channels last
  T* weights;      // (pixels, k): alpha times what the slots in front let through
  int64_t pixels, k, channels;
};

template <typename T>
struct CompositeFeaturesArgs {
  const T* grad_pixels;    // (batch * pixels, channels)
  const T* weights;        // (batch * pixels, k)
  const int64_t* offsets;  // (num_points + 1,) where each point's slots begin in slots
  const int64_t* slots;    // flat positions in weights
  T* grad_features;        // (num_points, channels)
  int64_t k, channels;
};

// composite_pixels: returns the flat position of the first index out of range in pixels [begin, end), or -1.
// composite_alphas: gradient of alphas in pixels [begin, end).
// composite_weights, then composite_features for points [begin, end): gradient of features.
#define AVATAR_DECLARE_TYPE(T)                                                             \
  int64_t composite_pixels(const CompositeArgs<T>& args, int64_t begin, int64_t end);      \
  void composite_alphas(const CompositeAlphasArgs<T>& args, int64_t begin, int64_t end);   \
  void composite_weights(const CompositeWeightsArgs<T>& args, int64_t begin, int64_t end); \
  void composite_features(const CompositeFeaturesArgs<T>& args, int64_t begin, int64_t end);
#define AVATAR_DECLARE(ISA)   \
  namespace ISA {             \
  AVATAR_DECLARE_TYPE(float)  \
  AVATAR_DECLARE_TYPE(double) \
  }
AVATAR_FOR_EACH_ISA(AVATAR_DECLARE)
#undef AVATAR_DECLARE
#undef AVATAR_DECLARE_TYPE

}  // namespace avatar
