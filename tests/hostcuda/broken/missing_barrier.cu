// Threads read what others of their block write, in the broken kernel without waiting for them.
#include "../program.cuh"

namespace {

constexpr int kThreads = 64;

__global__ void reverse_kernel(const int* input, int* output, bool broken) {
  AVATAR_SHARED(int, tile, kThreads);
  tile[threadIdx.x] = input[threadIdx.x];
  if (!broken) __syncthreads();
  output[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

}  // namespace

int main(int arguments, char** texts) {
  return run_program([&] {
    Array<int> input(kThreads), output(kThreads);
    for (int i = 0; i < kThreads; ++i) input[i] = i;
    avatar::launch("reverse", reverse_kernel, dim3(1), dim3(kThreads), 0, nullptr, input.data(),
                   output.data(), wants_broken(arguments, texts));
    finish();
    for (int i = 0; i < kThreads; ++i) {
      if (output[i] != kThreads - 1 - i) return false;
    }
    return true;
  });
}
