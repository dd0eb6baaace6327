#include "composite_points/composite_points_simd.h"

#include <algorithm>

namespace avatar {
namespace AVATAR_ISA {
namespace {

// Pixels and channels worked on at a time: the block stays in the first-level cache while it is transposed.
constexpr int64_t kPixels = 16;
constexpr int64_t kChannels = 64;
// Partial sums of a dot product, in a fixed order.
constexpr int64_t kLanes = 16;

// Slots ahead whose rows are fetched: which rows come next is known, where they are in memory is random.
constexpr int64_t kAhead = 12;
constexpr int64_t kCacheLine = 64;

template <typename T>
inline void prefetch_row(const T* row, int64_t count) {
  for (int64_t c = 0; c < count; c += kCacheLine / int64_t(sizeof(T))) __builtin_prefetch(row + c);
}

template <typename T>
T dot(const T* a, const T* b, int64_t count) {
  T lanes[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += a[c + lane] * b[c + lane];
  }
  T sum = 0;
  for (; c < count; ++c) sum += a[c] * b[c];
  if (count >= kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  }
  return sum;
}

template <typename T>
int64_t composite(const CompositeArgs<T>& args, int64_t begin, int64_t end) {
  const int64_t k = args.k;
  for (int64_t slot = begin * k; slot < end * k; ++slot) {
    if (args.indices[slot] < -1 || args.indices[slot] >= args.num_points) return slot;
  }
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    T through = 1, opacity = 0;
    for (int64_t slot = pixel * k; slot < (pixel + 1) * k; ++slot) {
      if (args.indices[slot] < 0) continue;
      opacity += args.alphas[slot] * through;
      through *= T(1) - args.alphas[slot];
    }
    args.opacity[pixel] = opacity;
  }
  T sums[kPixels][kChannels];
  for (int64_t first = begin; first < end; first += kPixels) {
    const int64_t pixels = std::min(kPixels, end - first);
    for (int64_t channel = 0; channel < args.channels; channel += kChannels) {
      const int64_t channels = std::min(kChannels, args.channels - channel);
      for (int64_t p = 0; p < pixels; ++p) {
        T* sum = sums[p];
        std::fill_n(sum, channels, T(0));
        T through = 1;
        for (int64_t slot = (first + p) * k; slot < (first + p + 1) * k; ++slot) {
          if (slot + kAhead < end * k && args.indices[slot + kAhead] >= 0) {
            prefetch_row(args.features + args.indices[slot + kAhead] * args.channels + channel, channels);
          }
          if (args.indices[slot] < 0) continue;
          const T* features = args.features + args.indices[slot] * args.channels + channel;
          const T weight = args.alphas[slot] * through;
          for (int64_t c = 0; c < channels; ++c) sum[c] += weight * features[c];
          through *= T(1) - args.alphas[slot];
        }
      }
      for (int64_t c = 0; c < channels; ++c) {
        T* image = args.image + (channel + c) * args.pixels + first;
        for (int64_t p = 0; p < pixels; ++p) image[p] = sums[p][c];
      }
    }
  }
  return -1;
}

// With s the product of a slot's feature and the gradients, t what the slots in front let through and R the
// weighted sum of s over the slots behind, the gradient of an alpha is t (s - R). Nothing is divided by
// 1 - alpha, so it holds at alpha = 1 too.
template <typename T>
void alphas(const CompositeAlphasArgs<T>& args, int64_t begin, int64_t end) {
  const int64_t k = args.k;
  T gradients[kPixels][kChannels];
  for (int64_t first = begin; first < end; first += kPixels) {
    const int64_t pixels = std::min(kPixels, end - first);
    for (int64_t p = 0; p < pixels; ++p) {
      std::fill_n(args.grad_alphas + (first + p) * k, k, args.grad_opacity[first + p]);
    }
    for (int64_t channel = 0; channel < args.channels; channel += kChannels) {
      const int64_t channels = std::min(kChannels, args.channels - channel);
      for (int64_t c = 0; c < channels; ++c) {
        const T* gradient = args.grad_image + (channel + c) * args.pixels + first;
        for (int64_t p = 0; p < pixels; ++p) gradients[p][c] = gradient[p];
      }
      for (int64_t p = 0; p < pixels; ++p) {
        for (int64_t slot = (first + p) * k; slot < (first + p + 1) * k; ++slot) {
          if (slot + kAhead < end * k && args.indices[slot + kAhead] >= 0) {
            prefetch_row(args.features + args.indices[slot + kAhead] * args.channels + channel, channels);
          }
          if (args.indices[slot] < 0) continue;
          const T* features = args.features + args.indices[slot] * args.channels + channel;
          args.grad_alphas[slot] += dot(gradients[p], features, channels);
        }
      }
    }
    for (int64_t p = 0; p < pixels; ++p) {
      const int64_t front = (first + p) * k, back = front + k;
      T behind = 0;
      for (int64_t slot = back - 1; slot >= front; --slot) {
        if (args.indices[slot] < 0) continue;
        const T product = args.grad_alphas[slot], alpha = args.alphas[slot];
        args.grad_alphas[slot] = product - behind;
        behind = alpha * product + (T(1) - alpha) * behind;
      }
      T through = 1;
      for (int64_t slot = front; slot < back; ++slot) {
        if (args.indices[slot] < 0) {
          args.grad_alphas[slot] = 0;
          continue;
        }
        args.grad_alphas[slot] *= through;
        through *= T(1) - args.alphas[slot];
      }
    }
  }
}

template <typename T>
void weights(const CompositeWeightsArgs<T>& args, int64_t begin, int64_t end) {
  const int64_t k = args.k;
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    T through = 1;
    for (int64_t slot = pixel * k; slot < (pixel + 1) * k; ++slot) {
      const bool found = args.indices[slot] >= 0;
      args.weights[slot] = found ? args.alphas[slot] * through : T(0);
      if (found) through *= T(1) - args.alphas[slot];
    }
  }
  for (int64_t first = begin; first < end; first += kPixels) {
    const int64_t last = std::min(first + kPixels, end);
    for (int64_t c = 0; c < args.channels; ++c) {
      const T* gradient = args.grad_image + c * args.pixels;
      for (int64_t p = first; p < last; ++p) args.grad_pixels[p * args.channels + c] = gradient[p];
    }
  }
}

template <typename T>
void features(const CompositeFeaturesArgs<T>& args, int64_t begin, int64_t end) {
  const int64_t all = args.offsets[end];
  for (int64_t n = begin; n < end; ++n) {
    T* sum = args.grad_features + n * args.channels;
    std::fill_n(sum, args.channels, T(0));
    for (int64_t s = args.offsets[n]; s < args.offsets[n + 1]; ++s) {
      if (s + kAhead < all) {
        const int64_t slot = args.slots[s + kAhead];
        prefetch_row(args.grad_pixels + slot / args.k * args.channels, args.channels);
        __builtin_prefetch(args.weights + slot);
      }
      const T* gradient = args.grad_pixels + args.slots[s] / args.k * args.channels;
      const T weight = args.weights[args.slots[s]];
      for (int64_t c = 0; c < args.channels; ++c) sum[c] += weight * gradient[c];
    }
  }
}

}  // namespace

#define AVATAR_DEFINE(T)                                                                      \
  int64_t composite_pixels(const CompositeArgs<T>& args, int64_t begin, int64_t end) {        \
    return composite(args, begin, end);                                                       \
  }                                                                                           \
  void composite_alphas(const CompositeAlphasArgs<T>& args, int64_t begin, int64_t end) {     \
    alphas(args, begin, end);                                                                 \
  }                                                                                           \
  void composite_weights(const CompositeWeightsArgs<T>& args, int64_t begin, int64_t end) {   \
    weights(args, begin, end);                                                                \
  }                                                                                           \
  void composite_features(const CompositeFeaturesArgs<T>& args, int64_t begin, int64_t end) { \
    features(args, begin, end);                                                               \
  }
AVATAR_DEFINE(float)
AVATAR_DEFINE(double)
#undef AVATAR_DEFINE

}  // namespace AVATAR_ISA
}  // namespace avatar
