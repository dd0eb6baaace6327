#include <algorithm>

#include "common/adjacency.h"
#include "common/tensor.h"
#include "composite_points/composite_points_simd.h"

namespace avatar {
namespace {

// Calls body(b, begin, end) in parallel for ranges of pixels, each within one image; body returns a flat
// position in the batch to report, or -1.
template <typename Body>
void for_pixels(int64_t batch, int64_t pixels, int64_t work, FirstBad& bad, const Body& body) {
  const int64_t grain = std::max<int64_t>(64, 65536 / std::max<int64_t>(1, work));
  torch::stable::parallel_for(0, batch * pixels, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t b = begin / pixels, stop = std::min(end, (b + 1) * pixels);
      bad.report(body(b, begin - b * pixels, stop - b * pixels));
      begin = stop;
    }
  });
}

void raise_bad_index(const FirstBad& bad, const Tensor& indices, int64_t num_points) {
  if (!bad.found()) return;
  const int64_t height = indices.size(1), width = indices.size(2), k = indices.size(3);
  const int64_t position = bad.position();
  throw std::out_of_range(
      "composite_points: fragments.indices[" + std::to_string(position / k / width / height) + ", " +
      std::to_string(position / k / width % height) + ", " + std::to_string(position / k % width) + ", " +
      std::to_string(position % k) + "] = " + std::to_string(const_data<int64_t>(indices)[position]) +
      "; expected -1 (none) or an index in [0, " + std::to_string(num_points) + ")");
}

void check_indices(const Tensor& indices, int64_t num_points) {
  FirstBad bad;
  bad.report(first_bad_neighbor(const_data<int64_t>(indices), indices.numel(), num_points));
  raise_bad_index(bad, indices, num_points);
}

// indices (B, H, W, K), features (B, N, C), alphas (B, H, W, K) -> image (B, C, H, W), opacity (B, 1, H, W).
std::tuple<Tensor, Tensor> composite_points_cpu(const Tensor& indices_in, const Tensor& features_in,
                                                const Tensor& alphas_in) {
  const Tensor indices = as_contiguous(indices_in);
  const Tensor features = to_compute(features_in), alphas = to_compute(alphas_in);
  const int64_t batch = indices.size(0), height = indices.size(1), width = indices.size(2);
  const int64_t k = indices.size(3), num_points = features.size(1), channels = features.size(2);
  const int64_t pixels = height * width;
  Tensor image = torch::stable::new_empty(features, {batch, channels, height, width});
  Tensor opacity = torch::stable::new_empty(features, {batch, 1, height, width});
  FirstBad bad;
  dispatch_compute(features.scalar_type(), "composite_points", [&](auto zero) {
    using T = decltype(zero);
    for_pixels(batch, pixels, k * (channels + 4), bad, [&](int64_t b, int64_t begin, int64_t end) {
      const CompositeArgs<T> args{const_data<int64_t>(indices) + b * pixels * k,
                                  const_data<T>(alphas) + b * pixels * k,
                                  const_data<T>(features) + b * num_points * channels,
                                  mutable_data<T>(image) + b * channels * pixels,
                                  mutable_data<T>(opacity) + b * pixels,
                                  pixels,
                                  k,
                                  channels,
                                  num_points};
      const int64_t position = AVATAR_ISA_CALL(composite_pixels, args, begin, end);
      return position < 0 ? -1 : b * pixels * k + position;
    });
  });
  raise_bad_index(bad, indices, num_points);
  return {to_type(image, features_in.scalar_type()), to_type(opacity, features_in.scalar_type())};
}

Tensor composite_points_backward_alphas_cpu(const Tensor& grad_image_in, const Tensor& grad_opacity_in,
                                            const Tensor& indices_in, const Tensor& features_in,
                                            const Tensor& alphas_in) {
  const Tensor indices = as_contiguous(indices_in);
  const Tensor features = to_compute(features_in), alphas = to_compute(alphas_in);
  const Tensor grad_image = to_compute(grad_image_in), grad_opacity = to_compute(grad_opacity_in);
  const int64_t batch = indices.size(0), pixels = indices.size(1) * indices.size(2), k = indices.size(3);
  const int64_t num_points = features.size(1), channels = features.size(2);
  check_indices(indices, num_points);
  Tensor grad_alphas = torch::stable::empty_like(alphas);
  FirstBad none;
  dispatch_compute(features.scalar_type(), "composite_points_backward_alphas", [&](auto zero) {
    using T = decltype(zero);
    for_pixels(batch, pixels, k * (channels + 8), none, [&](int64_t b, int64_t begin, int64_t end) {
      const CompositeAlphasArgs<T> args{const_data<T>(grad_image) + b * channels * pixels,
                                        const_data<T>(grad_opacity) + b * pixels,
                                        const_data<int64_t>(indices) + b * pixels * k,
                                        const_data<T>(alphas) + b * pixels * k,
                                        const_data<T>(features) + b * num_points * channels,
                                        mutable_data<T>(grad_alphas) + b * pixels * k,
                                        pixels,
                                        k,
                                        channels};
      AVATAR_ISA_CALL(composite_alphas, args, begin, end);
      return int64_t(-1);
    });
  });
  return to_type(grad_alphas, alphas_in.scalar_type());
}

// Each point sums over the slots that hold it in their order, whatever the threads.
Tensor composite_points_backward_features_cpu(const Tensor& grad_image_in, const Tensor& indices_in,
                                              const Tensor& alphas_in, int64_t num_points) {
  const Tensor indices = as_contiguous(indices_in);
  const Tensor grad_image = to_compute(grad_image_in), alphas = to_compute(alphas_in);
  const int64_t batch = indices.size(0), pixels = indices.size(1) * indices.size(2), k = indices.size(3);
  const int64_t channels = grad_image.size(1);
  check_indices(indices, num_points);
  Tensor grad_pixels = torch::stable::new_empty(grad_image, {batch, pixels, channels});
  Tensor weights = torch::stable::new_empty(alphas, {batch, pixels, k});
  Tensor grad_features = torch::stable::new_empty(grad_image, {batch, num_points, channels});
  FirstBad none;
  dispatch_compute(grad_image.scalar_type(), "composite_points_backward_features", [&](auto zero) {
    using T = decltype(zero);
    for_pixels(batch, pixels, channels + 4 * k, none, [&](int64_t b, int64_t begin, int64_t end) {
      const CompositeWeightsArgs<T> args{const_data<T>(grad_image) + b * channels * pixels,
                                         const_data<int64_t>(indices) + b * pixels * k,
                                         const_data<T>(alphas) + b * pixels * k,
                                         mutable_data<T>(grad_pixels) + b * pixels * channels,
                                         mutable_data<T>(weights) + b * pixels * k,
                                         pixels,
                                         k,
                                         channels};
      AVATAR_ISA_CALL(composite_weights, args, begin, end);
      return int64_t(-1);
    });
    const ReverseAdjacency slots_of =
        reverse_adjacency(const_data<int64_t>(indices), batch, pixels, k, num_points);
    const CompositeFeaturesArgs<T> args{const_data<T>(grad_pixels),
                                        const_data<T>(weights),
                                        slots_of.offsets.data(),
                                        slots_of.edges.data(),
                                        mutable_data<T>(grad_features),
                                        k,
                                        channels};
    torch::stable::parallel_for(0, batch * num_points, 1 << 10, [&](int64_t begin, int64_t end) {
      AVATAR_ISA_CALL(composite_features, args, begin, end);
    });
  });
  return to_type(grad_features, grad_image_in.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avatar_ops, CPU, m) {
  m.impl("composite_points", TORCH_BOX(&composite_points_cpu));
  m.impl("composite_points_backward_alphas", TORCH_BOX(&composite_points_backward_alphas_cpu));
  m.impl("composite_points_backward_features", TORCH_BOX(&composite_points_backward_features_cpu));
}

}  // namespace avatar
