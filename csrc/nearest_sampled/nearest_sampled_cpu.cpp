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
  torch::stable::parallel_for(0, rows, 1 << 12, [&](int64_t begin, int64_t end) {
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

// sample (M,) int64 of `count` points, each at most once -> the same in ascending order, and (count,) the
// place that each point has there, or -1.
std::tuple<Tensor, Tensor> sampled_places_cpu(const Tensor& sample_in, int64_t count) {
  const Tensor sample = as_contiguous(sample_in);
  const int64_t size = sample.size(0);
  const int64_t* chosen = const_data<int64_t>(sample);
  check_inside("sampled_places", "sample", chosen, size, count);
  Tensor ascending = torch::stable::new_empty(sample, {size});
  Tensor places = torch::stable::new_empty(sample, {count});
  int64_t *sorted = mutable_data<int64_t>(ascending), *place = mutable_data<int64_t>(places);
  std::vector<uint8_t> is_in(count, 0);
  for (int64_t i = 0; i < size; ++i) is_in[chosen[i]] = 1;
  int64_t next = 0;
  for (int64_t point = 0; point < count; ++point) {
    place[point] = is_in[point] ? next : -1;
    if (next < size) sorted[next] = point;
    next += is_in[point];
  }
  if (next < size)
    throw std::invalid_argument("sampled_places: sample: got a point twice, expected each once");
  return {ascending, places};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avatar_ops, CPU, m) {
  m.impl("sampled_places", TORCH_BOX(&sampled_places_cpu));
  m.impl("nearest_sampled", TORCH_BOX(&nearest_sampled_cpu));
}

}  // namespace avatar
