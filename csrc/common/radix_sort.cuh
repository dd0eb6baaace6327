// Stable radix sort of keys with a payload, on the device and without waiting for it: the number of launches
// and the memory depend on the count and the bits of a key alone, and so do the results.
#pragma once

#include <algorithm>
#include <utility>

#include "common/cuda.cuh"

namespace avatar {

constexpr int kRadixBits = 8, kRadixBuckets = 1 << kRadixBits;
// A thread for each bucket.
constexpr int kRadixThreads = kRadixBuckets;
constexpr int kRadixWarps = kRadixThreads / kWarpSize;
constexpr int kRadixPerThread = 8;
constexpr int kRadixTile = kRadixThreads * kRadixPerThread;

template <typename Key>
__device__ int radix_digit(Key key, int shift) {
  return static_cast<int>(key >> shift & Key(kRadixBuckets - 1));
}

// counts (buckets, blocks): how many keys of each block's tile fall into each bucket.
template <typename Key>
__global__ void __launch_bounds__(kRadixThreads)
    radix_count_kernel(const Key* __restrict__ keys, int64_t* __restrict__ counts, int64_t count, int shift) {
  AVATAR_SHARED(unsigned, found, kRadixBuckets);
  found[threadIdx.x] = 0;
  __syncthreads();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRadixTile + threadIdx.x;
  for (int round = 0; round < kRadixPerThread; ++round) {
    const int64_t i = first + round * kRadixThreads;
    if (i < count) atomicAdd(&found[radix_digit(keys[i], shift)], 1u);
  }
  __syncthreads();
  counts[static_cast<int64_t>(threadIdx.x) * gridDim.x + blockIdx.x] = found[threadIdx.x];
}

// One block a bucket turns its counts into those of the tiles before; totals (buckets,) gets their sum.
static __global__ void __launch_bounds__(kRadixThreads)
    radix_scan_kernel(int64_t* __restrict__ counts, int64_t* __restrict__ totals, int64_t blocks) {
  int64_t* row = counts + blockIdx.x * blocks;
  int64_t before = 0;
  for (int64_t first = 0; first < blocks; first += blockDim.x) {
    const int64_t block = first + threadIdx.x;
    int64_t total;
    const int64_t sum = block_exclusive_sum(block < blocks ? row[block] : int64_t(0), &total);
    if (block < blocks) row[block] = before + sum;
    before += total;
  }
  if (threadIdx.x == 0) totals[blockIdx.x] = before;
}

// Moves each tile's pairs to where their bucket has place for them, in the order given.
template <typename Key, typename Value>
__global__ void __launch_bounds__(kRadixThreads, 4)
    radix_scatter_kernel(const Key* __restrict__ keys, const Value* __restrict__ values,
                         const int64_t* __restrict__ counts, const int64_t* __restrict__ totals,
                         Key* __restrict__ sorted_keys, Value* __restrict__ sorted_values, int64_t count,
                         int shift) {
  AVATAR_SHARED(int, seen, kRadixWarps* kRadixBuckets);
  AVATAR_SHARED(int64_t, place, kRadixBuckets);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  int* const seen_by_warp = seen + warp * kRadixBuckets;
  for (int i = threadIdx.x; i < kRadixWarps * kRadixBuckets; i += kRadixThreads) seen[i] = 0;
  int64_t total;
  const int64_t smaller = block_exclusive_sum(totals[threadIdx.x], &total);
  place[threadIdx.x] = smaller + counts[static_cast<int64_t>(threadIdx.x) * gridDim.x + blockIdx.x];
  __syncthreads();

  // A warp takes consecutive pairs, so that counting warp by warp and round by round keeps their order.
  const int64_t first =
      static_cast<int64_t>(blockIdx.x) * kRadixTile + warp * kWarpSize * kRadixPerThread + lane;
  Key key[kRadixPerThread];
  int rank[kRadixPerThread];
#pragma unroll
  for (int round = 0; round < kRadixPerThread; ++round) {
    const int64_t i = first + round * kWarpSize;
    key[round] = i < count ? keys[i] : Key(0);
    const int digit = i < count ? radix_digit(key[round], shift) : kRadixBuckets;
    const unsigned equal = __match_any_sync(0xffffffffu, digit);
    const int before = __popc(equal & ((1u << lane) - 1));
    rank[round] = before + (i < count ? seen_by_warp[digit] : 0);
    __syncwarp();
    if (i < count && before == 0) seen_by_warp[digit] += __popc(equal);
    __syncwarp();
  }
  __syncthreads();
  int sum = 0;
  for (int other = 0; other < kRadixWarps; ++other) {
    const int found = seen[other * kRadixBuckets + threadIdx.x];
    seen[other * kRadixBuckets + threadIdx.x] = sum;
    sum += found;
  }
  __syncthreads();
#pragma unroll
  for (int round = 0; round < kRadixPerThread; ++round) {
    const int64_t i = first + round * kWarpSize;
    if (i >= count) continue;
    const int digit = radix_digit(key[round], shift);
    const int64_t to = place[digit] + seen_by_warp[digit] + rank[round];
    sorted_keys[to] = key[round];
    sorted_values[to] = values[i];
  }
}

// The tensor type that holds a Key or Value of so many bytes.
template <typename T>
constexpr ScalarType integer_type() {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "4 or 8 bytes");
  return sizeof(T) == 4 ? ScalarType::Int : ScalarType::Long;
}

inline int bit_width(uint64_t value) {
  int bits = 0;
  for (; value != 0; value >>= 1) ++bits;
  return bits;
}

// Sorts values by the lowest `bits` bits of unsigned keys, ascending, equal ones in the order given. Both are
// of one dimension and of integer_type; they are used up: take what the arguments hold afterwards.
template <typename Key, typename Value>
void sort_by_key(Tensor& keys, Tensor& values, int bits, cudaStream_t stream) {
  const int64_t count = keys.numel(), blocks = divide_up(count, kRadixTile);
  if (count == 0) return;
  Tensor other_keys = torch::stable::empty_like(keys), other_values = torch::stable::empty_like(values);
  Tensor counts = torch::stable::new_empty(keys, {kRadixBuckets * blocks}, ScalarType::Long);
  Tensor totals = torch::stable::new_empty(keys, {kRadixBuckets}, ScalarType::Long);
  const auto data = [](const Tensor& tensor) { return tensor.mutable_data_ptr(); };
  const int64_t scanners = std::min<int64_t>(kRadixThreads, divide_up(blocks, kWarpSize) * kWarpSize);
  for (int shift = 0; shift < bits; shift += kRadixBits) {
    launch("radix_count", radix_count_kernel<Key>, grid_of(blocks), dim3(kRadixThreads), 0, stream,
           static_cast<const Key*>(data(keys)), mutable_data<int64_t>(counts), count, shift);
    launch("radix_scan", radix_scan_kernel, dim3(kRadixBuckets), dim3(scanners), 0, stream,
           mutable_data<int64_t>(counts), mutable_data<int64_t>(totals), blocks);
    launch("radix_scatter", radix_scatter_kernel<Key, Value>, grid_of(blocks), dim3(kRadixThreads), 0, stream,
           static_cast<const Key*>(data(keys)), static_cast<const Value*>(data(values)),
           const_data<int64_t>(counts), const_data<int64_t>(totals), static_cast<Key*>(data(other_keys)),
           static_cast<Value*>(data(other_values)), count, shift);
    std::swap(keys, other_keys);
    std::swap(values, other_values);
  }
}

}  // namespace avatar
