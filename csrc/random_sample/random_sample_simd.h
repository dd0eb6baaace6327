// Inner loop of random_sample, built once per instruction set.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace avatar {

// Rounds of the permutation network: the fewest that pass the statistical tests, and half as many again.
constexpr int kSampleRounds = 12;

struct RandomSampleArgs {
  uint64_t round_keys[kSampleRounds];
  // Indices are written as left * columns + right; rows * columns >= length, both about its square root.
  uint32_t rows, columns;
  int64_t length;    // of the cloud
  int64_t* indices;  // (num_samples)
};

// The images of [begin, end) under the permutation of [0, length).
#define AVATAR_DECLARE(ISA)                                                           \
  namespace ISA {                                                                     \
  void random_sample_range(const RandomSampleArgs& args, int64_t begin, int64_t end); \
  }
AVATAR_FOR_EACH_ISA(AVATAR_DECLARE)
#undef AVATAR_DECLARE

}  // namespace avatar
