#include <algorithm>

#include "common/adjacency.h"
#include "knn/knn_index.h"

namespace avatar {
namespace {

// An index that does not belong to the points must not be read out of bounds.
void check_index(const KnnIndex& index, const Tensor& points, const Clouds& clouds) {
  const int64_t dims = points.size(2), batch = points.size(0);
  const int64_t leaves = batch ? clouds.leaf[1] : 0;
  const bool tree = uses_tree(dims);
  const auto refuse = [] {
    throw std::invalid_argument(
        "knn_search: index: does not fit the points, expected what knn_build makes of them");
  };
  const auto shaped = [](const Tensor& tensor, std::vector<int64_t> sizes, ScalarType type) {
    bool fits = tensor.scalar_type() == type && tensor.is_contiguous() &&
                tensor.dim() == static_cast<int64_t>(sizes.size());
    for (size_t d = 0; fits && d < sizes.size(); ++d) fits = tensor.size(static_cast<int64_t>(d)) == sizes[d];
    return fits;
  };
  const ScalarType type = points.scalar_type();
  if (!shaped(index.coordinates, {batch, leaves, dims, kLeaf}, type) ||
      !shaped(index.order, {batch, leaves, kLeaf}, ScalarType::Int) ||
      !shaped(index.counts, {batch}, ScalarType::Long) ||
      !(tree ? shaped(index.bounds, {batch, 2 * leaves, 2, dims}, type)
             : shaped(index.bounds, {batch, leaves, kLeaf}, type)) ||
      !(tree ? shaped(index.extra, {batch, 2 * leaves}, ScalarType::Int)
             : shaped(index.extra, {batch, dims}, type))) {
    refuse();
  }
  const int64_t* counts = const_data<int64_t>(index.counts);
  const int32_t* order = const_data<int32_t>(index.order);
  FirstBad bad;
  parallel_tasks(batch, [&, rows = points.size(1)](int64_t cloud) {
    const int64_t count = counts[cloud];
    const int32_t* own = order + cloud * leaves * kLeaf;
    if (count < 0 || count > rows) return bad.report(cloud);
    uint32_t largest = 0, filling = ~uint32_t{0};
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, static_cast<uint32_t>(own[i]));
    for (int64_t i = count; i < leaves * kLeaf; ++i) filling &= static_cast<uint32_t>(own[i]);
    if ((count > 0 && largest >= rows) || filling != ~uint32_t{0}) bad.report(cloud);
  });
  if (bad.found()) refuse();
}

std::tuple<Tensor, Tensor> search(const KnnIndex& index, const Tensor& points, const Clouds& clouds,
                                  const std::optional<Tensor>& queries_in, int64_t k,
                                  const std::optional<Tensor>& query_lengths, bool exclude_self,
                                  ScalarType type) {
  if (k < 0) throw std::invalid_argument("knn: k: got " + std::to_string(k) + ", expected k >= 0");
  const Tensor queries = queries_in ? to_compute(*queries_in) : points;
  // With lengths of their own, even the points' own rows are other queries than the index holds.
  const bool own_queries = !queries_in && !query_lengths;
  const Clouds query_clouds = own_queries ? clouds : padded_clouds(queries, query_lengths, "query_lengths");
  // Rows are written in the tree's order: with small pages nearly every row costs a search of the page table.
  Tensor distances = new_result(points, {queries.size(0), queries.size(1), k});
  Tensor indices =
      new_result(points, {queries.size(0), queries.size(1), k}, ScalarType::Long, sizeof(int64_t));
  search_index({index, points, clouds, queries, query_clouds, own_queries, exclude_self, k}, distances,
               indices);
  return {to_type(distances, type), indices};
}

// points (B, N, D), queries (B, M, D) -> squared distances and indices (B, M, k).
std::tuple<Tensor, Tensor> knn_cpu(const Tensor& points_in, const std::optional<Tensor>& queries, int64_t k,
                                   const std::optional<Tensor>& lengths,
                                   const std::optional<Tensor>& query_lengths, bool exclude_self) {
  const Tensor points = to_compute(points_in);
  const Clouds clouds = padded_clouds(points, lengths, "lengths");
  return search(build_index(points, clouds), points, clouds, queries, k, query_lengths, exclude_self,
                points_in.scalar_type());
}

std::vector<Tensor> knn_build_cpu(const Tensor& points_in, const std::optional<Tensor>& lengths) {
  const Tensor points = to_compute(points_in);
  const Clouds clouds = padded_clouds(points, lengths, "lengths");
  return parts_of(build_index(points, clouds), points, clouds);
}

std::tuple<Tensor, Tensor> knn_search_cpu(const std::vector<Tensor>& parts, const Tensor& points_in,
                                          const std::optional<Tensor>& queries, int64_t k,
                                          const std::optional<Tensor>& query_lengths, bool exclude_self) {
  const Tensor points = to_compute(points_in);
  const Clouds clouds = padded_clouds(points, std::nullopt, "lengths");
  if (parts.size() != 5) {
    throw std::invalid_argument("knn_search: index: got " + std::to_string(parts.size()) +
                                " tensors, expected 5");
  }
  const KnnIndex index{parts[0], parts[1], parts[2], parts[3], parts[4]};
  check_index(index, points, clouds);
  return search(index, points, clouds, queries, k, query_lengths, exclude_self, points_in.scalar_type());
}

// The gradient of one distance |q - p|^2 is 2 (q - p) in q and the opposite in p.
template <typename T>
void add_difference(T weight, const T* from, const T* to, int64_t dims, T* gradient) {
  for (int64_t d = 0; d < dims; ++d) gradient[d] += 2 * weight * (from[d] - to[d]);
}

// grad (B, M, k), points (B, N, D), queries (B, M, D) or the points themselves, indices (B, M, k) ->
// gradients of points and queries, of zero size where not needed; without queries the points' holds both
// roles.
std::tuple<Tensor, Tensor> knn_backward_cpu(const Tensor& grad_in, const Tensor& points_in,
                                            const std::optional<Tensor>& queries_in, const Tensor& indices_in,
                                            bool need_points, bool need_queries) {
  const Tensor grad = to_compute(grad_in), points = to_compute(points_in);
  const Tensor queries = queries_in ? to_compute(*queries_in) : points;
  const Tensor indices = as_contiguous(indices_in);
  const int64_t batch = points.size(0), num_points = points.size(1), dims = points.size(2);
  const int64_t rows = indices.size(1), k = indices.size(2);
  const int64_t* neighbors = const_data<int64_t>(indices);
  FirstBad bad;
  bad.report(first_bad_neighbor(neighbors, batch * rows * k, num_points));
  raise_bad_neighbor(bad, "knn_backward", indices, num_points);
  const auto zeros = [&](bool needed, int64_t count) {
    return needed ? torch::stable::new_zeros(points, {batch, count, dims})
                  : torch::stable::new_empty(points, {0});
  };
  Tensor grad_points = zeros(need_points, num_points);
  Tensor grad_queries = zeros(queries_in && need_queries, rows);
  const int64_t grain = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, k * dims));
  dispatch_compute(points.scalar_type(), "knn_backward", [&](auto zero) {
    using T = decltype(zero);
    const T* g = const_data<T>(grad);
    const T* p = const_data<T>(points);
    const T* q = const_data<T>(queries);
    const bool both_roles = !queries_in && need_points;
    if (both_roles || (queries_in && need_queries)) {
      T* gradient = mutable_data<T>(both_roles ? grad_points : grad_queries);
      torch::stable::parallel_for(0, batch * rows, grain, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const T* cloud = p + row / rows * num_points * dims;
          for (int64_t e = row * k; e < (row + 1) * k; ++e) {
            if (neighbors[e] < 0) continue;
            add_difference(g[e], q + row * dims, cloud + neighbors[e] * dims, dims, gradient + row * dims);
          }
        }
      });
    }
    if (need_points) {
      const ReverseAdjacency reverse = reverse_adjacency(neighbors, batch, rows, k, num_points);
      T* gradient = mutable_data<T>(grad_points);
      torch::stable::parallel_for(0, batch * num_points, grain, [&](int64_t begin, int64_t end) {
        for (int64_t point = begin; point < end; ++point) {
          for (int64_t i = reverse.offsets[point]; i < reverse.offsets[point + 1]; ++i) {
            const int64_t e = reverse.edges[i];
            add_difference(g[e], p + point * dims, q + e / k * dims, dims, gradient + point * dims);
          }
        }
      });
    }
  });
  return {to_type(grad_points, points_in.scalar_type()), to_type(grad_queries, points_in.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avatar_ops, CPU, m) {
  m.impl("knn", TORCH_BOX(&knn_cpu));
  m.impl("knn_build", TORCH_BOX(&knn_build_cpu));
  m.impl("knn_search", TORCH_BOX(&knn_search_cpu));
  m.impl("knn_backward", TORCH_BOX(&knn_backward_cpu));
}

}  // namespace avatar
