// The broken kernel is given an index out of range, which it checks.
#include "../program.cuh"

namespace {

__global__ void gather_kernel(const float* input, const int64_t* indices, float* output, int64_t size) {
  const int64_t index = indices[threadIdx.x];
  AVATAR_DEVICE_ASSERT(index >= 0 && index < size, "indices[%u] = %lld; expected an index in [0, %lld)",
                       threadIdx.x, static_cast<long long>(index), static_cast<long long>(size));
  output[threadIdx.x] = input[index];
}

}  // namespace

int main(int arguments, char** texts) {
  return run_program([&] {
    Array<float> input(8, 1.f), output(4);
    Array<int64_t> indices(4, 3);
    if (wants_broken(arguments, texts)) indices[2] = 8;
    avatar::launch("gather", gather_kernel, dim3(1), dim3(4), 0, nullptr, input.data(), indices.data(),
                   output.data(), int64_t{8});
    finish();
    return std::all_of(output.data(), output.data() + 4, [](float value) { return value == 1.f; });
  });
}
