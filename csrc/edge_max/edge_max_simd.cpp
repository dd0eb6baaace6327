#include "edge_max/edge_max_simd.h"

#include <algorithm>
#include <type_traits>

#include "common/vector.h"

namespace avatar {
namespace AVATAR_ISA {
namespace {

// Neighbours are fetched about this many slots before they are needed.
constexpr int64_t kAhead = 32;
constexpr int64_t kMostVectors = 4;

// The larger lanes, those of b where neither is larger.
template <typename T>
inline Vector<T> larger(Vector<T> a, Vector<T> b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) return _mm512_maskz_max_ps(0xffff, a, b);
#endif
  return a > b ? a : b;
}

template <typename T>
inline bool has_nan(Vector<T> value) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) return _mm512_cmp_ps_mask(value, value, _CMP_NEQ_UQ) != 0;
#endif
  const Index<T> unordered = value != value;
  typename Lanes<T>::Integer any = 0;
  for (int64_t lane = 0; lane < Lanes<T>::kCount; ++lane) any |= unordered[lane];
  return any != 0;
}

// The maxima of kVectors whole vectors of channels, unless there may be a NaN among them.
template <int kVectors, typename T>
inline bool max_numbers(const EdgeMaxArgs<T>& args, int64_t row, const int32_t* slots, int64_t count,
                        int64_t first) {
  constexpr int64_t kLanes = Lanes<T>::kCount;
  const T* features = args.features + first;
  const int64_t channels = args.channels, *neighbors = args.neighbors_of(row);
  Vector<T> most[kVectors], sums[kVectors];
  for (int v = 0; v < kVectors; ++v)
    sums[v] = most[v] = load(features + neighbors[slots[0]] * channels + v * kLanes);
  for (int64_t i = 1; i < count; ++i) {
    const T* source = features + neighbors[slots[i]] * channels;
    for (int v = 0; v < kVectors; ++v) {
      const Vector<T> value = load(source + v * kLanes);
      most[v] = larger<T>(value, most[v]);
      sums[v] += value;
    }
  }
  for (int v = 1; v < kVectors; ++v) sums[0] += sums[v];
  if (has_nan<T>(sums[0])) return false;
  for (int v = 0; v < kVectors; ++v) store(args.values + row * channels + first + v * kLanes, most[v]);
  return true;
}

// The maxima of kVectors vectors of channels from `first` on, whole or fewer, and where they are from.
// `slots` names those that hold a neighbour.
template <int kVectors, bool kWhole, typename T>
inline void max_channels(const EdgeMaxArgs<T>& args, int64_t row, const int32_t* slots, int64_t count,
                         int64_t first) {
  constexpr int64_t kLanes = Lanes<T>::kCount;
  using Slot = typename Lanes<T>::Integer;
  if constexpr (kWhole) {
    if (!args.argmax && max_numbers<kVectors>(args, row, slots, count, first)) return;
  }
  const int64_t channels = args.channels;
  const int64_t* neighbors = args.neighbors_of(row);
  const T* end = args.features + args.num_points * channels;
  const auto read = [&](int64_t slot, int v) {
    const int64_t c = first + v * kLanes;
    const T* source = args.features + neighbors[slot] * channels + c;
    // What follows a row is read along as long as it belongs to the tensor.
    return kWhole || source + kLanes <= end ? load(source) : load_some(source, channels - c);
  };
  Vector<T> most[kVectors];
  Index<T> from[kVectors];
  for (int v = 0; v < kVectors; ++v) most[v] = read(slots[0], v), from[v] = Index<T>{} + Slot(slots[0]);
  for (int64_t i = 1; i < count; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      const Vector<T> value = read(slots[i], v);
      // Greater, or the first NaN.
      const Index<T> wins = ~(value <= most[v]) & (most[v] == most[v]);
      most[v] = wins ? value : most[v];
      from[v] = wins ? Index<T>{} + Slot(slots[i]) : from[v];
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    const int64_t c = first + v * kLanes, left = kWhole ? kLanes : channels - c;
    store_some(args.values + row * channels + c, most[v], left);
    if (!args.argmax) continue;
    Slot lanes[kLanes];
    __builtin_memcpy(lanes, &from[v], sizeof lanes);
    int64_t* argmax = args.argmax + row * channels + c;
    for (int64_t lane = 0; lane < left; ++lane) argmax[lane] = neighbors[lanes[lane]];
  }
}

template <typename T>
int64_t max_rows(const EdgeMaxArgs<T>& args, int64_t begin, int64_t end, int32_t* slots) {
  constexpr int64_t kLanes = Lanes<T>::kCount;
  const int64_t channels = args.channels, k = args.k;
  const int64_t ahead = k > 0 ? (kAhead + k - 1) / k : 0;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t* neighbors = args.neighbors_of(row);
    // Lists of chosen rows do not follow each other.
    if (args.chosen && row + 2 * ahead + 4 < end) {
      const int64_t* list = args.neighbors_of(row + 2 * ahead + 4);
      for (int64_t slot = 0; slot < k; slot += 8) __builtin_prefetch(list + slot);
    }
    if (row + ahead < end) {
      const int64_t* next = args.neighbors_of(row + ahead);
      for (int64_t slot = 0; slot < k; ++slot) {
        if (next[slot] < 0 || next[slot] >= args.num_points) continue;
        const T* features = args.features + next[slot] * channels;
        for (int64_t c = 0; c < channels; c += 64 / sizeof(T)) __builtin_prefetch(features + c);
      }
    }
    int64_t count = 0;
    for (int64_t slot = 0; slot < k; ++slot) {
      if (neighbors[slot] < -1 || neighbors[slot] >= args.num_points) {
        return neighbors + slot - args.neighbors;
      }
      slots[count] = static_cast<int32_t>(slot);
      count += neighbors[slot] >= 0;
    }
    if (count == 0) {
      std::fill_n(args.values + row * channels, channels, T(0));
      if (args.argmax) std::fill_n(args.argmax + row * channels, channels, int64_t(-1));
      continue;
    }
    int64_t c = 0;
    for (; c + kMostVectors * kLanes <= channels; c += kMostVectors * kLanes) {
      max_channels<kMostVectors, true>(args, row, slots, count, c);
    }
    for (; c + 2 * kLanes <= channels; c += 2 * kLanes) max_channels<2, true>(args, row, slots, count, c);
    for (; c + kLanes <= channels; c += kLanes) max_channels<1, true>(args, row, slots, count, c);
    // Rather some channels twice than part of a vector.
    if (c < channels && channels >= kLanes) {
      max_channels<1, true>(args, row, slots, count, channels - kLanes);
    } else if (c < channels) {
      max_channels<1, false>(args, row, slots, count, c);
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

int64_t edge_max_rows(const EdgeMaxArgs<float>& args, int64_t begin, int64_t end, int32_t* slots) {
  return max_rows(args, begin, end, slots);
}
int64_t edge_max_rows(const EdgeMaxArgs<double>& args, int64_t begin, int64_t end, int32_t* slots) {
  return max_rows(args, begin, end, slots);
}
void edge_max_backward_columns(const EdgeMaxBackwardArgs<float>& args, int64_t begin, int64_t end) {
  backward_columns(args, begin, end);
}
void edge_max_backward_columns(const EdgeMaxBackwardArgs<double>& args, int64_t begin, int64_t end) {
  backward_columns(args, begin, end);
}

}  // namespace AVATAR_ISA
}  // namespace avatar
