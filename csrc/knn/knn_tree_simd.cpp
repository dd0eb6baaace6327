// Search of a kd-tree: the queries of a leaf, which lie close together, share one walk down the tree.
#include <algorithm>
#include <type_traits>

#include "knn/knn_lanes.h"
#include "knn/knn_list.h"
#include "knn/knn_simd.h"
#include "knn/knn_vector.h"

namespace avatar {
namespace AVATAR_ISA {
namespace {

// Leaves gathered by the walk before they are scanned: many enough to sort and test together, few enough to
// prune by what they contain.
constexpr int kCandidates = 64;
// A walk holds one pending sibling per level, and a cloud has fewer than 2^31 points.
constexpr int kStack = 40;

template <typename T>
struct Node {
  int64_t id, begin, end;
  // Lower bound of (distance, row) over the node's points and the group's queries.
  Key<T> bound;
  // Orders nodes whose boxes both touch the group.
  T center_distance;
};

template <typename T, int kDims, typename List>
class GroupSearch {
 public:
  explicit GroupSearch(const TreeSearchArgs<T>& args) : args_(args) {}

  // Queries [first, first + count) of a packed leaf; at most kLeaf, one for a BufferList.
  void run(int64_t leaf, int first, int count) {
    leaf_ = leaf, first_ = first, count_ = count;
    const T* coordinates = args_.query_coordinates + leaf * dims() * kLeaf;
    for (int d = 0; d < dims(); ++d) {
      const T* values = coordinates + d * kLeaf;
      low_[d] = *std::min_element(values + first, values + first + count);
      high_[d] = *std::max_element(values + first, values + first + count);
    }
    for (int q = 0; q < count; ++q) {
      List::reset(states_[q], args_.slots);
      prefetch_results(args_.query_order[leaf * kLeaf + first + q]);
    }
    worst_ = Key<T>::missing();
    walk();
    for (int q = 0; q < count; ++q) {
      const int64_t row = args_.query_order[leaf * kLeaf + first + q];
      write_row<List>(states_[q], args_.slots, args_.k, args_.distances + row * args_.k,
                      args_.indices + row * args_.k);
    }
  }

 private:
  int64_t dims() const { return kDims ? kDims : args_.dims; }
  static constexpr int kMaxDims = kDims ? kDims : kTreeDims;
  static constexpr int kLanes = Lanes<T>::kCount;
  static constexpr int kGroup = std::is_same_v<List, BufferList<T>> ? 1 : kLeaf;
  using Vector = typename Lanes<T>::Vector;

  // Queries next to each other may be anywhere in memory.
  void prefetch_results(int64_t row) const {
    constexpr int kLine = 64;
    const int64_t k = args_.k;
    for (int64_t i = 0; i < k && i < kSortedSlots; i += kLine / sizeof(T)) {
      __builtin_prefetch(args_.distances + row * k + i, 1);
    }
    for (int64_t i = 0; i < k && i < kSortedSlots; i += kLine / sizeof(int64_t)) {
      __builtin_prefetch(args_.indices + row * k + i, 1);
    }
  }

  Node<T> node(int64_t id, int64_t begin, int64_t end) const {
    const T* low = args_.boxes + id * 2 * dims();
    const T* high = low + dims();
    T distance = 0, center_distance = 0;
    for (int d = 0; d < dims(); ++d) {
      const T gap = std::max(std::max(low[d] - high_[d], low_[d] - high[d]), T(0));
      distance = multiply_add(gap, gap, distance);
      const T between = (low[d] - high_[d]) + (high[d] - low_[d]);
      center_distance = multiply_add(between, between, center_distance);
    }
    return {id, begin, end, Key<T>::make(distance, args_.lowest[id]), center_distance};
  }

  static bool nearer(const Node<T>& a, const Node<T>& b) {
    const T da = a.bound.distance(), db = b.bound.distance();
    if (da != db) return da < db;
    // Neither holds where the distance overflows to NaN.
    if (a.center_distance < b.center_distance) return true;
    if (a.center_distance > b.center_distance) return false;
    return a.bound < b.bound;
  }

  // Nearest leaves first; what is pending is dropped once no query of the group can gain by it.
  void walk() {
    Node<T> stack[kStack];
    int pending = 0;
    // The first leaves should just fill the lists, so that the rest is pruned well.
    int64_t limit = std::min<int64_t>(kCandidates, args_.slots.count / kLeaf + 2);
    candidates_ = 0;
    stack[pending++] = node(0, 0, args_.leaves);
    while (pending) {
      const Node<T> top = stack[--pending];
      if (!(top.bound < worst_)) continue;
      if (top.end - top.begin > 1) {
        const int64_t middle = top.begin + (top.end - top.begin + 1) / 2;
        Node<T> left = node(top.id + 1, top.begin, middle);
        Node<T> right = node(top.id + 2 * (middle - top.begin), middle, top.end);
        const bool left_first = nearer(left, right);
        const Node<T>& near = left_first ? left : right;
        const Node<T>& far = left_first ? right : left;
        if (far.bound < worst_) stack[pending++] = far;
        if (near.bound < worst_) stack[pending++] = near;
        continue;
      }
      int place = candidates_++;
      for (; place > 0 && top.bound < nodes_[place - 1].bound; --place) nodes_[place] = nodes_[place - 1];
      nodes_[place] = {top.bound, top.id, top.begin};
      if (candidates_ == limit) {
        scan_candidates();
        limit = kCandidates;
      }
    }
    if (candidates_) scan_candidates();
  }

  void scan_candidates() {
    const int padded = (candidates_ + kLanes - 1) / kLanes * kLanes;
    for (int d = 0; d < dims(); ++d) {
      for (int c = 0; c < padded; ++c) {
        const T* box = args_.boxes + nodes_[std::min(c, candidates_ - 1)].id * 2 * dims();
        lows_[d][c] = box[d];
        highs_[d][c] = box[dims() + d];
      }
    }
    worst_ = Key<T>::make(0, 0);
    for (int q = 0; q < count_; ++q) {
      scan_for_query(q);
      const Key<T> worst = List::worst(states_[q]);
      if (worst_ < worst) worst_ = worst;
    }
    candidates_ = 0;
  }

  void scan_for_query(int q) {
    Vector query[kMaxDims];
    const T* coordinates = args_.query_coordinates + leaf_ * dims() * kLeaf + first_ + q;
    for (int d = 0; d < dims(); ++d) query[d] = broadcast(coordinates[d * kLeaf]);
    const int32_t self = args_.exclude_self ? args_.query_order[leaf_ * kLeaf + first_ + q] : -1;
    List list(states_[q]);
    for (int c = 0; c < candidates_; c += kLanes) {
      Vector bound{};
      for (int d = 0; d < dims(); ++d) {
        const Vector gap =
            larger(larger(load(lows_[d] + c) - query[d], query[d] - load(highs_[d] + c)), Vector{});
        bound = multiply_add(gap, gap, bound);
      }
      uint32_t hits = not_greater(bound, broadcast(list.worst().distance()));
      if (candidates_ - c < kLanes) hits &= (1u << (candidates_ - c)) - 1;
      if (!hits) continue;
      alignas(kVectorBytes) T bounds[kLanes];
      store(bounds, bound);
      for (; hits; hits &= hits - 1) {
        const int lane = __builtin_ctz(hits);
        const Candidate& candidate = nodes_[c + lane];
        const int32_t lowest = candidate.bound.row();
        if (Key<T>::make(bounds[lane], lowest) < list.worst()) scan_leaf(candidate.leaf, query, self, list);
      }
    }
  }

  void scan_leaf(int64_t leaf, const Vector* query, int32_t self, List& list) const {
    const T* coordinates = args_.coordinates + leaf * dims() * kLeaf;
    const int32_t* order = args_.order + leaf * kLeaf;
    const Vector worst = broadcast(list.worst().distance());
    typename List::Adder adder(list);
    for (int i = 0; i < kLeaf; i += kLanes) {
      Vector distance{};
      for (int d = 0; d < dims(); ++d) {
        const Vector difference = load(coordinates + d * kLeaf + i) - query[d];
        distance = multiply_add(difference, difference, distance);
      }
      // The key of a padding slot is that of a missing neighbour, which is never below the worst.
      adder.add(distance, order + i, not_greater(distance, worst) & ~equal_rows<kLanes>(order + i, self));
    }
  }

  struct Candidate {
    Key<T> bound;
    int64_t id, leaf;
  };

  const TreeSearchArgs<T>& args_;
  int64_t leaf_;
  int first_, count_;
  T low_[kMaxDims], high_[kMaxDims];
  // The worst key over the group's lists.
  Key<T> worst_;
  int candidates_;
  Candidate nodes_[kCandidates];
  alignas(kVectorBytes) T lows_[kMaxDims][kCandidates], highs_[kMaxDims][kCandidates];
  typename List::State states_[kGroup];
};

inline int queries_in(const int32_t* order) {
  int count = kLeaf;
  while (count && order[count - 1] < 0) --count;
  return count;
}

template <int kDims, int kCapacity>
void search_lanes(const TreeSearchArgs<float>& args, int64_t begin, int64_t end) {
  LaneSearch<kDims, kCapacity> lanes(args);
  for (int64_t leaf = begin; leaf < end; ++leaf) lanes.run(leaf, queries_in(args.query_order + leaf * kLeaf));
}

template <int kDims>
void search_lanes(const TreeSearchArgs<float>& args, int64_t begin, int64_t end) {
  if (args.slots.count <= 8) return search_lanes<kDims, 8>(args, begin, end);
  if (args.slots.count <= 16) return search_lanes<kDims, 16>(args, begin, end);
  search_lanes<kDims, 32>(args, begin, end);
}

template <typename T, int kDims, typename List>
void search(const TreeSearchArgs<T>& args, int64_t begin, int64_t end) {
  GroupSearch<T, kDims, List> group(args);
  for (int64_t leaf = begin; leaf < end; ++leaf) {
    const int count = queries_in(args.query_order + leaf * kLeaf);
    if (std::is_same_v<List, BufferList<T>>) {
      for (int q = 0; q < count; ++q) group.run(leaf, q, 1);
    } else {
      group.run(leaf, 0, count);
    }
  }
}

}  // namespace

void tree_search(const TreeSearchArgs<float>& args, int64_t begin, int64_t end) {
  if (args.slots.count <= kLaneSlots) {
    if (args.dims == 3) return search_lanes<3>(args, begin, end);
    if (args.dims == 2) return search_lanes<2>(args, begin, end);
    return search_lanes<0>(args, begin, end);
  }
  with_list(0.0f, args.slots, [&](auto tag) {
    using List = typename decltype(tag)::type;
    if (args.dims == 3) return search<float, 3, List>(args, begin, end);
    if (args.dims == 2) return search<float, 2, List>(args, begin, end);
    search<float, 0, List>(args, begin, end);
  });
}

void tree_search(const TreeSearchArgs<double>& args, int64_t begin, int64_t end) {
  with_list(0.0, args.slots,
            [&](auto tag) { search<double, 0, typename decltype(tag)::type>(args, begin, end); });
}

}  // namespace AVATAR_ISA
}  // namespace avatar
