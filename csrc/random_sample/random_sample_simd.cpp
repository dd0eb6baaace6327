#include "random_sample/random_sample_simd.h"

#include <algorithm>

namespace avatar {
namespace AVATAR_ISA {
namespace {

constexpr int64_t kBlock = 256;

// The finaliser of MurmurHash3 (Appleby), keyed, then scaled to [0, size).
inline uint32_t keyed_hash(uint32_t value, uint64_t key, uint32_t size) {
  uint32_t hash = value + static_cast<uint32_t>(key);
  hash = (hash ^ hash >> 16) * 0x85EBCA6Bu;
  hash = (hash ^ hash >> 13) * 0xC2B2AE35u;
  hash = hash ^ hash >> 16 ^ static_cast<uint32_t>(key >> 32);
  return static_cast<uint64_t>(hash) * size >> 32;
}

inline uint32_t add_modulo(uint32_t a, uint32_t b, uint32_t size) {
  const uint32_t sum = a + b;
  return sum >= size ? sum - size : sum;
}

void permute(const RandomSampleArgs& args, uint32_t* left, uint32_t* right, int64_t count) {
  for (int round = 0; round < kSampleRounds; round += 2) {
    const uint64_t even = args.round_keys[round], odd = args.round_keys[round + 1];
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t l = add_modulo(left[i], keyed_hash(right[i], even, args.rows), args.rows);
      left[i] = l;
      right[i] = add_modulo(right[i], keyed_hash(l, odd, args.columns), args.columns);
    }
  }
}

}  // namespace

void random_sample_range(const RandomSampleArgs& args, int64_t begin, int64_t end) {
  uint32_t left[kBlock], right[kBlock];
  for (; begin < end; begin += kBlock) {
    const int64_t count = std::min(kBlock, end - begin);
    uint32_t l = static_cast<uint32_t>(begin / args.columns);
    uint32_t r = static_cast<uint32_t>(begin % args.columns);
    for (int64_t i = 0; i < count; ++i) {
      left[i] = l;
      right[i] = r;
      if (++r == args.columns) r = 0, ++l;
    }
    permute(args, left, right, count);
    for (int64_t i = 0; i < count; ++i) {
      int64_t index = static_cast<int64_t>(left[i]) * args.columns + right[i];
      // Cycle walking: images beyond the cloud are permuted again until one falls inside.
      while (index >= args.length) {
        permute(args, left + i, right + i, 1);
        index = static_cast<int64_t>(left[i]) * args.columns + right[i];
      }
      args.indices[begin + i] = index;
    }
  }
}

}  // namespace AVATAR_ISA
}  // namespace avatar
