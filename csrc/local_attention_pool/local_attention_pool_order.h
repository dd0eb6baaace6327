// Rows in an order in which near points follow each other.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "common/radix_sort.h"
#include "local_attention_pool/local_attention_pool_simd.h"

namespace avatar {

// Whether most points are about as near to the next one as to their neighbours, or near nothing.
template <typename T>
bool follows_neighbors(const PoolArgs<T>& args, int64_t rows) {
  constexpr int64_t kSamples = 64;
  const int64_t stride = args.position.point_stride, step = std::max<int64_t>(1, rows / kSamples);
  int64_t near = 0, count = 0;
  for (int64_t row = 0; row + 1 < rows; row += step) {
    const int64_t base = row / args.cloud * args.cloud;
    const auto squared = [&](int64_t other) {
      T sum = 0;
      for (int64_t d = 0; d < args.position.dims; ++d) {
        const T difference =
            args.position.points[row * stride + d] - args.position.points[other * stride + d];
        sum += difference * difference;
      }
      return sum;
    };
    T reach = 0;
    for (int64_t edge = row * args.k; edge < (row + 1) * args.k; ++edge) {
      const int64_t neighbor = args.neighbors[edge];
      if (neighbor >= 0 && neighbor < args.cloud) reach = std::max(reach, squared(base + neighbor));
    }
    ++count;
    near += squared(row + 1) <= 4 * reach;
  }
  return 2 * near >= count;
}

// The rows of three-dimensional clouds, cloud by cloud, along Morton's space-filling curve of 1024 steps a
// side. Points that are not finite come first.
template <typename T>
Buffer<int64_t> curve_order(const PoolArgs<T>& args, int64_t rows) {
  constexpr int64_t kGrain = 1 << 14;
  const int64_t stride = args.position.point_stride;
  Buffer<int64_t> order = buffer<int64_t>(rows);
  for (int64_t first = 0; first < rows; first += args.cloud) {
    const T* points = args.position.points + first * stride;
    T low[3], high = 0;
    for (int d = 0; d < 3; ++d) {
      T least = std::numeric_limits<T>::max(), most = std::numeric_limits<T>::lowest();
      for (int64_t i = 0; i < args.cloud; ++i) {
        const T value = points[i * stride + d];
        if (!std::isfinite(value)) continue;
        least = std::min(least, value);
        most = std::max(most, value);
      }
      low[d] = least;
      high = std::max(high, most - least);
    }
    const T scale = high > T(0) && std::isfinite(high) ? T(1023) / high : T(0);
    Buffer<uint32_t> keys = buffer<uint32_t>(args.cloud);
    Buffer<int64_t> places = buffer<int64_t>(args.cloud);
    torch::stable::parallel_for(0, args.cloud, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        uint32_t key = 0;
        for (int d = 0; d < 3; ++d) {
          const T place = (points[i * stride + d] - low[d]) * scale;
          // Ten bits with two bits free after each.
          uint32_t bits = place > T(0) ? static_cast<uint32_t>(std::min(place, T(1023))) : 0;
          bits = (bits | bits << 16) & 0x030000ff;
          bits = (bits | bits << 8) & 0x0300f00f;
          bits = (bits | bits << 4) & 0x030c30c3;
          bits = (bits | bits << 2) & 0x09249249;
          key |= bits << d;
        }
        keys[i] = key;
        places[i] = first + i;
      }
    });
    sort_by_key(keys, places, args.cloud);
    std::copy_n(places.get(), args.cloud, order.get() + first);
  }
  return order;
}

}  // namespace avatar
