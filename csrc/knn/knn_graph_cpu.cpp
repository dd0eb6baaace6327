#include <algorithm>

#include "knn/knn_index.h"

namespace avatar {
namespace {

// The clouds of a sorted batch vector; those without points do not appear.
Clouds segments(const Tensor& x, const std::optional<Tensor>& batch_in, std::optional<int64_t> batch_size) {
  const int64_t rows = x.size(0);
  Clouds clouds;
  if (batch_in) {
    const Tensor contiguous = as_contiguous(*batch_in);
    const int64_t* batch = const_data<int64_t>(contiguous);
    const int64_t limit = batch_size.value_or(std::numeric_limits<int64_t>::max());
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t before = row ? batch[row - 1] : 0;
      if (batch[row] < before || batch[row] >= limit) {
        throw std::invalid_argument(
            "knn_graph: batch[" + std::to_string(row) + "] = " + std::to_string(batch[row]) +
            (batch[row] < before ? " after " + std::to_string(before) + "; expected sorted values >= 0"
                                 : "; expected values below batch_size = " + std::to_string(limit)));
      }
      if (row == 0 || batch[row] != before) {
        clouds.row.push_back(row);
        clouds.length.push_back(0);
      }
      ++clouds.length.back();
    }
  } else if (rows) {
    clouds.row.push_back(0);
    clouds.length.push_back(rows);
  }
  int64_t leaf = 0;
  for (const int64_t length : clouds.length) {
    if (length > std::numeric_limits<int32_t>::max()) {
      throw std::invalid_argument("knn_graph: got a cloud of " + std::to_string(length) +
                                  " points, expected less than 2^31");
    }
    clouds.leaf.push_back(leaf);
    leaf += (length + kLeaf - 1) / kLeaf;
  }
  clouds.leaf.push_back(leaf);
  return clouds;
}

// x (N, D) -> (2, E): rows of neighbours and of queries, the neighbours first where neighbors_first is set.
Tensor knn_graph_cpu(const Tensor& x_in, int64_t k, const std::optional<Tensor>& batch, bool loop,
                     bool neighbors_first, std::optional<int64_t> batch_size) {
  const Tensor x = to_compute(x_in);
  const Clouds clouds = segments(x, batch, batch_size);
  const int64_t rows = x.size(0);
  const KnnIndex index = build_index(x, clouds);
  // More slots than the largest cloud has points would stay empty.
  const int64_t largest =
      clouds.count() ? *std::max_element(clouds.length.begin(), clouds.length.end()) - (loop ? 0 : 1) : 0;
  k = std::max<int64_t>(0, std::min(k, largest));
  const Tensor distances = torch::stable::new_empty(x, {rows, k});
  const Tensor indices = torch::stable::new_empty(x, {rows, k}, ScalarType::Long);
  search_index({index, x, clouds, x, clouds, true, !loop, k}, distances, indices);

  const int64_t* neighbors = const_data<int64_t>(indices);
  std::vector<int64_t> first_edge(rows + 1, 0);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t* end = std::find(neighbors + row * k, neighbors + (row + 1) * k, -1);
    first_edge[row + 1] = first_edge[row] + (end - (neighbors + row * k));
  }
  const int64_t edges = first_edge[rows];
  Tensor graph = torch::stable::new_empty(x, {2, edges}, ScalarType::Long);
  int64_t* query_side = mutable_data<int64_t>(graph) + (neighbors_first ? edges : 0);
  int64_t* neighbor_side = mutable_data<int64_t>(graph) + (neighbors_first ? 0 : edges);
  torch::stable::parallel_for(0, rows, 4096, [&](int64_t begin, int64_t end) {
    auto next = std::upper_bound(clouds.row.begin(), clouds.row.end(), begin);
    for (int64_t row = begin; row < end; ++row) {
      if (next != clouds.row.end() && row == *next) ++next;
      for (int64_t slot = 0; slot < first_edge[row + 1] - first_edge[row]; ++slot) {
        query_side[first_edge[row] + slot] = row;
        neighbor_side[first_edge[row] + slot] = next[-1] + neighbors[row * k + slot];
      }
    }
  });
  return graph;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avatar_ops, CPU, m) {
  m.impl("knn_graph", TORCH_BOX(&knn_graph_cpu));
}

}  // namespace avatar
