#include "edge_max/edge_max_simd.h"

#include <algorithm>

namespace avatar {
namespace AVATAR_ISA {
namespace {

// Channels are worked on in blocks whose running maxima stay in the first-level cache.
constexpr int64_t kChannelBlock = 256;
// Neighbours are fetched this many slots before they are needed.
constexpr int64_t kAhead = 32;

template <typename T>
int64_t max_rows(const EdgeMaxArgs<T>& args, int64_t begin, int64_t end) {
  const int64_t channels = args.channels, k = args.k;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t* neighbors = args.neighbors + row * k;
    for (int64_t slot = kAhead; slot < std::min(k + kAhead, (end - row) * k); ++slot) {
      if (neighbors[slot] < 0 || neighbors[slot] >= args.num_points) continue;
      const T* features = args.features + neighbors[slot] * channels;
      for (int64_t c = 0; c < channels; c += 64 / sizeof(T)) __builtin_prefetch(features + c);
    }
    for (int64_t slot = 0; slot < k; ++slot) {
      if (neighbors[slot] < -1 || neighbors[slot] >= args.num_points) return row * k + slot;
    }
    for (int64_t first = 0; first < channels; first += kChannelBlock) {
      const int64_t count = std::min(kChannelBlock, channels - first);
      T* values = args.values + row * channels + first;
      int64_t* argmax = args.argmax + row * channels + first;
      std::fill_n(values, count, T(0));
      std::fill_n(argmax, count, int64_t(-1));
      bool some = false;
      for (int64_t slot = 0; slot < k; ++slot) {
        const int64_t point = neighbors[slot];
        if (point < 0) continue;
        const T* features = args.features + point * channels + first;
        if (!some) {
          std::copy_n(features, count, values);
          std::fill_n(argmax, count, point);
          some = true;
          continue;
        }
        for (int64_t c = 0; c < count; ++c) {
          // Greater, or the first NaN.
          const bool wins = !(features[c] <= values[c]) & (values[c] == values[c]);
          values[c] = wins ? features[c] : values[c];
          argmax[c] = wins ? point : argmax[c];
        }
      }
    }
  }
  return -1;
}

template <typename T>
void backward_columns(const EdgeMaxBackwardArgs<T>& args, int64_t begin, int64_t end) {
  for (int64_t row = 0; row < args.rows; ++row) {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t point = args.argmax[row * args.channels + c];
      if (point >= 0) args.grad_features[point * args.channels + c] += args.grad[row * args.channels + c];
    }
  }
}

}  // namespace

int64_t edge_max_rows(const EdgeMaxArgs<float>& args, int64_t begin, int64_t end) {
  return max_rows(args, begin, end);
}
int64_t edge_max_rows(const EdgeMaxArgs<double>& args, int64_t begin, int64_t end) {
  return max_rows(args, begin, end);
}
void edge_max_backward_columns(const EdgeMaxBackwardArgs<float>& args, int64_t begin, int64_t end) {
  backward_columns(args, begin, end);
}
void edge_max_backward_columns(const EdgeMaxBackwardArgs<double>& args, int64_t begin, int64_t end) {
  backward_columns(args, begin, end);
}

}  // namespace AVATAR_ISA
}  // namespace avatar
