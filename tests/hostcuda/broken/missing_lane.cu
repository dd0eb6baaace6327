// A shuffle of the whole warp, which one lane does not take part in, in the broken kernel.
#include "../program.cuh"

namespace {

__global__ void sum_kernel(int* output, bool broken) {
  int value = 1;
  if (broken && threadIdx.x == 7) return;
  for (int step = avatar::kWarpSize / 2; step > 0; step /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, step);
  output[threadIdx.x] = value;
}

}  // namespace

int main(int arguments, char** texts) {
  return run_program([&] {
    Array<int> output(avatar::kWarpSize);
    avatar::launch("sum", sum_kernel, dim3(1), dim3(avatar::kWarpSize), 0, nullptr, output.data(),
                   wants_broken(arguments, texts));
    finish();
    return std::all_of(output.data(), output.data() + output.size(), [](int sum) { return sum == 32; });
  });
}
