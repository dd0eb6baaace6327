// The broken kernel reads past the end of an array in global memory, in the last block's surplus threads.
#include "../program.cuh"

namespace {

constexpr int kThreads = 32;

__global__ void double_kernel(const float* input, float* output, int count, bool broken) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  const float value = broken || i < count ? input[i] : 0.f;
  if (i < count) output[i] = 2 * value;
}

}  // namespace

int main(int arguments, char** texts) {
  return run_program([&] {
    const int count = 3 * kThreads - 7;
    Array<float> input(count, 1.f), output(count);
    avatar::launch("double", double_kernel, dim3(3), dim3(kThreads), 0, nullptr, input.data(), output.data(),
                   count, wants_broken(arguments, texts));
    finish();
    return std::all_of(output.data(), output.data() + count, [](float value) { return value == 2.f; });
  });
}
