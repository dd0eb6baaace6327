// The broken kernel reads one element past an array in shared memory: one of fixed size, or that of the
// launch.
#include "../program.cuh"

namespace {

constexpr int kThreads = 32;

template <bool kDynamic>
__global__ void next_kernel(int* output, bool broken) {
  AVATAR_SHARED(int, fixed, kThreads);
  AVATAR_DYNAMIC_SHARED(int, asked);
  int* const tile = kDynamic ? asked : fixed;
  tile[threadIdx.x] = threadIdx.x;
  __syncthreads();
  const unsigned next = threadIdx.x + 1;
  output[threadIdx.x] = tile[broken || next < kThreads ? next : 0];
}

}  // namespace

int main(int arguments, char** texts) {
  return run_program([&] {
    const bool broken = wants_broken(arguments, texts);
    const bool dynamic = arguments > 2 && std::strcmp(texts[2], "dynamic") == 0;
    Array<int> output(kThreads);
    avatar::launch("next", dynamic ? next_kernel<true> : next_kernel<false>, dim3(1), dim3(kThreads),
                   kThreads * sizeof(int), nullptr, output.data(), broken);
    finish();
    for (int i = 0; i < kThreads; ++i) {
      if (output[i] != (i + 1) % kThreads) return false;
    }
    return true;
  });
}
