// A product on matrix units whose operand is, in the broken kernel, not rounded to TensorFloat-32 before.
#include <mma.h>

#include "../program.cuh"

namespace {

namespace wmma = nvcuda::wmma;

__global__ void product_kernel(const float* operand, float* output) {
  wmma::fragment<wmma::matrix_a, 16, 16, 8, wmma::precision::tf32, wmma::row_major> rows;
  wmma::fragment<wmma::matrix_b, 16, 16, 8, wmma::precision::tf32, wmma::col_major> columns;
  wmma::fragment<wmma::accumulator, 16, 16, 8, float> sums;
  wmma::fill_fragment(sums, 0.f);
  wmma::load_matrix_sync(rows, operand, 8);
  wmma::load_matrix_sync(columns, operand, 8);
  wmma::mma_sync(sums, rows, columns, sums);
  wmma::store_matrix_sync(output, sums, 16, wmma::mem_row_major);
}

}  // namespace

int main(int arguments, char** texts) {
  return run_program([&] {
    const float value = wants_broken(arguments, texts) ? 1.f / 3 : 0.375f;
    Array<float> operand(16 * 8, value), output(16 * 16);
    avatar::launch("product", product_kernel, dim3(1), dim3(avatar::kWarpSize), 0, nullptr, operand.data(),
                   output.data());
    finish();
    return std::all_of(output.data(), output.data() + output.size(),
                       [&](float sum) { return sum == 8 * value * value; });
  });
}
