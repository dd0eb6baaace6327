// Clouds of points packed for search: into the leaves of a kd-tree, or, in feature space, centred and in
// order.
#pragma once

#include <algorithm>
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

// The index of padded clouds as knn_build gives it.
std::vector<Tensor> parts_of(const KnnIndex& index, const Tensor& points, const Clouds& clouds);

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

// Neighbours that a query of a cloud of `points` is searched for.
inline int64_t slots_of(int64_t k, int64_t points) {
  return std::min(k, points);
}

// Keys that one query's list has room for: twice its slots, but never more than all points fill.
inline int64_t buffer_capacity(int64_t slots, int64_t points) {
  return slots <= kSortedSlots ? 0 : std::min(2 * slots, points + 1);
}

// What both searches are told about a cloud with `points` points in the index.
template <typename T>
SearchArgs<T> search_args(const KnnSearch& search, int64_t cloud, int64_t points, void* buffer, T* distances,
                          int64_t* indices) {
  const int64_t dims = search.points.size(search.points.dim() - 1);
  const int64_t leaf = search.clouds.leaf[cloud], query_row = search.query_clouds.row[cloud];
  const int64_t slots = slots_of(search.k, points);
  return {dims,
          const_data<T>(search.index.coordinates) + leaf * dims * kLeaf,
          const_data<int32_t>(search.index.order) + leaf * kLeaf,
          points,
          (points + kLeaf - 1) / kLeaf,
          {slots, buffer, buffer_capacity(slots, points)},
          search.k,
          search.exclude_self,
          distances + query_row * search.k,
          indices + query_row * search.k};
}

// The search in feature space: of every query that `queries` lists, by cloud as an index does.
template <typename T>
void search_features(const KnnSearch& search, const KnnIndex& queries, T* distances, int64_t* indices);

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
