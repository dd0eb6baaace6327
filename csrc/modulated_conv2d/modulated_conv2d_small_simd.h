// 3x3 convolutions of few pixels, and the norms of filters; built once per instruction set.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace avatar {

// Convolutions that read each weight once or twice at most: all pixels of all samples are multiplied by all
// taps of a filter, and the products added where they belong.
struct SmallConv2d {
  const float* x;       // (batch, channels, height, width)
  const float* weight;  // (outputs, channels, 3, 3)
  const float* styles;  // (batch, channels), null for ones
  float* y;             // (batch, outputs, out_height, out_width)
  int64_t batch, channels, height, width, outputs, out_height, out_width;
  // Output pixel, in rows and columns, that tap 0 takes input pixel 0 to, from where tap k takes it k less,
  // and pixels from one to the next.
  int64_t origin, stride;
};

// small_pack brings the modulated pixels into `packed`, of small_pixels(pixels) * channels elements;
// small_convolve computes the image of one output of every sample, with `products` for 9 *
// small_pixels(pixels) elements. sum_squares: sums[r] = sum of the squares of `size` values of row r.
#define AVATAR_DECLARE(ISA)                                                                           \
  namespace ISA {                                                                                     \
  int64_t small_pixels(int64_t pixels);                                                               \
  void small_pack(const SmallConv2d& args, float* packed);                                            \
  void small_convolve(const SmallConv2d& args, int64_t output, const float* packed, float* products); \
  void sum_squares(const float* values, int64_t rows, int64_t size, float* sums);                     \
  void sum_squares(const double* values, int64_t rows, int64_t size, double* sums);                   \
  }
AVATAR_FOR_EACH_ISA(AVATAR_DECLARE)
#undef AVATAR_DECLARE

}  // namespace avatar
