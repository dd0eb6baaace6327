#include "modulated_conv2d/modulated_conv2d_small_simd.h"

#include <algorithm>

#include "common/vector.h"

namespace avatar {
namespace AVATAR_ISA {
namespace {

constexpr int64_t kLanes = Lanes<float>::kCount;
constexpr int64_t kTaps = 9;

// products[k * stride + lane] = sum over channels of weights[c][k] * pixels[c][lane].
inline void multiply_taps(const float* weights, const float* pixels, int64_t channels, float* products,
                          int64_t stride) {
  // Names, since an array of sums would not stay in registers.
  Vector<float> s0 = {}, s1 = {}, s2 = {}, s3 = {}, s4 = {}, s5 = {}, s6 = {}, s7 = {}, s8 = {};
  for (int64_t c = 0; c < channels; ++c) {
    const Vector<float> x = load(pixels + c * kLanes);
    const float* w = weights + c * kTaps;
    s0 += w[0] * x;
    s1 += w[1] * x;
    s2 += w[2] * x;
    s3 += w[3] * x;
    s4 += w[4] * x;
    s5 += w[5] * x;
    s6 += w[6] * x;
    s7 += w[7] * x;
    s8 += w[8] * x;
  }
  const Vector<float> sums[kTaps] = {s0, s1, s2, s3, s4, s5, s6, s7, s8};
  for (int64_t k = 0; k < kTaps; ++k) store(products + k * stride, sums[k]);
}

// First and last index i of `size`, the latter excluded, for which origin + stride * i lies in [0, limit).
struct Range {
  int64_t first, last;

  Range(int64_t origin, int64_t stride, int64_t size, int64_t limit) {
    first = origin >= 0 ? 0 : std::min(size, (stride - 1 - origin) / stride);
    last = origin >= limit ? first : std::max(first, std::min(size, (limit - origin + stride - 1) / stride));
  }
};

template <typename T>
void squares(const T* values, int64_t rows, int64_t size, T* sums) {
  for (int64_t r = 0; r < rows; ++r) {
    T even = 0, odd = 0;
    int64_t i = 0;
    for (; i + 2 <= size; i += 2) {
      even += values[i] * values[i];
      odd += values[i + 1] * values[i + 1];
    }
    if (i < size) even += values[i] * values[i];
    sums[r] = even + odd;
    values += size;
  }
}

}  // namespace

int64_t small_pixels(int64_t pixels) {
  return (pixels + kLanes - 1) / kLanes * kLanes;
}

void small_pack(const SmallConv2d& args, float* packed) {
  const int64_t image = args.height * args.width, pixels = args.batch * image;
  const int64_t padded = small_pixels(pixels);
  for (int64_t c = 0; c < args.channels; ++c) {
    for (int64_t b = 0; b < args.batch; ++b) {
      const int64_t plane = b * args.channels + c;
      const float style = args.styles ? args.styles[plane] : 1.f;
      const float* source = args.x + plane * image;
      for (int64_t i = 0; i < image; ++i) {
        const int64_t pixel = b * image + i;
        packed[(pixel / kLanes * args.channels + c) * kLanes + pixel % kLanes] = source[i] * style;
      }
    }
    for (int64_t pixel = pixels; pixel < padded; ++pixel) {
      packed[(pixel / kLanes * args.channels + c) * kLanes + pixel % kLanes] = 0;
    }
  }
}

void small_convolve(const SmallConv2d& args, int64_t output, const float* packed, float* products) {
  const int64_t image = args.height * args.width, padded = small_pixels(args.batch * image);
  const float* weights = args.weight + output * args.channels * kTaps;
  for (int64_t p = 0; p < padded; p += kLanes) {
    multiply_taps(weights, packed + p * args.channels, args.channels, products + p, padded);
  }
  const int64_t plane = args.out_height * args.out_width;
  for (int64_t b = 0; b < args.batch; ++b) {
    float* target = args.y + (b * args.outputs + output) * plane;
    std::fill_n(target, plane, 0.f);
    for (int64_t k = 0; k < kTaps; ++k) {
      const int64_t top = args.origin - k / 3, left = args.origin - k % 3;
      const Range rows(top, args.stride, args.height, args.out_height);
      const Range columns(left, args.stride, args.width, args.out_width);
      const float* source = products + k * padded + b * image;
      for (int64_t i = rows.first; i < rows.last; ++i) {
        float* line = target + (top + i * args.stride) * args.out_width + left;
        for (int64_t j = columns.first; j < columns.last; ++j) {
          line[j * args.stride] += source[i * args.width + j];
        }
      }
    }
  }
}

void sum_squares(const float* values, int64_t rows, int64_t size, float* sums) {
  size == kTaps ? squares(values, rows, kTaps, sums) : squares(values, rows, size, sums);
}
void sum_squares(const double* values, int64_t rows, int64_t size, double* sums) {
  squares(values, rows, size, sums);
}

}  // namespace AVATAR_ISA
}  // namespace avatar
