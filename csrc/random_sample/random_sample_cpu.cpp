#include <algorithm>
#include <cmath>
#include <numeric>

#include "common/tensor.h"
#include "random_sample/random_sample_simd.h"

namespace avatar {
namespace {

// Clouds up to this size are shuffled outright; larger ones go through the permutation network.
constexpr int64_t kSmallCloud = 64;
constexpr uint64_t kStep = 0x9E3779B97F4A7C15u;

// The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
uint64_t mix(uint64_t value) {
  value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9u;
  value = (value ^ value >> 27) * 0x94D049BB133111EBu;
  return value ^ value >> 31;
}

// The smallest integer whose square is at least value.
uint32_t ceil_sqrt(int64_t value) {
  int64_t root = static_cast<int64_t>(std::sqrt(static_cast<double>(value)));
  while (root * root < value) ++root;
  while (root > 0 && (root - 1) * (root - 1) >= value) --root;
  return static_cast<uint32_t>(root);
}

// The first `count` places of a Fisher-Yates shuffle.
void shuffle_small(uint64_t key, int64_t length, int64_t count, int64_t* indices) {
  int64_t order[kSmallCloud];
  std::iota(order, order + length, int64_t(0));
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t hash = mix(key + kStep * (i + 1)) >> 32;
    std::swap(order[i], order[i + static_cast<int64_t>(hash * (length - i) >> 32)]);
    indices[i] = order[i];
  }
}

// key () int64, lengths (B,) int64 or none -> indices (B, num_samples).
Tensor random_sample_cpu(const Tensor& key_in, int64_t num_points, int64_t num_samples, int64_t batch,
                         const std::optional<Tensor>& lengths_in) {
  Tensor indices = torch::stable::new_empty(key_in, {batch, num_samples});
  const uint64_t key = static_cast<uint64_t>(const_data<int64_t>(key_in)[0]);
  std::vector<int64_t> lengths(batch, num_points);
  if (lengths_in) {
    const Tensor values = as_contiguous(*lengths_in);
    std::copy_n(const_data<int64_t>(values), batch, lengths.begin());
  }
  for (int64_t b = 0; b < batch; ++b) {
    if (lengths[b] < 0 || lengths[b] > num_points) {
      throw std::invalid_argument(
          "random_sample: lengths[" + std::to_string(b) + "] = " + std::to_string(lengths[b]) +
          "; expected a number in [0, num_points = " + std::to_string(num_points) + "]");
    }
  }
  std::vector<RandomSampleArgs> clouds(batch);
  for (int64_t b = 0; b < batch; ++b) {
    const uint64_t cloud_key = mix(mix(key + kStep) + b);
    const int64_t length = lengths[b], count = std::min(length, num_samples);
    int64_t* row = mutable_data<int64_t>(indices) + b * num_samples;
    std::fill(row + count, row + num_samples, int64_t(-1));
    if (length <= kSmallCloud) {
      shuffle_small(cloud_key, length, count, row);
      continue;
    }
    RandomSampleArgs& args = clouds[b];
    for (int round = 0; round < kSampleRounds; ++round) {
      args.round_keys[round] = mix(cloud_key + kStep * (round + 1));
    }
    args.rows = ceil_sqrt(length);
    args.columns = static_cast<uint32_t>((length + args.rows - 1) / args.rows);
    args.length = length;
    args.indices = row;
  }
  torch::stable::parallel_for(0, batch * num_samples, 1 << 12, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t b = begin / num_samples, stop = std::min(end, (b + 1) * num_samples);
      const int64_t last = std::min(stop - b * num_samples, lengths[b]);
      if (lengths[b] > kSmallCloud) {
        AVATAR_ISA_CALL(random_sample_range, clouds[b], std::min(begin - b * num_samples, last), last);
      }
      begin = stop;
    }
  });
  return indices;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avatar_ops, CPU, m) {
  m.impl("random_sample", TORCH_BOX(&random_sample_cpu));
}

}  // namespace avatar
