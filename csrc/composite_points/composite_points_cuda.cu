#include <algorithm>

#include "common/reverse_adjacency.cuh"

namespace avatar {
namespace {

constexpr int kThreads = 256;
// Channels of a thread.
constexpr int kChannels = 4;
// Slots whose features a thread fetches before it uses the first.
constexpr int kAhead = 4;

// How a block covers pixels and channels: `lanes` neighbouring threads share a pixel, each with kChannels
// channels, so that features are read in rows; images, in planes, are read and written through a tile in
// shared memory, whose row is kChannels * lanes channels high and block_pixels wide, one more against bank
// conflicts.
struct Layout {
  int64_t num_points, channels, pixels, slots;
  int lanes, block_pixels;
  int64_t pixel_blocks, channel_blocks;  // of an image
  bool vectors;                          // rows of features may be read kChannels at a time

  Layout(int64_t num_points, int64_t channels, int64_t pixels, int64_t slots)
      : num_points(num_points), channels(channels), pixels(pixels), slots(slots), lanes(1), vectors(false) {
    while (lanes < kWarpSize && kChannels * lanes < channels) lanes *= 2;
    block_pixels = std::max(kWarpSize, kThreads / lanes);
    pixel_blocks = divide_up(pixels, block_pixels);
    channel_blocks = std::max<int64_t>(1, divide_up(channels, kChannels * lanes));
  }

  template <typename A>
  size_t tile_bytes() const {
    return sizeof(A) * kChannels * lanes * (block_pixels + 1);
  }

  // The tile's row for the v-th channel of a lane; lanes come one after another.
  __device__ int row(int lane, int v) const { return v * lanes + lane; }
  // The channel, counted from the tile's first, in a row.
  __device__ int64_t channel(int row) const { return kChannels * (row % lanes) + row / lanes; }
};

template <typename T>
struct alignas(kChannels * sizeof(T) > 16 ? 16 : kChannels * sizeof(T)) ChannelGroup {
  T values[kChannels];
};

// Channels [channel, channel + kChannels) of a row, zeros beyond its end.
template <typename T, typename A>
__device__ void load_channels(const T* __restrict__ row, int64_t channel, const Layout& layout,
                              A (&values)[kChannels]) {
  if (layout.vectors) {
    ChannelGroup<T> group{};
    if (channel < layout.channels) group = *reinterpret_cast<const ChannelGroup<T>*>(row + channel);
    for (int v = 0; v < kChannels; ++v) values[v] = static_cast<A>(group.values[v]);
    return;
  }
  for (int v = 0; v < kChannels; ++v) {
    values[v] = channel + v < layout.channels ? static_cast<A>(row[channel + v]) : A(0);
  }
}

__device__ int64_t checked_index(const int64_t* __restrict__ indices, int64_t slot, const Layout& layout,
                                 int64_t width) {
  const int64_t index = indices[slot], row = slot / layout.slots / width;
  AVATAR_DEVICE_ASSERT(index >= -1 && index < layout.num_points,
                       "composite_points: fragments.indices[%lld, %lld, %lld, %lld] = %lld; expected -1 "
                       "(none) or an index in [0, %lld)",
                       static_cast<long long>(row / (layout.pixels / width)),
                       static_cast<long long>(row % (layout.pixels / width)),
                       static_cast<long long>(slot / layout.slots % width),
                       static_cast<long long>(slot % layout.slots), static_cast<long long>(index),
                       static_cast<long long>(layout.num_points));
  return index;
}

// indices, alphas (B, pixels, slots), features (B, N, C) -> image (B, C, pixels), opacity (B, pixels).
template <typename T, typename A>
__global__ void __launch_bounds__(kThreads, 2)
    composite_kernel(const int64_t* __restrict__ indices, const T* __restrict__ features,
                     const T* __restrict__ alphas, T* __restrict__ image, T* __restrict__ opacities,
                     int64_t width, Layout layout) {
  AVATAR_DYNAMIC_SHARED(A, tile);
  const int stride = layout.block_pixels + 1;
  const int64_t channel_block = blockIdx.x % layout.channel_blocks,
                block = blockIdx.x / layout.channel_blocks;
  const int64_t b = block / layout.pixel_blocks;
  const int64_t first_pixel = block % layout.pixel_blocks * layout.block_pixels;
  const int64_t first_channel = channel_block * kChannels * layout.lanes;
  const int lane = threadIdx.x % layout.lanes;
  const T* cloud = features + b * layout.num_points * layout.channels;
  for (int p = threadIdx.x / layout.lanes; p < layout.block_pixels; p += kThreads / layout.lanes) {
    if (first_pixel + p >= layout.pixels) break;
    const int64_t pixel = b * layout.pixels + first_pixel + p, end = (pixel + 1) * layout.slots;
    A sums[kChannels] = {}, through = 1, opacity = 0;
    for (int64_t first = pixel * layout.slots; first < end; first += kAhead) {
      int64_t found[kAhead];
      A weights[kAhead], values[kAhead][kChannels];
#pragma unroll
      for (int s = 0; s < kAhead; ++s) {
        const int64_t slot = first + s;
        found[s] = slot < end ? checked_index(indices, slot, layout, width) : -1;
        const A alpha = found[s] >= 0 ? static_cast<A>(alphas[slot]) : A(0);
        weights[s] = alpha * through;
        opacity += weights[s];
        through *= A(1) - alpha;
      }
#pragma unroll
      for (int s = 0; s < kAhead; ++s) {
        if (found[s] < 0) continue;
        load_channels(cloud + found[s] * layout.channels, first_channel + kChannels * lane, layout,
                      values[s]);
      }
#pragma unroll
      for (int s = 0; s < kAhead; ++s) {
        if (found[s] < 0) continue;
        for (int v = 0; v < kChannels; ++v) sums[v] += weights[s] * values[s][v];
      }
    }
    for (int v = 0; v < kChannels; ++v) tile[layout.row(lane, v) * stride + p] = sums[v];
    if (lane == 0 && channel_block == 0) opacities[pixel] = static_cast<T>(opacity);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < kChannels * layout.lanes * layout.block_pixels; e += kThreads) {
    const int p = e % layout.block_pixels, row = e / layout.block_pixels;
    const int64_t channel = first_channel + layout.channel(row);
    if (channel >= layout.channels || first_pixel + p >= layout.pixels) continue;
    image[(b * layout.channels + channel) * layout.pixels + first_pixel + p] =
        static_cast<T>(tile[row * stride + p]);
  }
}

// Fills the tile with a block's part of an image (B, C, pixels), zeros beyond it.
template <typename T, typename A>
__device__ void load_tile(const T* __restrict__ image, int64_t b, int64_t first_pixel, int64_t first_channel,
                          const Layout& layout, A* tile) {
  for (int e = threadIdx.x; e < kChannels * layout.lanes * layout.block_pixels; e += kThreads) {
    const int p = e % layout.block_pixels, row = e / layout.block_pixels;
    const int64_t channel = first_channel + layout.channel(row);
    const bool inside = channel < layout.channels && first_pixel + p < layout.pixels;
    tile[row * (layout.block_pixels + 1) + p] =
        inside ? static_cast<A>(image[(b * layout.channels + channel) * layout.pixels + first_pixel + p])
               : A(0);
  }
}

// With s the product of a slot's feature and the gradients, t what the slots in front let through and R the
// weighted sum of s over the slots behind, the gradient of an alpha is t (s - R). Nothing is divided by
// 1 - alpha, so it holds at alpha = 1 too. products (B, pixels, slots) is for s; it may be grad_alphas.
template <typename T, typename A>
__global__ void __launch_bounds__(kThreads, 2)
    composite_alphas_kernel(const T* __restrict__ grad_image, const T* __restrict__ grad_opacity,
                            const int64_t* __restrict__ indices, const T* __restrict__ features,
                            const T* __restrict__ alphas, A* products, T* grad_alphas, int64_t width,
                            Layout layout) {
  AVATAR_DYNAMIC_SHARED(A, tile);
  const int stride = layout.block_pixels + 1;
  const int64_t b = blockIdx.x / layout.pixel_blocks;
  const int64_t first_pixel = blockIdx.x % layout.pixel_blocks * layout.block_pixels;
  const int lane = threadIdx.x % layout.lanes;
  const T* cloud = features + b * layout.num_points * layout.channels;
  for (int64_t channel_block = 0; channel_block < layout.channel_blocks; ++channel_block) {
    const int64_t first_channel = channel_block * kChannels * layout.lanes;
    load_tile(grad_image, b, first_pixel, first_channel, layout, tile);
    __syncthreads();
    for (int p = threadIdx.x / layout.lanes; p < layout.block_pixels; p += kThreads / layout.lanes) {
      const bool inside = first_pixel + p < layout.pixels;
      const int64_t pixel = b * layout.pixels + first_pixel + p;
      A gradients[kChannels];
      for (int v = 0; v < kChannels; ++v) gradients[v] = tile[layout.row(lane, v) * stride + p];
      for (int64_t s = 0; s < layout.slots; ++s) {
        const int64_t slot = pixel * layout.slots + s;
        const int64_t found = inside ? checked_index(indices, slot, layout, width) : -1;
        A product = 0;
        if (found >= 0) {
          A values[kChannels];
          load_channels(cloud + found * layout.channels, first_channel + kChannels * lane, layout, values);
          for (int v = 0; v < kChannels; ++v) product += gradients[v] * values[v];
        }
        for (int step = layout.lanes / 2; step > 0; step /= 2) {
          product += __shfl_xor_sync(0xffffffffu, product, step);
        }
        if (found < 0 || lane != 0) continue;
        products[slot] =
            product + (channel_block == 0 ? static_cast<A>(grad_opacity[pixel]) : products[slot]);
      }
    }
    __syncthreads();
  }
  for (int p = threadIdx.x; p < layout.block_pixels; p += kThreads) {
    if (first_pixel + p >= layout.pixels) break;
    const int64_t front = (b * layout.pixels + first_pixel + p) * layout.slots, back = front + layout.slots;
    A behind = 0, through = 1;
    for (int64_t slot = back - 1; slot >= front; --slot) {
      if (indices[slot] < 0) continue;
      const A product = products[slot], alpha = static_cast<A>(alphas[slot]);
      products[slot] = product - behind;
      behind = alpha * product + (A(1) - alpha) * behind;
    }
    for (int64_t slot = front; slot < back; ++slot) {
      if (indices[slot] < 0) {
        grad_alphas[slot] = static_cast<T>(A(0));
        continue;
      }
      grad_alphas[slot] = static_cast<T>(products[slot] * through);
      through *= A(1) - static_cast<A>(alphas[slot]);
    }
  }
}

// weights (B, pixels, slots): alpha times what the slots in front let through.
template <typename T, typename A>
__global__ void __launch_bounds__(kThreads, 2)
    composite_weights_kernel(const int64_t* __restrict__ indices, const T* __restrict__ alphas,
                             A* __restrict__ weights, int64_t pixels, int64_t slots) {
  const int64_t pixel = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (pixel >= pixels) return;
  A through = 1;
  for (int64_t slot = pixel * slots; slot < (pixel + 1) * slots; ++slot) {
    const A alpha = indices[slot] >= 0 ? static_cast<A>(alphas[slot]) : A(0);
    weights[slot] = alpha * through;
    through *= A(1) - alpha;
  }
}

// (B, C, pixels) -> (B, pixels, C), in the type that sums are formed in.
template <typename T, typename A>
__global__ void __launch_bounds__(kThreads, 2)
    channels_last_kernel(const T* __restrict__ image, A* __restrict__ rows, Layout layout) {
  AVATAR_DYNAMIC_SHARED(A, tile);
  const int64_t channel_block = blockIdx.x % layout.channel_blocks,
                block = blockIdx.x / layout.channel_blocks;
  const int64_t b = block / layout.pixel_blocks;
  const int64_t first_pixel = block % layout.pixel_blocks * layout.block_pixels;
  const int64_t first_channel = channel_block * kChannels * layout.lanes;
  load_tile(image, b, first_pixel, first_channel, layout, tile);
  __syncthreads();
  const int tile_channels = kChannels * layout.lanes;
  for (int e = threadIdx.x; e < tile_channels * layout.block_pixels; e += kThreads) {
    const int c = e % tile_channels, p = e / tile_channels;
    if (first_channel + c >= layout.channels || first_pixel + p >= layout.pixels) continue;
    rows[(b * layout.pixels + first_pixel + p) * layout.channels + first_channel + c] =
        tile[layout.row(c / kChannels, c % kChannels) * (layout.block_pixels + 1) + p];
  }
}

// One warp a point: `lanes` threads share a slot, as above, and the warp's groups of them take the slots in
// turn, then add up what they have.
template <typename T, typename A>
__global__ void __launch_bounds__(kThreads, 2)
    composite_features_kernel(const A* __restrict__ grad_rows, const A* __restrict__ weights,
                              IncomingEdgesOf incoming, T* __restrict__ grad_features, int64_t count,
                              Layout layout) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (n >= count) return;
  const int in_warp = threadIdx.x % kWarpSize, lane = in_warp % layout.lanes, group = in_warp / layout.lanes;
  const int64_t b = n / layout.num_points;
  const IncomingEdges edges = incoming.point(b, n - b * layout.num_points);
  for (int64_t block = 0; block < layout.channel_blocks; ++block) {
    const int64_t channel = (block * layout.lanes + lane) * kChannels;
    A sums[kChannels] = {};
    for (int64_t e = group; e < edges.count; e += kWarpSize / layout.lanes) {
      const int64_t slot = edges.edges[e];
      const A weight = weights[b * layout.pixels * layout.slots + slot];
      A values[kChannels];
      load_channels(grad_rows + (b * layout.pixels + edges.row(e)) * layout.channels, channel, layout,
                    values);
      for (int v = 0; v < kChannels; ++v) sums[v] += weight * values[v];
    }
    for (int step = layout.lanes; step < kWarpSize; step *= 2) {
      for (int v = 0; v < kChannels; ++v) sums[v] += __shfl_xor_sync(0xffffffffu, sums[v], step);
    }
    if (group != 0) continue;
    for (int v = 0; v < kChannels; ++v) {
      if (channel + v < layout.channels) {
        grad_features[n * layout.channels + channel + v] = static_cast<T>(sums[v]);
      }
    }
  }
}

template <typename T>
bool allows_vectors(const void* rows, int64_t channels) {
  return channels % kChannels == 0 && reinterpret_cast<uintptr_t>(rows) % alignof(ChannelGroup<T>) == 0;
}

template <typename T>
const T* data_of(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
T* mutable_data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// indices (B, H, W, K), features (B, N, C), alphas (B, H, W, K) -> image (B, C, H, W), opacity (B, 1, H, W).
std::tuple<Tensor, Tensor> composite_points_cuda(const Tensor& indices_in, const Tensor& features_in,
                                                 const Tensor& alphas_in) {
  const torch::stable::accelerator::DeviceGuard guard(features_in.get_device_index());
  const Tensor indices = as_contiguous(indices_in);
  const Tensor features = as_contiguous(features_in);
  const Tensor alphas = as_contiguous(alphas_in);
  const int64_t batch = indices.size(0), height = indices.size(1), width = indices.size(2);
  Tensor image = torch::stable::new_empty(features, {batch, features.size(2), height, width});
  Tensor opacity = torch::stable::new_empty(features, {batch, 1, height, width});
  Layout layout(features.size(1), features.size(2), height * width, indices.size(3));
  dispatch_floating(features.scalar_type(), "composite_points", [&](auto zero) {
    using T = decltype(zero);
    using A = typename Accumulate<T>::type;
    layout.vectors = allows_vectors<T>(features.const_data_ptr(), layout.channels);
    launch("composite_points", composite_kernel<T, A>,
           grid_of(batch * layout.pixel_blocks * layout.channel_blocks), dim3(kThreads),
           layout.tile_bytes<A>(), current_stream(features), const_data<int64_t>(indices),
           data_of<T>(features), data_of<T>(alphas), mutable_data_of<T>(image), mutable_data_of<T>(opacity),
           width, layout);
  });
  return {image, opacity};
}

Tensor composite_points_backward_alphas_cuda(const Tensor& grad_image_in, const Tensor& grad_opacity_in,
                                             const Tensor& indices_in, const Tensor& features_in,
                                             const Tensor& alphas_in) {
  const torch::stable::accelerator::DeviceGuard guard(features_in.get_device_index());
  const Tensor indices = as_contiguous(indices_in);
  const Tensor features = as_contiguous(features_in);
  const Tensor alphas = as_contiguous(alphas_in);
  const Tensor grad_image = as_contiguous(grad_image_in);
  const Tensor grad_opacity = as_contiguous(grad_opacity_in);
  const ScalarType type = features.scalar_type();
  Tensor grad_alphas = torch::stable::new_empty(alphas, alphas.sizes());
  Tensor products = grad_alphas;
  if (compute_type(type) != type)
    products = torch::stable::new_empty(alphas, alphas.sizes(), compute_type(type));
  const int64_t width = indices.size(2);
  Layout layout(features.size(1), features.size(2), indices.size(1) * width, indices.size(3));
  dispatch_floating(type, "composite_points_backward_alphas", [&](auto zero) {
    using T = decltype(zero);
    using A = typename Accumulate<T>::type;
    layout.vectors = allows_vectors<T>(features.const_data_ptr(), layout.channels);
    launch("composite_points_backward_alphas", composite_alphas_kernel<T, A>,
           grid_of(indices.size(0) * layout.pixel_blocks), dim3(kThreads), layout.tile_bytes<A>(),
           current_stream(features), data_of<T>(grad_image), data_of<T>(grad_opacity),
           const_data<int64_t>(indices), data_of<T>(features), data_of<T>(alphas),
           mutable_data_of<A>(products), mutable_data_of<T>(grad_alphas), width, layout);
  });
  return grad_alphas;
}

Tensor composite_points_backward_features_cuda(const Tensor& grad_image_in, const Tensor& indices_in,
                                               const Tensor& alphas_in, int64_t num_points) {
  const torch::stable::accelerator::DeviceGuard guard(grad_image_in.get_device_index());
  const Tensor indices = as_contiguous(indices_in);
  const Tensor alphas = as_contiguous(alphas_in);
  const Tensor grad_image = as_contiguous(grad_image_in);
  const int64_t batch = indices.size(0), pixels = indices.size(1) * indices.size(2), k = indices.size(3);
  const int64_t channels = grad_image.size(1);
  const ScalarType compute = compute_type(grad_image.scalar_type());
  Tensor grad_rows = torch::stable::new_empty(grad_image, {batch, pixels, channels}, compute);
  Tensor weights = torch::stable::new_empty(alphas, {batch, pixels, k}, compute);
  Tensor grad_features = torch::stable::new_empty(grad_image, {batch, num_points, channels});
  const cudaStream_t stream = current_stream(grad_image);
  const ReverseAdjacency slots_of =
      reverse_adjacency("composite_points_backward_features", indices, num_points);
  Layout layout(num_points, channels, pixels, k);
  dispatch_floating(grad_image.scalar_type(), "composite_points_backward_features", [&](auto zero) {
    using T = decltype(zero);
    using A = typename Accumulate<T>::type;
    launch("composite_weights", composite_weights_kernel<T, A>, grid_of(divide_up(batch * pixels, kThreads)),
           dim3(kThreads), 0, stream, const_data<int64_t>(indices), data_of<T>(alphas),
           mutable_data_of<A>(weights), batch * pixels, k);
    launch("composite_channels_last", channels_last_kernel<T, A>,
           grid_of(batch * layout.pixel_blocks * layout.channel_blocks), dim3(kThreads),
           layout.tile_bytes<A>(), stream, data_of<T>(grad_image), mutable_data_of<A>(grad_rows), layout);
    layout.vectors = allows_vectors<A>(grad_rows.const_data_ptr(), channels);
    launch("composite_features", composite_features_kernel<T, A>,
           grid_of(divide_up(batch * num_points, kThreads / kWarpSize)), dim3(kThreads), 0, stream,
           data_of<A>(grad_rows), data_of<A>(weights), incoming_edges(slots_of, indices, num_points),
           mutable_data_of<T>(grad_features), batch * num_points, layout);
  });
  return grad_features;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avatar_ops, CUDA, m) {
  m.impl("composite_points", TORCH_BOX(&composite_points_cuda));
  m.impl("composite_points_backward_alphas", TORCH_BOX(&composite_points_backward_alphas_cuda));
  m.impl("composite_points_backward_features", TORCH_BOX(&composite_points_backward_features_cuda));
}

}  // namespace avatar
