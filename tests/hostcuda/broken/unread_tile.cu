// A tile is filled again and again; the broken kernel does not wait until every thread has read it.
#include "../program.cuh"

namespace {

constexpr int kThreads = 64, kTiles = 4;

__global__ void sum_first_kernel(const int* input, int* output, bool broken) {
  AVATAR_SHARED(int, first, 1);
  int sum = 0;
  for (int tile = 0; tile < kTiles; ++tile) {
    if (threadIdx.x == kThreads - 1) first[0] = input[tile];
    __syncthreads();
    sum += first[0];
    if (!broken) __syncthreads();
  }
  output[threadIdx.x] = sum;
}

}  // namespace

int main(int arguments, char** texts) {
  return run_program([&] {
    Array<int> input(kTiles), output(kThreads);
    for (int i = 0; i < kTiles; ++i) input[i] = 1 << i;
    avatar::launch("sum_first", sum_first_kernel, dim3(1), dim3(kThreads), 0, nullptr, input.data(),
                   output.data(), wants_broken(arguments, texts));
    finish();
    for (int i = 0; i < kThreads; ++i) {
      if (output[i] != (1 << kTiles) - 1) return false;
    }
    return true;
  });
}
