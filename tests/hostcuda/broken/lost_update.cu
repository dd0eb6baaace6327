// Threads add to one element; the broken kernel reads, adds and stores, which loses nothing as long as
// threads run one after the other.
#include "../program.cuh"

namespace {

constexpr int kThreads = 64;

__global__ void count_kernel(int* output, bool broken) {
  if (broken) {
    output[0] += 1;
  } else {
    atomicAdd(output, 1);
  }
}

}  // namespace

int main(int arguments, char** texts) {
  return run_program([&] {
    Array<int> output(1);
    avatar::launch("count", count_kernel, dim3(2), dim3(kThreads), 0, nullptr, output.data(),
                   wants_broken(arguments, texts));
    finish();
    return output[0] == 2 * kThreads;
  });
}
