// The broken kernel writes one element past an array in shared memory.
#include "../program.cuh"

namespace {

constexpr int kThreads = 32;

__global__ void shift_kernel(int* output, bool broken) {
  AVATAR_DYNAMIC_SHARED(int, tile);
  const int next = threadIdx.x + 1;
  tile[broken ? next : next % kThreads] = next;
  __syncthreads();
  output[threadIdx.x] = tile[next % kThreads];
}

}  // namespace

int main(int arguments, char** texts) {
  return run_program([&] {
    Array<int> output(kThreads);
    avatar::launch("shift", shift_kernel, dim3(1), dim3(kThreads), kThreads * sizeof(int), nullptr,
                   output.data(), wants_broken(arguments, texts));
    finish();
    for (int i = 0; i < kThreads; ++i) {
      if (output[i] != i + 1) return false;
    }
    return true;
  });
}
