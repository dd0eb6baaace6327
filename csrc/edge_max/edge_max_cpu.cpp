#include <algorithm>

#include "common/tensor.h"
#include "edge_max/edge_max_simd.h"

namespace avatar {
namespace {

// The maxima of features (B, N, C) over rows (M,) int64, or all, of neighbors (B, M', K) int64: (B, M, C);
// `argmax` the same, or null.
Tensor max_over(const char* op, const Tensor& features_in, const Tensor& neighbors,
                const std::optional<Tensor>& rows_in, const Tensor* argmax) {
  const Tensor features = to_compute(features_in);
  const int64_t batch = features.size(0), num_points = features.size(1), channels = features.size(2);
  const int64_t lists = neighbors.size(1), k = neighbors.size(2);
  std::optional<Tensor> chosen;
  if (rows_in) chosen = as_contiguous(*rows_in);
  const int64_t rows = chosen ? chosen->size(0) : lists;
  const int64_t* choice = chosen ? const_data<int64_t>(*chosen) : nullptr;
  if (choice) check_inside(op, "rows", choice, rows, lists);
  Tensor values = new_result(features, {batch, rows, channels});
  int64_t* from = argmax ? mutable_data<int64_t>(*argmax) : nullptr;
  FirstBad bad;
  dispatch_compute(features.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, k * channels));
    parallel_parts(batch * rows, grain, 1, [&](int64_t begin, int64_t end) {
      std::vector<int32_t> slots(k + 1);
      while (begin < end) {
        const int64_t b = begin / rows, stop = std::min(end, (b + 1) * rows);
        const EdgeMaxArgs<T> args{const_data<T>(features) + b * num_points * channels,
                                  const_data<int64_t>(neighbors) + b * lists * k,
                                  choice,
                                  mutable_data<T>(values) + b * rows * channels,
                                  from ? from + b * rows * channels : nullptr,
                                  num_points,
                                  channels,
                                  k};
        const int64_t position =
            AVATAR_ISA_CALL(edge_max_rows, args, begin - b * rows, stop - b * rows, slots.data());
        if (position >= 0) return bad.report(b * lists * k + position);
        begin = stop;
      }
    });
  });
  raise_bad_neighbor(bad, op, neighbors, num_points);
  return to_type(values, features_in.scalar_type());
}

std::tuple<Tensor, Tensor> edge_max_cpu(const Tensor& features, const Tensor& neighbors_in) {
  const Tensor neighbors = as_contiguous(neighbors_in);
  const Tensor argmax = new_result(neighbors, {neighbors.size(0), neighbors.size(1), features.size(2)});
  return {max_over("edge_max", features, neighbors, std::nullopt, &argmax), argmax};
}

Tensor edge_max_values_cpu(const Tensor& features, const Tensor& neighbors,
                           const std::optional<Tensor>& rows) {
  return max_over("edge_max_values", features, as_contiguous(neighbors), rows, nullptr);
}

// Each task owns a range of channels of one cloud, so every sum is in row order whatever the threads; the
// neighbours, which argmax is taken from, are not needed.
Tensor edge_max_backward_cpu(const Tensor& grad_in, const Tensor& argmax_in, const Tensor& /* neighbors */,
                             int64_t num_points) {
  const Tensor grad = to_compute(grad_in);
  const Tensor argmax = as_contiguous(argmax_in);
  const int64_t batch = grad.size(0), rows = grad.size(1), channels = grad.size(2);
  Tensor grad_features = torch::stable::new_zeros(grad, {batch, num_points, channels});
  constexpr int64_t kChannelsPerTask = 16;
  const int64_t column_tasks = (channels + kChannelsPerTask - 1) / kChannelsPerTask;
  dispatch_compute(grad.scalar_type(), "edge_max_backward", [&](auto zero) {
    using T = decltype(zero);
    parallel_tasks(batch * column_tasks, [&](int64_t task) {
      const int64_t b = task / column_tasks, begin = task % column_tasks * kChannelsPerTask;
      const EdgeMaxBackwardArgs<T> args{
          const_data<T>(grad) + b * rows * channels, const_data<int64_t>(argmax) + b * rows * channels,
          mutable_data<T>(grad_features) + b * num_points * channels, rows, channels};
      AVATAR_ISA_CALL(edge_max_backward_columns, args, begin, std::min(begin + kChannelsPerTask, channels));
    });
  });
  return to_type(grad_features, grad_in.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avatar_ops, CPU, m) {
  m.impl("edge_max", TORCH_BOX(&edge_max_cpu));
  m.impl("edge_max_values", TORCH_BOX(&edge_max_values_cpu));
  m.impl("edge_max_backward", TORCH_BOX(&edge_max_backward_cpu));
}

}  // namespace avatar
