#include <algorithm>

#include "common/cuda.cuh"

namespace avatar {
namespace {

constexpr int kThreads = 256;
// Outputs of a block, where its shared memory has room for what they need.
constexpr int64_t kTileOutputs = 1024, kTileWidth = 64, kTileOutputsMin = 64;

__host__ __device__ int64_t floor_divide(int64_t a, int64_t b) {
  return a / b - (a % b < 0);
}

// One axis: output o, tap t and sample i meet where t = o * down + taps - 1 - before - i * up.
struct Axis {
  int64_t size_in, size_out, up, down, before, taps;

  __device__ int64_t first_sample(int64_t output) const { return -floor_divide(before - output * down, up); }
  // The tap that meets a sample; the next sample meets that `up` lower.
  __device__ int64_t tap(int64_t output, int64_t sample) const {
    return output * down + taps - 1 - before - sample * up;
  }
  // Samples that `outputs` outputs in a row may meet.
  int64_t span(int64_t outputs) const { return ((outputs - 1) * down + taps - 1) / up + 1; }
};

// What a block computes: height * width outputs, both powers of two, of each of so many planes, from
// rows * columns samples of each.
struct Tile {
  int width, height, planes, rows, columns;
  int width_bits, height_bits;  // their logarithms
  int lanes;                    // threads that read a row of samples
  int taps;                     // of the filter as it is given
  bool separable;
  int64_t across, down;  // tiles of an image
};

// Which samples and taps an output meets first, along one axis: the sample from the tile's first on.
struct Start {
  int sample, tap;
};

template <typename A>
__device__ A fir(const A* samples, int stride, const A* taps, Start start, int up) {
  A sum = 0;
  samples += start.sample * stride;
  for (int tap = start.tap; tap >= 0; tap -= up, samples += stride) sum += taps[tap] * *samples;
  return sum;
}

template <typename T, typename A>
__global__ void __launch_bounds__(kThreads, 4)
    upfirdn2d_tile_kernel(const T* __restrict__ x, const A* __restrict__ f, T* __restrict__ y,
                          int64_t num_planes, Axis vertical, Axis horizontal, Tile tile, bool flip, A gain) {
  AVATAR_DYNAMIC_SHARED(Start, starts);
  Start* const starts_down = starts + tile.width;
  A* const taps = reinterpret_cast<A*>(starts_down + tile.height);
  A* const samples = taps + tile.taps;
  // For a separable filter, the samples filtered across: a column for each output.
  A* const filtered = samples + tile.planes * tile.rows * tile.columns;
  const int64_t block = blockIdx.x / tile.across;
  const int64_t first_x = blockIdx.x % tile.across * tile.width, first_y = block % tile.down * tile.height;
  const int64_t first_plane = block / tile.down * tile.planes;
  const int64_t first_column = horizontal.first_sample(first_x), first_row = vertical.first_sample(first_y);
  const int planes = static_cast<int>(min(num_planes - first_plane, int64_t(tile.planes)));
  const int up = static_cast<int>(horizontal.up);

  for (int i = threadIdx.x; i < tile.width + tile.height; i += kThreads) {
    const bool is_down = i >= tile.width;
    const Axis& axis = is_down ? vertical : horizontal;
    const int64_t output = is_down ? first_y + i - tile.width : first_x + i;
    const int64_t sample = axis.first_sample(output);
    starts[i] = {static_cast<int>(sample - (is_down ? first_row : first_column)),
                 static_cast<int>(axis.tap(output, sample))};
  }
  for (int i = threadIdx.x; i < tile.taps; i += kThreads) taps[i] = f[flip ? tile.taps - 1 - i : i];
  const int readers = kThreads / tile.lanes;
  for (int i = threadIdx.x / tile.lanes; i < planes * tile.rows; i += readers) {
    const int64_t plane = first_plane + i / tile.rows, row = first_row + i % tile.rows;
    const T* source = x + (plane * vertical.size_in + row) * horizontal.size_in;
    const bool inside = row >= 0 && row < vertical.size_in;
    for (int c = threadIdx.x % tile.lanes; c < tile.columns; c += tile.lanes) {
      const int64_t column = first_column + c;
      const bool found = inside && column >= 0 && column < horizontal.size_in;
      samples[i * tile.columns + c] = found ? static_cast<A>(source[column]) : A(0);
    }
  }
  __syncthreads();

  if (tile.separable) {
    for (int e = threadIdx.x; e < planes * tile.rows << tile.width_bits; e += kThreads) {
      const int column = e & (tile.width - 1), row = e >> tile.width_bits;
      filtered[e] = fir(samples + row * tile.columns, 1, taps, starts[column], up);
    }
    __syncthreads();
  }
  for (int e = threadIdx.x; e < planes << (tile.width_bits + tile.height_bits); e += kThreads) {
    const int column = e & (tile.width - 1), row = e >> tile.width_bits & (tile.height - 1);
    const int plane = e >> (tile.width_bits + tile.height_bits);
    if (first_x + column >= horizontal.size_out || first_y + row >= vertical.size_out) continue;
    Start start = starts_down[row];
    A sum = 0;
    if (tile.separable) {
      sum = fir(filtered + plane * tile.rows * tile.width + column, tile.width, taps, start, up);
    } else {
      const A* source = samples + (plane * tile.rows + start.sample) * tile.columns;
      for (; start.tap >= 0; start.tap -= up, source += tile.columns) {
        sum += fir(source, 1, taps + start.tap * horizontal.taps, starts[column], up);
      }
    }
    y[((first_plane + plane) * vertical.size_out + first_y + row) * horizontal.size_out + first_x + column] =
        static_cast<T>(gain * sum);
  }
}

// For what does not fit into shared memory: one thread an output.
template <typename T, typename A>
__global__ void __launch_bounds__(kThreads, 4)
    upfirdn2d_direct_kernel(const T* __restrict__ x, const A* __restrict__ f, T* __restrict__ y,
                            int64_t count, Axis vertical, Axis horizontal, bool separable, bool flip,
                            A gain) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (e >= count) return;
  const int64_t output_x = e % horizontal.size_out, row_out = e / horizontal.size_out;
  const int64_t output_y = row_out % vertical.size_out, plane = row_out / vertical.size_out;
  const T* image = x + plane * vertical.size_in * horizontal.size_in;
  const auto reversed = [flip](int64_t tap, const Axis& axis) { return flip ? axis.taps - 1 - tap : tap; };
  A sum = 0;
  int64_t row = vertical.first_sample(output_y);
  for (int64_t t = vertical.tap(output_y, row); t >= 0; t -= vertical.up, ++row) {
    if (row < 0 || row >= vertical.size_in) continue;
    const int64_t tap_down = reversed(t, vertical);
    A across = 0;
    int64_t column = horizontal.first_sample(output_x);
    for (int64_t s = horizontal.tap(output_x, column); s >= 0; s -= horizontal.up, ++column) {
      if (column < 0 || column >= horizontal.size_in) continue;
      const int64_t tap = reversed(s, horizontal);
      across += f[separable ? tap : tap_down * horizontal.taps + tap] *
                static_cast<A>(image[row * horizontal.size_in + column]);
    }
    sum += separable ? f[tap_down] * across : across;
  }
  y[e] = static_cast<T>(gain * sum);
}

template <typename A>
int64_t tile_bytes(int64_t width, int64_t height, int64_t planes, const Axis& vertical,
                   const Axis& horizontal, bool separable, int64_t taps) {
  const int64_t rows = vertical.span(height), columns = horizontal.span(width);
  const int64_t elements = taps + planes * rows * (columns + (separable ? width : 0));
  return static_cast<int64_t>(sizeof(Start)) * (width + height) + static_cast<int64_t>(sizeof(A)) * elements;
}

int logarithm(int64_t value) {
  int bits = 0;
  while (int64_t(1) << bits < value) ++bits;
  return bits;
}

// The tile for an image and its bytes of shared memory; none where even a small one is too large.
template <typename A>
std::optional<std::pair<Tile, size_t>> plan_tile(int64_t planes, const Axis& vertical, const Axis& horizontal,
                                                 bool separable, int64_t taps) {
  const auto bytes = [&](int64_t width, int64_t height, int64_t planes) {
    return tile_bytes<A>(width, height, planes, vertical, horizontal, separable, taps);
  };
  constexpr int64_t kLimit = kPlainSharedBytes;
  int64_t width = std::min(int64_t(1) << logarithm(horizontal.size_out), kTileWidth);
  int64_t height = std::min(int64_t(1) << logarithm(vertical.size_out), kTileOutputs / width);
  while (bytes(width, height, 1) > kLimit && width * height > kTileOutputsMin) {
    const bool narrower = bytes(width / 2, height, 1) < bytes(width, height / 2, 1);
    (height == 1 || (width > 1 && narrower) ? width : height) /= 2;
  }
  if (bytes(width, height, 1) > kLimit) return std::nullopt;
  int64_t together = std::min(planes, kTileOutputs / (width * height));
  while (together > 1 && bytes(width, height, together) > kLimit) together /= 2;
  Tile tile{};
  tile.width = static_cast<int>(width);
  tile.height = static_cast<int>(height);
  tile.planes = static_cast<int>(together);
  tile.rows = static_cast<int>(vertical.span(height));
  tile.columns = static_cast<int>(horizontal.span(width));
  tile.width_bits = logarithm(width);
  tile.height_bits = logarithm(height);
  tile.lanes = std::min(kWarpSize, 1 << logarithm(tile.columns));
  tile.taps = static_cast<int>(taps);
  tile.separable = separable;
  tile.across = divide_up(horizontal.size_out, width);
  tile.down = divide_up(vertical.size_out, height);
  return std::pair{tile, static_cast<size_t>(bytes(width, height, together))};
}

// x (B, C, H, W); f (fh, fw) or separable (f,), reversed first where flip is set -> (B, C, H', W').
Tensor upfirdn2d_cuda(const Tensor& x_in, const Tensor& f_in, int64_t up, int64_t down, int64_t x0,
                      int64_t x1, int64_t y0, int64_t y1, bool flip, double gain) {
  const torch::stable::accelerator::DeviceGuard guard(x_in.get_device_index());
  const Tensor x = as_contiguous(x_in);
  const Tensor f = to_compute(to_type(f_in, compute_type(x.scalar_type())));
  const bool separable = f.dim() == 1;
  const int64_t taps_down = f.size(0), taps_across = f.size(separable ? 0 : 1);
  const int64_t planes = x.size(0) * x.size(1), height = x.size(2), width = x.size(3);
  const int64_t height_out = floor_divide(height * up + y0 + y1 - taps_down, down) + 1;
  const int64_t width_out = floor_divide(width * up + x0 + x1 - taps_across, down) + 1;
  if (height_out < 0 || width_out < 0 || f.numel() == 0) {
    throw std::invalid_argument("upfirdn2d: the padded image is smaller than the filter");
  }
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1), height_out, width_out});
  if (y.numel() == 0) return y;
  const Axis vertical{height, height_out, up, down, y0, taps_down};
  const Axis horizontal{width, width_out, up, down, x0, taps_across};
  dispatch_floating(x.scalar_type(), "upfirdn2d", [&](auto zero) {
    using T = decltype(zero);
    using A = typename Accumulate<T>::type;
    const T* source = static_cast<const T*>(x.const_data_ptr());
    T* target = static_cast<T*>(y.mutable_data_ptr());
    if (const auto plan = plan_tile<A>(planes, vertical, horizontal, separable, f.numel())) {
      const auto& [tile, bytes] = *plan;
      launch("upfirdn2d", upfirdn2d_tile_kernel<T, A>,
             grid_of(divide_up(planes, tile.planes) * tile.across * tile.down), dim3(kThreads), bytes,
             current_stream(x), source, const_data<A>(f), target, planes, vertical, horizontal, tile, flip,
             static_cast<A>(gain));
    } else {
      launch("upfirdn2d", upfirdn2d_direct_kernel<T, A>, grid_of(divide_up(y.numel(), kThreads)),
             dim3(kThreads), 0, current_stream(x), source, const_data<A>(f), target, y.numel(), vertical,
             horizontal, separable, flip, static_cast<A>(gain));
    }
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avatar_ops, CUDA, m) {
  m.impl("upfirdn2d", TORCH_BOX(&upfirdn2d_cuda));
}

}  // namespace avatar
