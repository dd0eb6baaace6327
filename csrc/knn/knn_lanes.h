// Search of a kd-tree for few float neighbours. The queries of a leaf lie close together: they share one walk
// down the tree, and their lists are sorted side by side, a query in each lane. For *_simd.cpp only.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "knn/knn_list.h"
#include "knn/knn_simd.h"
#include "knn/knn_sort.h"
#include "knn/knn_vector.h"

namespace avatar {
namespace AVATAR_ISA {
namespace {

// Neighbours that the search is made for: those of a leaf should give a good first bound.
constexpr int kLaneSlots = kLeaf;

template <int kDims, int kCapacity>
class LaneSearch {
 public:
  explicit LaneSearch(const TreeSearchArgs<float>& args)
      : args_(args), own_queries_(args.query_order == args.order) {}

  // The first `count` queries of a packed leaf.
  void run(int64_t leaf, int count) {
    count_ = count;
    queries_ = args_.query_coordinates + leaf * dims() * kLeaf;
    query_rows_ = args_.query_order + leaf * kLeaf;
    for (int q = 0; q < count; ++q) prefetch_results(query_rows_[q]);
    for (int d = 0; d < dims(); ++d) {
      const float* values = queries_ + d * kLeaf;
      low_[d] = *std::min_element(values, values + count);
      high_[d] = *std::max_element(values, values + count);
    }
    std::fill_n(pending_, kLeaf, 0);
    first_leaf_ = own_queries_ ? leaf : nearest_leaf();
    scan_first();
    walk();
    write();
  }

 private:
  int64_t dims() const { return kDims ? kDims : args_.dims; }
  static constexpr int kMaxDims = kDims ? kDims : kTreeDims;
  static constexpr int kLanes = Lanes<float>::kCount;
  static constexpr int kLists = kLeaf / kKeyLanes;
  static constexpr int kBatch = 16;
  // Distances that wait to be sorted in; one leaf more fits, and what a vector writes beyond its last lane.
  static constexpr int kWaiting = 32, kRoom = kWaiting + kLeaf + kLanes;
  // Leaves found by the walk before they are scanned, at first few, as what they hold tightens the bounds.
  static constexpr int kFirstCandidates = 16, kCandidates = 64;
  // A walk holds one pending sibling per level, and a cloud has fewer than 2^31 points.
  static constexpr int kStack = 40;

  struct Node {
    int64_t id, begin, end;
    float bound;
  };

  // The query in a lane of a list: two lists share a vector of distances, as interleaving leaves them.
  static constexpr int query_of(int list, int lane) {
    return list / 2 * kLanes + lane / 2 * 4 + lane % 2 + list % 2 * 2;
  }
  static constexpr int list_of(int query) { return query / kLanes * 2 + query % 4 / 2; }

  // Queries next to each other may be anywhere in memory.
  void prefetch_results(int64_t row) const {
    constexpr int kLine = 64;
    const int64_t k = std::min<int64_t>(args_.k, kLaneSlots);
    for (int64_t i = 0; i < k; i += kLine / sizeof(float)) {
      __builtin_prefetch(args_.distances + row * args_.k + i, 1);
    }
    for (int64_t i = 0; i < k; i += kLine / sizeof(int64_t)) {
      __builtin_prefetch(args_.indices + row * args_.k + i, 1);
    }
  }

  Node node(int64_t id, int64_t begin, int64_t end) const {
    const float* low = args_.boxes + id * 2 * dims();
    const float* high = low + dims();
    float bound = 0;
    for (int d = 0; d < dims(); ++d) {
      const float gap = std::max(std::max(low[d] - high_[d], low_[d] - high[d]), 0.0f);
      bound = multiply_add(gap, gap, bound);
    }
    return {id, begin, end, bound};
  }

  Node left_of(const Node& node_) const { return node(node_.id + 1, node_.begin, middle_of(node_)); }
  Node right_of(const Node& node_) const {
    const int64_t middle = middle_of(node_);
    return node(node_.id + 2 * (middle - node_.begin), middle, node_.end);
  }
  static int64_t middle_of(const Node& node) { return node.begin + (node.end - node.begin + 1) / 2; }

  int64_t nearest_leaf() const {
    Node top = node(0, 0, args_.leaves);
    while (top.end - top.begin > 1) {
      const Node left = left_of(top), right = right_of(top);
      top = right.bound < left.bound ? right : left;
    }
    return top.begin;
  }

  // Starts the lists with the points of the first leaf.
  void scan_first() {
    const float* points = args_.coordinates + first_leaf_ * dims() * kLeaf;
    const int32_t* order = args_.order + first_leaf_ * kLeaf;
    const FloatVector infinity = broadcast(std::numeric_limits<float>::infinity());
    for (int v = 0; v * kLanes < count_; ++v) {
      FloatVector query[kMaxDims];
      for (int d = 0; d < dims(); ++d) query[d] = load(queries_ + d * kLeaf + v * kLanes);
      const RowVector own = load(query_rows_ + v * kLanes);
      DoubleVector keys[2][kLeaf];
      for (int i = 0; i < kLeaf; ++i) {
        FloatVector distance{};
        for (int d = 0; d < dims(); ++d) {
          const FloatVector difference = broadcast(points[d * kLeaf + i]) - query[d];
          distance = multiply_add(difference, difference, distance);
        }
        RowVector row = order[i] - RowVector{};
        if (args_.exclude_self) {
          const RowVector is_self = row == own;
          distance = is_self ? infinity : distance;
          row |= is_self;
        }
        interleave_keys(distance, row, keys[0][i], keys[1][i]);
      }
      for (int half = 0; half < 2; ++half) {
        DoubleVector* list = lists_[2 * v + half];
        sort_columns<kBatch>(keys[half]);
        sort_columns<kBatch>(keys[half] + kBatch);
        constexpr int kFirst = std::min(kBatch, kCapacity);
        copy_vectors<kFirst>(keys[half], list);
        for (int i = kFirst; i < kCapacity; ++i) list[i] = broadcast(missing());
        merge_columns<kCapacity, kBatch>(list, keys[half] + kBatch);
        update_limits(2 * v + half);
      }
    }
  }

  static RowVector lane_numbers() {
    RowVector numbers;
    for (int lane = 0; lane < kLanes; ++lane) numbers[lane] = lane;
    return numbers;
  }

  static double missing() {
    const int64_t bits = Key<float>::missing().bits;
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  // What the queries of a list need of a point to take it.
  void update_limits(int list) {
    int64_t worst[kKeyLanes];
    std::memcpy(worst, &lists_[list][args_.slots.count - 1], sizeof worst);
    for (int lane = 0; lane < kKeyLanes; ++lane) {
      const int query = query_of(list, lane);
      const Key<float> key{worst[lane]};
      limits_[query] = query < count_ ? key.distance() : -1;
      limit_rows_[query] = key.row() < 0 ? std::numeric_limits<int32_t>::max() : key.row();
    }
  }

  // What the group as a whole needs.
  void find_worst() {
    worst_ = -1, worst_row_ = -1;
    for (int q = 0; q < count_; ++q) worst_ = std::max(worst_, limits_[q]);
    for (int q = 0; q < count_; ++q) {
      worst_row_ = std::max(worst_row_, limits_[q] == worst_ ? limit_rows_[q] : -1);
    }
  }

  bool useful(const Node& node) const {
    return node.bound < worst_ || (node.bound == worst_ && args_.lowest[node.id] < worst_row_);
  }

  // Nearest leaves first; what is pending is dropped once no query of the group can gain by it.
  void walk() {
    Node stack[kStack];
    int pending = 0, limit = kFirstCandidates;
    candidates_ = 0;
    find_worst();
    stack[pending++] = node(0, 0, args_.leaves);
    while (pending) {
      const Node top = stack[--pending];
      if (!useful(top)) continue;
      if (top.end - top.begin > 1) {
        const Node left = left_of(top), right = right_of(top);
        const bool left_first = !(right.bound < left.bound);
        stack[pending] = left_first ? right : left;
        pending += useful(stack[pending]);
        stack[pending] = left_first ? left : right;
        pending += useful(stack[pending]);
        continue;
      }
      if (top.begin == first_leaf_) continue;
      candidate_ids_[candidates_] = top.id;
      candidate_leaves_[candidates_++] = top.begin;
      if (candidates_ == limit) {
        scan_candidates();
        limit = kCandidates;
      }
    }
    scan_candidates();
  }

  void scan_candidates() {
    // Own queries found themselves in the first leaf.
    if (args_.exclude_self && !own_queries_) {
      scan_candidates<true>();
    } else {
      scan_candidates<false>();
    }
    candidates_ = 0;
    for (int list = 0; list < kLists; ++list) sort_in(list);
    find_worst();
  }

  template <bool kExcludes>
  void scan_candidates() {
    for (int c = 0; c < candidates_; ++c) {
      const int64_t id = candidate_ids_[c];
      const float* box = args_.boxes + id * 2 * dims();
      for (int v = 0; v * kLanes < count_; ++v) {
        FloatVector bound{};
        for (int d = 0; d < dims(); ++d) {
          const FloatVector query = load(queries_ + d * kLeaf + v * kLanes);
          const FloatVector gap =
              larger(larger(broadcast(box[d]) - query, query - broadcast(box[dims() + d])), FloatVector{});
          bound = multiply_add(gap, gap, bound);
        }
        uint32_t hits =
            below(bound, args_.lowest[id], load(limits_ + v * kLanes), load(limit_rows_ + v * kLanes));
        for (; hits; hits &= hits - 1) {
          const int query = v * kLanes + __builtin_ctz(hits);
          scan_leaf<kExcludes>(candidate_leaves_[c], query);
        }
      }
    }
  }

  // Not inlined, lest the loop around it keep the addresses of all its vectors.
  template <bool kExcludes>
  __attribute__((noinline)) void scan_leaf(int64_t leaf, int q) {
    FloatVector query[kMaxDims];
    for (int d = 0; d < dims(); ++d) query[d] = broadcast(queries_[d * kLeaf + q]);
    const FloatVector limit = broadcast(limits_[q]);
    const float* points = args_.coordinates + leaf * dims() * kLeaf;
    const int32_t* order = args_.order + leaf * kLeaf;
    int64_t pending = pending_[q];
    for (int i = 0; i < kLeaf; i += kLanes) {
      FloatVector distance{};
      for (int d = 0; d < dims(); ++d) {
        const FloatVector difference = load(points + d * kLeaf + i) - query[d];
        distance = multiply_add(difference, difference, distance);
      }
      uint32_t hits = not_greater(distance, limit);
      if (kExcludes) hits &= ~equal_rows<kLanes>(order + i, query_rows_[q]);
      store_lanes(distances_[q] + pending, distance, rows_[q] + pending, order + i, hits);
      pending += __builtin_popcount(hits);
    }
    pending_[q] = pending;
    if (pending > kWaiting) sort_in(list_of(q));
  }

  // Everything that waits for the queries of a list.
  void sort_in(int list) {
    int64_t most = 0;
    for (int lane = 0; lane < kKeyLanes; ++lane) most = std::max(most, pending_[query_of(list, lane)]);
    if (!most) return;
    for (int64_t begin = 0; begin < most; begin += kBatch) {
      alignas(kVectorBytes) int64_t keys[kKeyLanes][kBatch];
      DoubleVector columns[kBatch];
      for (int lane = 0; lane < kKeyLanes; ++lane) {
        const int q = query_of(list, lane);
        for (int64_t i = 0; i < kBatch; i += kLanes) {
          const int64_t first = begin + i;
          const RowVector waits = lane_numbers() < static_cast<int32_t>(pending_[q] - first) - RowVector{};
          DoubleVector low, high;
          interleave_keys(
              waits ? load(distances_[q] + first) : broadcast(std::numeric_limits<float>::infinity()),
              load(rows_[q] + first) | ~waits, low, high);
          store_keys(&keys[lane][i], low);
          store_keys(&keys[lane][i + kKeyLanes], high);
        }
      }
      for (int i = 0; i < kBatch; i += kKeyLanes) transpose_keys(&keys[0][i], kBatch, columns + i);
      sort_columns<kBatch>(columns);
      merge_columns<kCapacity, kBatch>(lists_[list], columns);
    }
    for (int lane = 0; lane < kKeyLanes; ++lane) pending_[query_of(list, lane)] = 0;
    update_limits(list);
  }

  void write() const {
    const int64_t slots = args_.slots.count, k = args_.k;
    for (int list = 0; list < kLists; ++list) {
      if (query_of(list, 0) >= count_) continue;
      alignas(kVectorBytes) int64_t keys[kKeyLanes][kCapacity];
      for (int i = 0; i < kCapacity; i += kKeyLanes) {
        DoubleVector rows[kKeyLanes];
        alignas(kVectorBytes) int64_t columns[kKeyLanes][kKeyLanes];
        for (int lane = 0; lane < kKeyLanes; ++lane) store_keys(columns[lane], lists_[list][i + lane]);
        transpose_keys(columns[0], kKeyLanes, rows);
        for (int lane = 0; lane < kKeyLanes; ++lane) store_keys(&keys[lane][i], rows[lane]);
      }
      for (int lane = 0; lane < kKeyLanes; ++lane) {
        const int q = query_of(list, lane);
        if (q >= count_) continue;
        float* distances = args_.distances + query_rows_[q] * k;
        int64_t* rows = args_.indices + query_rows_[q] * k;
        write_keys(keys[lane], slots, distances, rows);
        write_missing(distances + slots, rows + slots, k - slots);
      }
    }
  }

  const TreeSearchArgs<float>& args_;
  const bool own_queries_;
  const float* queries_;
  const int32_t* query_rows_;
  int count_;
  int64_t first_leaf_;
  float low_[kMaxDims], high_[kMaxDims];
  float worst_;
  int32_t worst_row_;
  int candidates_;
  int64_t candidate_ids_[kCandidates], candidate_leaves_[kCandidates];
  alignas(kVectorBytes) float limits_[kLeaf];
  alignas(kVectorBytes) int32_t limit_rows_[kLeaf];
  DoubleVector lists_[kLists][kCapacity];
  int64_t pending_[kLeaf];
  float distances_[kLeaf][kRoom];
  int32_t rows_[kLeaf][kRoom];
};

}  // namespace
}  // namespace AVATAR_ISA
}  // namespace avatar
