// Half of the block waits at one barrier and half at another, in the broken kernel.
#include "../program.cuh"

namespace {

constexpr int kThreads = 64;

__global__ void halves_kernel(int* output, bool broken) {
  AVATAR_SHARED(int, tile, kThreads);
  if (threadIdx.x < kThreads / 2) {
    tile[threadIdx.x] = 1;
    if (broken) __syncthreads();
  } else {
    tile[threadIdx.x] = 2;
    if (broken) __syncthreads();
  }
  if (!broken) __syncthreads();
  output[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

}  // namespace

int main(int arguments, char** texts) {
  return run_program([&] {
    Array<int> output(kThreads);
    avatar::launch("halves", halves_kernel, dim3(1), dim3(kThreads), 0, nullptr, output.data(),
                   wants_broken(arguments, texts));
    finish();
    for (int i = 0; i < kThreads; ++i) {
      if (output[i] != (i < kThreads / 2 ? 2 : 1)) return false;
    }
    return true;
  });
}
