// Threads without an element return in the broken kernel, though their block has a barrier to come.
#include "../program.cuh"

namespace {

constexpr int kThreads = 64;

__global__ void neighbor_kernel(const float* input, float* output, int count, bool broken) {
  AVATAR_SHARED(float, tile, kThreads);
  const int i = threadIdx.x;
  if (broken && i >= count) return;
  tile[i] = i < count ? input[i] : 0.f;
  __syncthreads();
  if (i < count) output[i] = tile[i] + (i > 0 ? tile[i - 1] : 0.f);
}

}  // namespace

int main(int arguments, char** texts) {
  return run_program([&] {
    const int count = kThreads - 5;
    Array<float> input(count, 1.f), output(count);
    avatar::launch("neighbor", neighbor_kernel, dim3(1), dim3(kThreads), 0, nullptr, input.data(),
                   output.data(), count, wants_broken(arguments, texts));
    finish();
    for (int i = 0; i < count; ++i) {
      if (output[i] != (i > 0 ? 2.f : 1.f)) return false;
    }
    return true;
  });
}
