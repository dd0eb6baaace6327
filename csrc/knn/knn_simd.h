// Inner loops of knn, built once per instruction set: search of a tree of boxes (few dimensions) and search
// by tiled products (feature space). Both scan clouds that are packed into leaves of kLeaf points:
// coordinates (leaves, dims, kLeaf), order (leaves, kLeaf) with the point's row, or -1 after the last point.
#pragma once

#include <algorithm>
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
  int64_t count, leaves;  // points in the index, and the leaves they fill
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

// A point that a query's list may need: the smallest that |p|^2 - 2 q.p can be, and its place in the order.
template <typename T>
struct Candidate {
  T lower;
  int32_t position;
};

// Queries whose candidates are gathered. A product q.p counts if it is at least (|p|^2 + limit) / 2 or so.
template <typename T>
struct FeatureQueries {
  const int32_t* rows;  // within the cloud; -1 for none
  const T* norms;       // squared norms of the centred queries
  T* limits;
  T* guesses;                // the limits hold if there are enough candidates no farther than this
  int32_t* counts;           // of candidates; at the end kIncomplete where the guess was too small
  Candidate<T>* candidates;  // (queries, capacity)
};
constexpr int32_t kIncomplete = -1;

// Some points of a cloud, in leaves as the others. The distance of the `rank`-th of them is most likely
// larger than that of the last neighbour among all points.
template <typename T>
struct FeatureSample {
  const T* coordinates;  // (leaves, dims, kLeaf), centred
  const T* norms;        // (leaves, kLeaf)
  int64_t leaves, rank;
};
constexpr int64_t kMostSampleLeaves = 32;

template <typename T>
struct FeatureSearchArgs : SearchArgs<T> {
  // `coordinates` are centred: the point minus `center`.
  const T* center;   // (dims)
  const T* norms;    // (leaves, kLeaf) squared norms of the centred points; padding_norm() after the last
  const T* points;   // (rows, dims) as given
  const T* queries;  // (query rows, dims) as given
  int64_t capacity;  // candidates of a query
  T* tiles;          // (queries, dims) centred queries in the order that the product reads them
  T* sums;           // scratch: feature_sums(capacity) values
};

// So large that padding is ruled out once a list is full, yet below where the product form may overflow.
template <typename T>
constexpr T padding_norm() {
  return std::numeric_limits<T>::max() / 128;
}

// Queries of a block: whole leaves, and whole tiles of the product on every instruction set.
constexpr int kFeatureBlock = 3 * kLeaf;

// Values up to `capacity`, and a vector more.
constexpr int64_t feature_sums(int64_t capacity) {
  return capacity + 16;
}

// Limits that a tile may read beyond the last query.
constexpr int64_t kLimitPad = 16;

// More room means fewer cuts, but also candidates that an earlier cut would have kept out.
constexpr int64_t feature_capacity(int64_t slots) {
  return slots <= kSortedSlots ? std::max<int64_t>(kLeaf, slots * 9 / 4 + 3) : 2 * slots;
}

// tree_search: the queries in leaves [begin, end) of the packed queries.
// feature_search: gathers the candidates of up to kFeatureBlock queries; packs their tiles first.
// feature_pack, feature_pair: where a cloud's points are the queries, in the same order. The first packs the
//   tiles of the block of kFeatureBlock points that begins with a leaf; the second multiplies two such
//   blocks, or one with itself, and each product serves the queries of both.
// feature_guess: sets the limits of a packed block of queries by a sample of the points.
// feature_finish: measures the candidates of `count` queries and writes their rows of distances and indices.
#define AVATAR_DECLARE_TYPE(T)                                                                            \
  void tree_search(const TreeSearchArgs<T>& args, int64_t begin, int64_t end);                            \
  void feature_search(const FeatureSearchArgs<T>& args, const FeatureQueries<T>& queries, int count);     \
  void feature_pack(const FeatureSearchArgs<T>& args, int64_t leaf);                                      \
  void feature_guess(const FeatureSearchArgs<T>& args, const FeatureQueries<T>& queries,                  \
                     const FeatureSample<T>& sample, int64_t leaf);                                       \
  void feature_pair(const FeatureSearchArgs<T>& args, const FeatureQueries<T>& queries, int64_t row_leaf, \
                    int64_t column_leaf);                                                                 \
  void feature_finish(const FeatureSearchArgs<T>& args, const FeatureQueries<T>& queries, int count);
#define AVATAR_DECLARE(ISA)   \
  namespace ISA {             \
  AVATAR_DECLARE_TYPE(float)  \
  AVATAR_DECLARE_TYPE(double) \
  }
AVATAR_FOR_EACH_ISA(AVATAR_DECLARE)
#undef AVATAR_DECLARE
#undef AVATAR_DECLARE_TYPE

}  // namespace avatar
