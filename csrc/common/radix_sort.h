// Stable parallel radix sort of keys with a payload.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "common/memory.h"
#include "common/tensor.h"

namespace avatar {

// Sorts values by ascending unsigned keys, equal keys in the order given. Both buffers are used up: take what
// they hold afterwards.
template <typename Key, typename Value>
void sort_by_key(Buffer<Key>& keys, Buffer<Value>& values, int64_t count) {
  constexpr int64_t kDigitBits = 11, kBuckets = 1 << kDigitBits, kBlockMin = 1 << 14, kBlocksMax = 16;
  const int64_t blocks = std::clamp<int64_t>(count / kBlockMin, 1, kBlocksMax);
  const int64_t block_size = (count + blocks - 1) / blocks;
  Buffer<Key> other_keys = buffer<Key>(count);
  Buffer<Value> other_values = buffer<Value>(count);
  Buffer<int64_t> places = buffer<int64_t>(blocks * kBuckets);
  for (int64_t shift = 0; shift < int64_t(8 * sizeof(Key)); shift += kDigitBits) {
    parallel_tasks(blocks, [&](int64_t block) {
      int64_t* place = places.get() + block * kBuckets;
      std::fill_n(place, kBuckets, 0);
      const int64_t end = std::min(count, (block + 1) * block_size);
      for (int64_t i = block * block_size; i < end; ++i) ++place[keys[i] >> shift & (kBuckets - 1)];
    });
    int64_t total = 0;
    bool one_bucket = false;
    for (int64_t bucket = 0; bucket < kBuckets; ++bucket) {
      const int64_t before = total;
      for (int64_t block = 0; block < blocks; ++block) {
        total += std::exchange(places[block * kBuckets + bucket], total);
      }
      one_bucket |= total - before == count;
    }
    if (one_bucket) continue;
    parallel_tasks(blocks, [&](int64_t block) {
      int64_t* place = places.get() + block * kBuckets;
      const int64_t end = std::min(count, (block + 1) * block_size);
      for (int64_t i = block * block_size; i < end; ++i) {
        const int64_t to = place[keys[i] >> shift & (kBuckets - 1)]++;
        other_keys[to] = keys[i];
        other_values[to] = values[i];
      }
    });
    std::swap(keys, other_keys);
    std::swap(values, other_values);
  }
}

}  // namespace avatar
