// Inner loops of knn, built once per instruction set: search of a tree of boxes (few dimensions) and search
// by tiled products (feature space). Both scan clouds that are packed into leaves of kLeaf points:
// coordinates (leaves, dims, kLeaf), order (leaves, kLeaf) with the point's row, or -1 after the last point.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "common/isa.h"

namespace avatar {

constexpr int kLeaf = 32;
// Up to this many dimensions the tree is used.
constexpr int kTreeDims = 10;
// Up to this many neighbours are kept sorted while searching; more gather in a buffer.
constexpr int kSortedSlots = 64;

// Where one query's neighbours are gathered.
struct KeySlots {
  int64_t count;  // neighbours to find, at most the points there are
  void* buffer;   // capacity * kKeyBytes bytes, where count > kSortedSlots
  int64_t capacity;
};
constexpr size_t kKeyBytes = 16;

// What both searches are told; rows count within the cloud.
template <typename T>
struct SearchArgs {
  int64_t dims;
  const T* coordinates;  // of the points
  const int32_t* order;
  int64_t leaves;
  KeySlots slots;
  int64_t k;
  bool exclude_self;
  T* distances;      // (query rows, k)
  int64_t* indices;  // (query rows, k)
};

template <typename T>
struct TreeSearchArgs : SearchArgs<T> {
  // Nodes in preorder: a node over leaves [a, b) splits at a + (b - a + 1) / 2.
  const T* boxes;         // (2 leaves - 1, 2, dims) smallest and largest coordinates
  const int32_t* lowest;  // (2 leaves - 1) smallest row
  const T* query_coordinates;
  const int32_t* query_order;
};

template <typename T>
struct FeatureSearchArgs : SearchArgs<T> {
  // `coordinates` are centred: the point minus `center`.
  const T* center;   // (dims)
  const T* norms;    // (leaves, kLeaf) squared norms of the centred points; padding_norm() after the last
  const T* points;   // (rows, dims) as given
  const T* queries;  // (query rows, dims) as given
  const int32_t* query_rows;
  T* scratch;  // feature_scratch(dims) values
};

// So large that padding is ruled out once a list is full, yet below where the product form may overflow.
template <typename T>
constexpr T padding_norm() {
  return std::numeric_limits<T>::max() / 128;
}

// Queries of a block, rounded up to whole tiles.
constexpr int kFeatureBlockRows = kLeaf + 16;
constexpr int64_t feature_scratch(int64_t dims) {
  return kFeatureBlockRows * dims;
}

// tree_search: the queries in leaves [begin, end) of the packed queries.
// feature_search: queries query_rows[begin, end).
#define AVATAR_DECLARE(ISA)                                                               \
  namespace ISA {                                                                         \
  void tree_search(const TreeSearchArgs<float>& args, int64_t begin, int64_t end);        \
  void tree_search(const TreeSearchArgs<double>& args, int64_t begin, int64_t end);       \
  void feature_search(const FeatureSearchArgs<float>& args, int64_t begin, int64_t end);  \
  void feature_search(const FeatureSearchArgs<double>& args, int64_t begin, int64_t end); \
  }
AVATAR_FOR_EACH_ISA(AVATAR_DECLARE)
#undef AVATAR_DECLARE

}  // namespace avatar
