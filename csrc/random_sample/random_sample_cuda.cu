#include <algorithm>

#include "common/cuda.cuh"
#include "random_sample/random_sample_simd.h"

namespace avatar {
namespace {

constexpr int kThreadsMax = 128;
// Each thread draws this many.
constexpr int kPerThread = 4;
// As on the CPU, whose indices these are, bit for bit.
constexpr int64_t kSmallCloud = 64;
constexpr uint64_t kStep = 0x9E3779B97F4A7C15u;

// The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
__device__ uint64_t mix(uint64_t value) {
  value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9u;
  value = (value ^ value >> 27) * 0x94D049BB133111EBu;
  return value ^ value >> 31;
}

// The smallest integer whose square is at least value.
__device__ uint32_t ceil_sqrt(int64_t value) {
  int64_t root = static_cast<int64_t>(sqrt(static_cast<double>(value)));
  while (root * root < value) ++root;
  while (root > 0 && (root - 1) * (root - 1) >= value) --root;
  return static_cast<uint32_t>(root);
}

// The finaliser of MurmurHash3 (Appleby), keyed, then scaled to [0, size).
__device__ uint32_t keyed_hash(uint32_t value, uint64_t key, uint32_t size) {
  uint32_t hash = value + static_cast<uint32_t>(key);
  hash = (hash ^ hash >> 16) * 0x85EBCA6Bu;
  hash = (hash ^ hash >> 13) * 0xC2B2AE35u;
  hash = hash ^ hash >> 16 ^ static_cast<uint32_t>(key >> 32);
  return __umulhi(hash, size);
}

__device__ uint32_t add_modulo(uint32_t a, uint32_t b, uint32_t size) {
  const uint32_t sum = a + b;
  return sum >= size ? sum - size : sum;
}

// A permutation of [0, length): a Feistel network on a grid of rows * columns >= length, walked until inside.
struct Permutation {
  uint64_t round_keys[kSampleRounds];
  uint32_t rows, columns;

  __device__ int64_t image(int64_t i, int64_t length) const {
    uint32_t left, right;
    if (i >> 32 == 0) {  // much the faster division
      left = static_cast<uint32_t>(i) / columns;
      right = static_cast<uint32_t>(i) % columns;
    } else {
      left = static_cast<uint32_t>(i / columns);
      right = static_cast<uint32_t>(i % columns);
    }
    do {
      for (int round = 0; round < kSampleRounds; round += 2) {
        left = add_modulo(left, keyed_hash(right, round_keys[round], rows), rows);
        right = add_modulo(right, keyed_hash(left, round_keys[round + 1], columns), columns);
      }
      i = static_cast<int64_t>(left) * columns + right;
    } while (i >= length);
    return i;
  }
};

// Block b * chunks + c draws the c-th share of the samples of cloud b; the first share holds all of a small
// cloud.
__global__ void __launch_bounds__(kThreadsMax)
    random_sample_kernel(const int64_t* __restrict__ key, const int64_t* __restrict__ lengths,
                         int64_t* __restrict__ indices, int64_t num_points, int64_t num_samples,
                         int64_t chunks) {
  AVATAR_SHARED(Permutation, permutation, 1);
  AVATAR_SHARED(uint8_t, order, kSmallCloud);
  AVATAR_SHARED(uint8_t, partner, kSmallCloud);
  const int64_t b = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  const int64_t length = lengths ? lengths[b] : num_points;
  AVATAR_DEVICE_ASSERT_VALUE(length >= 0 && length <= num_points,
                             "random_sample: lengths[%lld] = %lld; expected a number in [0, num_points = "
                             "%lld]",
                             static_cast<long long>(b), static_cast<long long>(length),
                             static_cast<long long>(num_points));
  const int64_t count = min(length, num_samples);
  const uint64_t cloud_key = mix(mix(static_cast<uint64_t>(*key) + kStep) + b);
  const bool small = length <= kSmallCloud;
  if (small && chunk == 0) {
    // A Fisher-Yates shuffle: what is swapped with what is found in parallel.
    for (int64_t i = threadIdx.x; i < length; i += blockDim.x) {
      const uint64_t hash = mix(cloud_key + kStep * (i + 1)) >> 32;
      partner[i] = static_cast<uint8_t>(i + static_cast<int64_t>(hash * (length - i) >> 32));
      order[i] = static_cast<uint8_t>(i);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int64_t i = 0; i < count; ++i) {
        const uint8_t taken = order[partner[i]];
        order[partner[i]] = order[i];
        order[i] = taken;
      }
    }
  } else if (!small) {
    if (threadIdx.x < kSampleRounds) {
      permutation[0].round_keys[threadIdx.x] = mix(cloud_key + kStep * (threadIdx.x + 1));
    } else if (threadIdx.x == kSampleRounds) {
      const uint32_t rows = ceil_sqrt(length);
      permutation[0].rows = rows;
      permutation[0].columns = static_cast<uint32_t>((length + rows - 1) / rows);
    }
  }
  __syncthreads();
  int64_t i = chunk * kPerThread * blockDim.x + threadIdx.x;
  for (int step = 0; step < kPerThread && i < num_samples; ++step, i += blockDim.x) {
    int64_t index = -1;
    if (i < count) index = small ? order[i] : permutation[0].image(i, length);
    indices[b * num_samples + i] = index;
  }
}

// key () int64, lengths (B,) int64 or none -> indices (B, num_samples).
Tensor random_sample_cuda(const Tensor& key, int64_t num_points, int64_t num_samples, int64_t batch,
                          const std::optional<Tensor>& lengths_in) {
  const torch::stable::accelerator::DeviceGuard guard(key.get_device_index());
  Tensor indices = torch::stable::new_empty(key, {batch, num_samples});
  std::optional<Tensor> lengths;
  if (lengths_in) lengths = as_contiguous(*lengths_in);
  const int64_t warps = divide_up(divide_up(num_samples, kPerThread), kWarpSize);
  const int64_t threads = std::clamp<int64_t>(warps * kWarpSize, kWarpSize, kThreadsMax);
  const int64_t chunks = divide_up(num_samples, threads * kPerThread);
  launch("random_sample", random_sample_kernel, grid_of(batch * chunks), dim3(threads), 0,
         current_stream(key), const_data<int64_t>(key), lengths ? const_data<int64_t>(*lengths) : nullptr,
         mutable_data<int64_t>(indices), num_points, num_samples, chunks);
  return indices;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avatar_ops, CUDA, m) {
  m.impl("random_sample", TORCH_BOX(&random_sample_cuda));
}

}  // namespace avatar
