// Clouds of points packed for search: into the leaves of a kd-tree, or, in feature space, centred and in
// order.
#pragma once

#include <vector>

#include "common/tensor.h"
#include "knn/knn_simd.h"

namespace avatar {

// Clouds as ranges of the rows of one array.
struct Clouds {
  std::vector<int64_t> row;     // first row of each cloud
  std::vector<int64_t> length;  // rows in use
  std::vector<int64_t> leaf;    // first leaf of each cloud in an index, then the number of all leaves

  int64_t count() const { return static_cast<int64_t>(row.size()); }
};

// Clouds (B, N, D) of which the first lengths[b] rows are in use, all of them without lengths. `argument` is
// named in the error about a length outside [0, N].
Clouds padded_clouds(const Tensor& points, const std::optional<Tensor>& lengths, const char* argument);

// With L leaves of kLeaf points in all:
struct KnnIndex {
  Tensor coordinates;  // (L, D, kLeaf), minus `centers` in feature space; what no point fills is 0 or +inf
  Tensor order;        // (L, kLeaf) int32 rows within the cloud, -1 after the last
  Tensor counts;       // (clouds) int64 points in the index: those in use and finite
  Tensor bounds;       // tree: (2L, 2, D) boxes of the nodes, in preorder; features: (L, kLeaf) squared norms
  Tensor extra;        // tree: (2L) int32 smallest row of each node; features: (clouds, D) centers
};

// points: contiguous, in a compute dtype, rows in the last dimension but one.
KnnIndex build_index(const Tensor& points, const Clouds& clouds);

// distances and indices (query rows, k); indices count within the cloud. `queries` are the points themselves
// where own_queries is set.
struct KnnSearch {
  const KnnIndex& index;
  const Tensor& points;
  const Clouds& clouds;
  const Tensor& queries;
  const Clouds& query_clouds;
  bool own_queries;
  bool exclude_self;
  int64_t k;
};
void search_index(const KnnSearch& search, const Tensor& distances, const Tensor& indices);

inline bool uses_tree(int64_t dims) {
  return dims <= kTreeDims;
}

// Rows of a cloud that are in use and finite, ascending; returns their number.
template <typename T>
int64_t finite_rows(const T* points, int64_t length, int64_t dims, int32_t* rows) {
  int64_t count = 0;
  for (int64_t row = 0; row < length; ++row) {
    bool finite = true;
    for (int64_t d = 0; d < dims; ++d) {
      const T value = points[row * dims + d];
      finite &= value - value == 0;
    }
    rows[count] = static_cast<int32_t>(row);
    count += finite;
  }
  return count;
}

}  // namespace avatar
