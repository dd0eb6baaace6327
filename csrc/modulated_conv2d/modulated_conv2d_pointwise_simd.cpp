#include "modulated_conv2d/modulated_conv2d_pointwise_simd.h"

#include <algorithm>

#include "common/narrow.h"

namespace avatar {
namespace AVATAR_ISA {
namespace {

// Channels whose rows are fetched ahead, as they lie too far apart for the processor to foresee.
constexpr int64_t kAhead = 8;

inline Vector<double> load_floats(const double* source) {
  return load(source);
}

template <typename Number, typename T>
inline Vector<T> load_few(const Number* source, int64_t count) {
  constexpr int64_t kLanes = Lanes<T>::kCount;
  if (count >= kLanes) return load_floats(source);
  Number values[kLanes] = {};
  std::copy_n(source, std::max<int64_t>(0, count), values);
  return load_floats(values);
}

// kVectors vectors of pixels from `first` on, and kOutputs sums of each in registers.
template <int kOutputs, int kVectors, bool kWhole, typename Number, typename T>
inline void convolve_strip(const PointwiseConv2d<T>& args, const Number* x, int64_t first) {
  constexpr int64_t kLanes = Lanes<T>::kCount;
  const int64_t channels = args.channels, pixels = args.pixels;
  Vector<T> sums[kOutputs][kVectors] = {};
  for (int64_t c = 0; c < channels; ++c) {
    const Number* row = x + c * pixels + first;
    const T* weights = args.weights + c * kPointwiseOutputs;
    if (kWhole && c + kAhead < channels) {
      constexpr int64_t kLine = 64 / sizeof(Number);
      for (int64_t i = 0; i < kVectors * kLanes; i += kLine) __builtin_prefetch(row + kAhead * pixels + i);
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const int64_t pixel = v * kLanes;
      const Vector<T> value = kWhole ? Vector<T>(load_floats(row + pixel))
                                     : load_few<Number, T>(row + pixel, pixels - first - pixel);
#pragma GCC unroll 4
      for (int o = 0; o < kOutputs; ++o) sums[o][v] += weights[o] * value;
    }
  }
#pragma GCC unroll 4
  for (int o = 0; o < kOutputs; ++o) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const int64_t pixel = first + v * kLanes;
      if (kWhole || pixel < pixels) store_some(args.y + o * pixels + pixel, sums[o][v], pixels - pixel);
    }
  }
}

template <int kOutputs, typename Number, typename T>
void convolve(const PointwiseConv2d<T>& args, int64_t begin, int64_t end) {
  // As many sums as leave registers for the rest.
  constexpr int kSums = kVectorBytes == 64 ? 24 : 12, kVectors = kOutputs < 3 ? kSums / 4 : kSums / kOutputs;
  constexpr int64_t kLanes = Lanes<T>::kCount, kStrip = kVectors * kLanes;
  const Number* x = static_cast<const Number*>(args.x);
  for (; begin + kStrip <= end; begin += kStrip) convolve_strip<kOutputs, kVectors, true>(args, x, begin);
  for (; begin < end; begin += kLanes) convolve_strip<kOutputs, 1, false>(args, x, begin);
}

template <typename Number, typename T>
void convolve_outputs(const PointwiseConv2d<T>& args, int64_t begin, int64_t end) {
  switch (args.outputs) {
    case 1:
      return convolve<1, Number>(args, begin, end);
    case 2:
      return convolve<2, Number>(args, begin, end);
    case 3:
      return convolve<3, Number>(args, begin, end);
    default:
      return convolve<4, Number>(args, begin, end);
  }
}

}  // namespace

void pointwise_convolve(const PointwiseConv2d<float>& args, int64_t begin, int64_t end) {
  switch (args.type) {
    case PixelType::bfloat16:
      return convolve_outputs<BFloat16>(args, begin, end);
    case PixelType::float16:
      return convolve_outputs<Float16>(args, begin, end);
    default:
      return convolve_outputs<float>(args, begin, end);
  }
}
void pointwise_convolve(const PointwiseConv2d<double>& args, int64_t begin, int64_t end) {
  convolve_outputs<double>(args, begin, end);
}

}  // namespace AVATAR_ISA
}  // namespace avatar
