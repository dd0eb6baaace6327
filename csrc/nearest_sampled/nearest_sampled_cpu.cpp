#include "common/tensor.h"

namespace avatar {
namespace {

// neighbors (M, K) int64, places (N,) int64 -> (M,): the place of the first neighbour that has one, or -1.
Tensor nearest_sampled_cpu(const Tensor& neighbors_in, const Tensor& places_in) {
  const Tensor neighbors = as_contiguous(neighbors_in);
  const Tensor places = as_contiguous(places_in);
  const int64_t rows = neighbors.size(0), k = neighbors.size(1), count = places.size(0);
  Tensor nearest = torch::stable::new_empty(neighbors, {rows});
  const int64_t *edges = const_data<int64_t>(neighbors), *place = const_data<int64_t>(places);
  int64_t* result = mutable_data<int64_t>(nearest);
  FirstBad bad;
  torch::stable::parallel_for(0, rows, 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      result[row] = -1;
      for (int64_t edge = row * k; edge < (row + 1) * k && result[row] < 0; ++edge) {
        if (edges[edge] == -1) continue;
        if (edges[edge] < 0 || edges[edge] >= count) return bad.report(edge);
        result[row] = place[edges[edge]];
      }
      if (result[row] < 0) result[row] = -1;
    }
  });
  if (bad.found()) {
    throw std::out_of_range("nearest_sampled: neighbors[" + std::to_string(bad.position() / k) + ", " +
                            std::to_string(bad.position() % k) +
                            "] = " + std::to_string(edges[bad.position()]) +
                            "; expected -1 (none) or an index in [0, " + std::to_string(count) + ")");
  }
  return nearest;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avatar_ops, CPU, m) {
  m.impl("nearest_sampled", TORCH_BOX(&nearest_sampled_cpu));
}

}  // namespace avatar
