// Several threads, in several blocks, store to one element; the broken kernel without an atomic operation.
#include "../program.cuh"

namespace {

constexpr int kThreads = 64, kBlocks = 3;

__global__ void winner_kernel(int* output, bool broken) {
  const int value = blockIdx.x * kThreads + threadIdx.x;
  if (broken) {
    output[0] = value;
  } else {
    atomicMax(output, value);
  }
}

}  // namespace

int main(int arguments, char** texts) {
  return run_program([&] {
    Array<int> output(1);
    avatar::launch("winner", winner_kernel, dim3(kBlocks), dim3(kThreads), 0, nullptr, output.data(),
                   wants_broken(arguments, texts));
    finish();
    return output[0] == kBlocks * kThreads - 1;
  });
}
