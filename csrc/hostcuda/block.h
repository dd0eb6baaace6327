// One block of CUDA threads after the other, each thread a fiber. Threads run one at a time, until they wait
// at a barrier or a warp operation, in the order that AVATAR_HOSTCUDA_SEED chooses: 0 is ascending.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#include "vector_types.h"

namespace hostcuda {

constexpr int kWarpSize = 32;

// Where in the sources a thread waits.
struct Site {
  const char* file = nullptr;
  int line = 0;
  bool operator==(const Site& other) const { return line == other.line && file == other.file; }
};

// What all threads of the block hand to a barrier, summed up.
struct Votes {
  int threads = 0, nonzero = 0;
};
Votes block_barrier(bool vote, Site site);

// What the lanes of a warp operation hand in. An answer is worked out for each lane once all have come.
struct WarpCall {
  unsigned mask = 0;
  uint64_t values[kWarpSize] = {};
  int arguments[kWarpSize] = {};
  int width = kWarpSize;
};
struct Answer {
  uint64_t (*of)(const WarpCall& call, int lane);
  bool same_for_all = false;
};
uint64_t warp_call(unsigned mask, uint64_t value, int argument, int width, Answer answer, Site site);

// Shared memory of the running block, filled with 0xff bytes: NaN, or -1. `key` tells declarations apart.
void* shared_array(const void* key, size_t bytes, size_t alignment);
void* dynamic_shared();

// Lets other threads run first where the order is shuffled: between any two atomic operations they may.
void interleave();

// Ends the launch with an error that names the thread. From a kernel only.
[[noreturn]] void fail(const std::string& message);

// Runs `body` as every thread of the grid; `kernel` identifies it. Throws std::runtime_error, or what the
// kernel throws.
void launch(const void* kernel, const char* name, dim3 grid, dim3 block, size_t shared,
            const std::function<void()>& body);
void allow_dynamic_shared(const void* kernel, size_t bytes);

}  // namespace hostcuda

// What a kernel knows about itself.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
