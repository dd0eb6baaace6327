// Every emulated device function against what CUDA's documentation says of it. Each kernel writes what it
// gets, for one warp or block; the host works out what that has to be.
#include <mma.h>

#include <cmath>
#include <functional>
#include <string>

#include "program.cuh"

namespace {

using avatar::kWarpSize;
constexpr unsigned kAll = 0xffffffffu;
constexpr int kThreads = 96;

__global__ void shuffle_kernel(int* output, int width) {
  const int lane = threadIdx.x;
  const int value = 100 + lane;
  output[0 * kWarpSize + lane] = __shfl_sync(kAll, value, 5, width);
  output[1 * kWarpSize + lane] = __shfl_up_sync(kAll, value, 3, width);
  output[2 * kWarpSize + lane] = __shfl_down_sync(kAll, value, 3, width);
  output[3 * kWarpSize + lane] = __shfl_xor_sync(kAll, value, 6, width);
}

bool shuffles() {
  bool right = true;
  for (int width = 2; width <= kWarpSize; width *= 2) {
    Array<int> output(4 * kWarpSize);
    avatar::launch("shuffle", shuffle_kernel, dim3(1), dim3(kWarpSize), 0, nullptr, output.data(), width);
    finish();
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int begin = lane / width * width, end = begin + width;
      const int up = lane - 3 >= begin ? lane - 3 : lane;
      const int down = lane + 3 < end ? lane + 3 : lane;
      const int other = (lane ^ 6) < end ? lane ^ 6 : lane;
      const int expected[] = {begin + 5 % width, up, down, other};
      for (int kind = 0; kind < 4; ++kind) right &= output[kind * kWarpSize + lane] == 100 + expected[kind];
    }
  }
  return right;
}

template <typename T>
__global__ void shuffle_type_kernel(T* output) {
  const T value = static_cast<T>(threadIdx.x) * 3 - 7;
  output[threadIdx.x] = __shfl_sync(kAll, value, (threadIdx.x + 1) % kWarpSize);
}

template <typename T>
bool shuffles_type() {
  Array<T> output(kWarpSize);
  avatar::launch("shuffle_type", shuffle_type_kernel<T>, dim3(1), dim3(kWarpSize), 0, nullptr, output.data());
  finish();
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (output[lane] != static_cast<T>((lane + 1) % kWarpSize) * 3 - 7) return false;
  }
  return true;
}

// Two halves of a warp, each on a way of its own, with a mask of its own.
__global__ void halves_kernel(int* output) {
  const int lane = threadIdx.x;
  int value = lane;
  if (lane < 16) {
    for (int step = 8; step > 0; step /= 2) value += __shfl_xor_sync(0x0000ffffu, value, step);
  } else {
    for (int step = 8; step > 0; step /= 2) value = max(value, __shfl_xor_sync(0xffff0000u, value, step));
  }
  __syncwarp();
  output[lane] = value;
}

bool halves() {
  Array<int> output(kWarpSize);
  avatar::launch("halves", halves_kernel, dim3(1), dim3(kWarpSize), 0, nullptr, output.data());
  finish();
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (output[lane] != (lane < 16 ? 120 : 31)) return false;
  }
  return true;
}

__global__ void vote_kernel(unsigned* output) {
  const unsigned lane = threadIdx.x;
  output[0 * kWarpSize + lane] = __ballot_sync(kAll, lane % 3 == 0);
  output[1 * kWarpSize + lane] = __all_sync(kAll, lane < 32);
  output[2 * kWarpSize + lane] = __all_sync(kAll, lane < 31);
  output[3 * kWarpSize + lane] = __any_sync(kAll, lane == 31);
  output[4 * kWarpSize + lane] = __any_sync(kAll, lane == 32);
  output[5 * kWarpSize + lane] = __match_any_sync(kAll, static_cast<int>(lane % 4));
}

bool votes() {
  Array<unsigned> output(6 * kWarpSize);
  avatar::launch("vote", vote_kernel, dim3(1), dim3(kWarpSize), 0, nullptr, output.data());
  finish();
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const unsigned expected[] = {0x49249249u, 1, 0, 1, 0, 0x11111111u << lane % 4};
    for (int kind = 0; kind < 6; ++kind) {
      if (output[kind * kWarpSize + lane] != expected[kind]) return false;
    }
  }
  return true;
}

#if !defined(__CUDACC__) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
__global__ void reduce_kernel(int* output, unsigned mask) {
  const int lane = threadIdx.x;
  if (!(mask >> lane & 1)) return;
  const int value = lane - 10;
  const unsigned bits = 1u << lane;
  output[0 * kWarpSize + lane] = __reduce_add_sync(mask, value);
  output[1 * kWarpSize + lane] = __reduce_min_sync(mask, value);
  output[2 * kWarpSize + lane] = __reduce_max_sync(mask, value);
  output[3 * kWarpSize + lane] = static_cast<int>(__reduce_max_sync(mask, static_cast<unsigned>(value)));
  output[4 * kWarpSize + lane] = static_cast<int>(__reduce_and_sync(mask, ~bits));
  output[5 * kWarpSize + lane] = static_cast<int>(__reduce_or_sync(mask, bits));
  output[6 * kWarpSize + lane] = static_cast<int>(__reduce_xor_sync(mask, bits | 1u));
}
#endif

bool reductions() {
  const unsigned mask = 0x00ff0ff0u;
  Array<int> output(7 * kWarpSize);
  avatar::launch("reduce", reduce_kernel, dim3(1), dim3(kWarpSize), 0, nullptr, output.data(), mask);
  finish();
  int sum = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) sum += mask >> lane & 1 ? lane - 10 : 0;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const int expected[] = {
        sum, -6, 13, -1, static_cast<int>(~mask), static_cast<int>(mask), static_cast<int>(mask)};
    for (int kind = 0; kind < 7; ++kind) {
      if (output[kind * kWarpSize + lane] != expected[kind]) return false;
    }
  }
  return true;
}

__global__ void block_vote_kernel(int* output) {
  const int i = threadIdx.x;
  output[0 * kThreads + i] = __syncthreads_count(i % 3 == 0);
  output[1 * kThreads + i] = __syncthreads_and(i >= 0);
  output[2 * kThreads + i] = __syncthreads_and(i > 0);
  output[3 * kThreads + i] = __syncthreads_or(i == kThreads - 1);
  output[4 * kThreads + i] = __syncthreads_or(i == kThreads);
}

bool block_votes() {
  Array<int> output(5 * kThreads);
  avatar::launch("block_vote", block_vote_kernel, dim3(1), dim3(kThreads), 0, nullptr, output.data());
  finish();
  const int expected[] = {kThreads / 3, 1, 0, 1, 0};
  for (int kind = 0; kind < 5; ++kind) {
    for (int i = 0; i < kThreads; ++i) {
      if ((output[kind * kThreads + i] != 0) != (expected[kind] != 0)) return false;
      if (kind == 0 && output[i] != expected[0]) return false;
    }
  }
  return true;
}

// Tiles of the launch's shared bytes and of fixed size, used in turn; a block of two dimensions.
__global__ void transpose_kernel(const float* input, float* output, int size) {
  AVATAR_DYNAMIC_SHARED(float, tile);
  using Row = double[3];
  AVATAR_SHARED(Row, copy, 64);
  const int x = threadIdx.x, y = threadIdx.y, flat = y * size + x;
  tile[flat] = input[blockIdx.x * size * size + flat];
  for (int column = 0; column < 3; ++column) copy[flat][column] = column;
  __syncthreads();
  output[blockIdx.x * size * size + flat] =
      tile[x * size + y] + static_cast<float>(copy[63 - flat][0] + copy[63 - flat][2]);
}

bool shared_memory() {
  const int size = 8, blocks = 3;
  Array<float> input(blocks * size * size), output(blocks * size * size);
  for (size_t i = 0; i < input.size(); ++i) input[i] = static_cast<float>(i);
  avatar::launch("transpose", transpose_kernel, dim3(blocks), dim3(size, size), size * size * sizeof(float),
                 nullptr, input.data(), output.data(), size);
  finish();
  for (int b = 0; b < blocks; ++b) {
    for (int y = 0; y < size; ++y) {
      for (int x = 0; x < size; ++x) {
        if (output[(b * size + y) * size + x] != input[(b * size + x) * size + y] + 2) return false;
      }
    }
  }
  return true;
}

__global__ void large_shared_kernel(unsigned char* output, int bytes) {
  AVATAR_DYNAMIC_SHARED(unsigned char, memory);
  for (int i = threadIdx.x; i < bytes; i += blockDim.x) memory[i] = static_cast<unsigned char>(i % 251);
  __syncthreads();
  for (int i = threadIdx.x; i < bytes; i += blockDim.x) output[i] = memory[bytes - 1 - i];
}

bool large_shared_memory() {
  const int bytes = 100 << 10;
  Array<unsigned char> output(bytes);
  avatar::launch("large_shared", large_shared_kernel, dim3(1), dim3(kThreads), bytes, nullptr, output.data(),
                 bytes);
  finish();
  for (int i = 0; i < bytes; ++i) {
    if (output[i] != (bytes - 1 - i) % 251) return false;
  }
  return true;
}

struct Counters {
  int sum, least, greatest, last_bits, any_bits, odd_bits;
  unsigned long long wide;
  float real;
  double precise;
  unsigned slots;
};

__global__ void atomic_kernel(Counters* counters, int* taken) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  atomicAdd(&counters->sum, i);
  atomicMin(&counters->least, -i);
  atomicMax(&counters->greatest, i);
  atomicAnd(&counters->last_bits, ~(i & 3));
  atomicOr(&counters->any_bits, i);
  atomicXor(&counters->odd_bits, i);
  atomicAdd(&counters->wide, 1ull << 40);
  atomicAdd(&counters->real, 0.5f);
  atomicAdd(&counters->precise, 0.25);
  taken[atomicAdd(&counters->slots, 1u)] = i;
}

bool atomics() {
  const int blocks = 4, count = blocks * kThreads;
  Array<Counters> counters(1, Counters{0, 0, 0, -1, 0, 0, 0, 0, 0, 0});
  Array<int> taken(count, -1);
  avatar::launch("atomic", atomic_kernel, dim3(blocks), dim3(kThreads), 0, nullptr, counters.data(),
                 taken.data());
  finish();
  int odd = 0;
  for (int i = 0; i < count; ++i) odd ^= i;
  std::sort(taken.data(), taken.data() + count);
  for (int i = 0; i < count; ++i) {
    if (taken[i] != i) return false;
  }
  const Counters& c = counters[0];
  return c.sum == count * (count - 1) / 2 && c.least == 1 - count && c.greatest == count - 1 &&
         c.last_bits == ~3 && c.any_bits == 511 && c.odd_bits == odd && c.wide == (1ull << 40) * count &&
         c.real == 0.5f * count && c.precise == 0.25 * count && c.slots == count;
}

// A lock-free maximum of floats by compare-and-swap, and exchanges.
__global__ void swap_kernel(int* best, int* chain, int* seen) {
  const float value = static_cast<float>((threadIdx.x * 37) % kThreads);
  int old = atomicAdd(best, 0);
  while (__int_as_float(old) < value) {
    const int before = atomicCAS(best, old, __float_as_int(value));
    if (before == old) break;
    old = before;
  }
  seen[threadIdx.x] = atomicExch(chain, static_cast<int>(threadIdx.x));
}

bool swaps() {
  Array<int> best(1), chain(1, -1), seen(kThreads);
  avatar::launch("swap", swap_kernel, dim3(1), dim3(kThreads), 0, nullptr, best.data(), chain.data(),
                 seen.data());
  finish();
  float greatest;
  std::memcpy(&greatest, best.data(), sizeof greatest);
  std::vector<int> all(seen.data(), seen.data() + kThreads);
  all.push_back(chain[0]);
  std::sort(all.begin(), all.end());
  for (int i = 0; i <= kThreads; ++i) {
    if (all[i] != i - 1) return false;
  }
  return greatest == kThreads - 1;
}

__global__ void arithmetic_kernel(double* output, const float* input, const float4* vectors) {
  const float x = __ldg(input);
  const float4 v = __ldg(vectors);
  const double results[] = {
      rsqrtf(x),
      rsqrt(4.0 * x),
      __expf(x),
      __logf(x),
      __fmaf_rn(x, x, x),
      __fma_rn(x, x, 1.0),
      __fmul_rn(x, x),
      __fadd_rn(x, x),
      __fdividef(x, 2),
      __saturatef(x),
      v.x + v.y + v.z + v.w,
      min(x, 3.f),
      max(x, 5.f),
      static_cast<double>(min(7, 9)),
      static_cast<double>(max(3u, 8u)),
      static_cast<double>(__popc(0xf0f0u)),
      static_cast<double>(__popcll(~0ull)),
      static_cast<double>(__clz(1)),
      static_cast<double>(__clzll(1)),
      static_cast<double>(__ffs(8)),
      static_cast<double>(__brev(1u)),
      static_cast<double>(__umulhi(1u << 31, 6u)),
      static_cast<double>(__float2int_rn(2.5f)),
      static_cast<double>(__float2int_rd(-2.5f)),
      __uint_as_float(__float_as_uint(x)),
      __longlong_as_double(__double_as_longlong(x)),
      static_cast<double>(__umul64hi(1ull << 63, 10ull)),
  };
  for (int i = 0; i < static_cast<int>(sizeof results / sizeof results[0]); ++i) output[i] = results[i];
}

bool arithmetic() {
  const double expected[] = {0.5,
                             0.25,
                             std::exp(4.0),
                             std::log(4.0),
                             20,
                             17,
                             16,
                             8,
                             2,
                             1,
                             10,
                             3,
                             5,
                             7,
                             8,
                             8,
                             64,
                             31,
                             63,
                             4,
                             2147483648.0,
                             3,
                             2,
                             -3,
                             4,
                             4,
                             5};
  const size_t count = sizeof expected / sizeof expected[0];
  Array<double> output(count);
  Array<float> input(1, 4.f);
  Array<float4> vectors(1, make_float4(1, 2, 3, 4));
  avatar::launch("arithmetic", arithmetic_kernel, dim3(1), dim3(1), 0, nullptr, output.data(), input.data(),
                 vectors.data());
  finish();
  for (size_t i = 0; i < count; ++i) {
    if (!(std::fabs(output[i] - expected[i]) <= 1e-5 * std::fabs(expected[i]))) return false;
  }
  return true;
}

__global__ void index_kernel(int* output) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  atomicAdd(output + block * blockDim.x * blockDim.y * blockDim.z + thread, 1);
}

bool indices() {
  const dim3 grid(3, 2, 4), block(5, 2, 3);
  Array<int> output(24 * 30);
  avatar::launch("index", index_kernel, grid, block, 0, nullptr, output.data());
  avatar::launch("index", index_kernel, dim3(0), block, 0, nullptr, output.data());
  finish();
  return std::all_of(output.data(), output.data() + output.size(), [](int visits) { return visits == 1; });
}

__global__ void block_sum_kernel(float* output) {
  const float first = avatar::block_sum(static_cast<float>(threadIdx.x));
  const float second = avatar::block_sum(first);
  output[threadIdx.x] = second;
}

bool block_sums() {
  Array<float> output(kThreads);
  avatar::launch("block_sum", block_sum_kernel, dim3(1), dim3(kThreads), 0, nullptr, output.data());
  finish();
  const float expected = kThreads * (kThreads * (kThreads - 1) / 2.f);
  return std::all_of(output.data(), output.data() + kThreads, [&](float sum) { return sum == expected; });
}

#if !defined(__CUDACC__) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
// Two warps, each a product of its own: 3 (A B + C), by rows or by columns in memory.
template <typename LayoutA, typename LayoutB>
__global__ void matrix_kernel(const float* a, const float* b, float* output, int pitch, bool by_rows) {
  namespace wmma = nvcuda::wmma;
  wmma::fragment<wmma::matrix_a, 16, 16, 8, wmma::precision::tf32, LayoutA> rows;
  wmma::fragment<wmma::matrix_b, 16, 16, 8, wmma::precision::tf32, LayoutB> columns;
  wmma::fragment<wmma::accumulator, 16, 16, 8, float> sums, doubled;
  const int warp = threadIdx.x / kWarpSize;
  wmma::fill_fragment(sums, 100.f);
  wmma::load_matrix_sync(rows, a, pitch);
  wmma::load_matrix_sync(columns, b + warp * 16 * pitch, pitch);
  wmma::mma_sync(sums, rows, columns, sums);
  wmma::mma_sync(doubled, rows, columns, sums);
  for (int i = 0; i < static_cast<int>(sums.num_elements); ++i) sums.x[i] += doubled.x[i];
  wmma::store_matrix_sync(output + warp * 16 * pitch, sums, pitch,
                          by_rows ? wmma::mem_row_major : wmma::mem_col_major);
}
#endif

template <typename LayoutA, typename LayoutB>
bool multiplies(bool a_by_rows, bool b_by_rows, bool by_rows) {
  const int pitch = 20;
  Array<float> a(16 * pitch), b(32 * pitch), output(32 * pitch, -1.f);
  for (size_t i = 0; i < a.size(); ++i) a[i] = static_cast<float>(i * 37 % 101) - 50;
  for (size_t i = 0; i < b.size(); ++i) b[i] = static_cast<float>(i * 53 % 97) / 8;
  avatar::launch("matrix", matrix_kernel<LayoutA, LayoutB>, dim3(1), dim3(2 * kWarpSize), 0, nullptr,
                 a.data(), b.data(), output.data(), pitch, by_rows);
  finish();
  const auto place = [&](int row, int column, bool rows) {
    return rows ? row * pitch + column : column * pitch + row;
  };
  for (int warp = 0; warp < 2; ++warp) {
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 16; ++column) {
        float product = 0;
        for (int k = 0; k < 8; ++k)
          product += a[place(row, k, a_by_rows)] * b[warp * 16 * pitch + place(k, column, b_by_rows)];
        if (output[warp * 16 * pitch + place(row, column, by_rows)] != 3 * product + 200) return false;
      }
    }
  }
  return true;
}

bool multiplies_matrices() {
  using nvcuda::wmma::col_major;
  using nvcuda::wmma::row_major;
  bool right = true;
  for (const bool by_rows : {false, true}) {
    right &= multiplies<row_major, row_major>(true, true, by_rows);
    right &= multiplies<row_major, col_major>(true, false, by_rows);
    right &= multiplies<col_major, row_major>(false, true, by_rows);
    right &= multiplies<col_major, col_major>(false, false, by_rows);
  }
  return right;
}

bool refuses(dim3 block, size_t shared) {
  try {
    Array<int> output(1024);
    avatar::launch("index", index_kernel, dim3(1), block, shared, nullptr, output.data());
  } catch (const std::runtime_error&) {
    return true;
  }
  return false;
}

bool refuses_what_no_device_takes() {
  return refuses(dim3(1025), 0) && refuses(dim3(8, 16, 16), 0) && refuses(dim3(32), 300 << 10);
}

}  // namespace

int main() {
  const std::pair<const char*, std::function<bool()>> checks[] = {
      {"shuffles", shuffles},
      {"shuffles of unsigned", shuffles_type<unsigned>},
      {"shuffles of int64", shuffles_type<long long>},
      {"shuffles of float", shuffles_type<float>},
      {"shuffles of double", shuffles_type<double>},
      {"halves", halves},
      {"votes", votes},
      {"reductions", reductions},
      {"block votes", block_votes},
      {"shared memory", shared_memory},
      {"large shared memory", large_shared_memory},
      {"atomics", atomics},
      {"compare and swap", swaps},
      {"arithmetic", arithmetic},
      {"indices", indices},
      {"block sums", block_sums},
      {"matrices", multiplies_matrices},
      {"refusals", refuses_what_no_device_takes},
  };
  return run_program([&] {
    bool right = true;
    for (const auto& [name, check] : checks) {
      const bool passed = check();
      std::printf("%s: %s\n", name, passed ? "right" : "wrong");
      right &= passed;
    }
    return right;
  });
}
