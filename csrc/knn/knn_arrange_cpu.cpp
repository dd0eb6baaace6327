#include <numeric>

#include "knn/knn_tree_build.h"

namespace avatar {
namespace {

// The tree of one cloud, whose points are brought into an order of their own.
template <typename T>
class ArrangedTree {
 public:
  ArrangedTree(int64_t dims, const TreeTarget<T>& tree, int64_t count)
      : dims_(dims), tree_(tree), leaf_nodes_((count + kLeaf - 1) / kLeaf) {
    if (leaves()) number({0, 0, leaves()});
  }

  int64_t leaves() const { return static_cast<int64_t>(leaf_nodes_.size()); }

  // Sorts the points of a whole leaf by the coordinate in which they spread the most.
  void sort_leaf(int64_t leaf) const {
    int32_t *order = tree_.order + leaf * kLeaf, places[kLeaf] = {}, rows[kLeaf];
    if (order[kLeaf - 1] < 0) return;
    const T* box = tree_.boxes + leaf_nodes_[leaf] * 2 * dims_;
    const auto spread = [=](int64_t d) { return box[dims_ + d] - box[d]; };
    int64_t widest = 0;
    for (int64_t d = 1; d < dims_; ++d) {
      if (spread(d) > spread(widest)) widest = d;
    }
    T *coordinates = tree_.coordinates + leaf * dims_ * kLeaf, values[kLeaf];
    std::copy_n(coordinates + widest * kLeaf, kLeaf, values);
    for (int i = 0; i < kLeaf; ++i) {
      for (int j = 0; j < kLeaf; ++j) {
        places[j] += (values[i] < values[j]) | ((values[i] == values[j]) & (i < j));
      }
    }
    std::copy_n(order, kLeaf, rows);
    for (int i = 0; i < kLeaf; ++i) order[places[i]] = rows[i];
    for (int64_t d = 0; d < dims_; ++d) {
      std::copy_n(coordinates + d * kLeaf, kLeaf, values);
      for (int i = 0; i < kLeaf; ++i) coordinates[d * kLeaf + places[i]] = values[i];
    }
  }

 private:
  // The smallest row of each node, and the nodes of the leaves.
  void number(const TreeNode& node) {
    tree_.lowest[node.id] = static_cast<int32_t>(node.begin * kLeaf);
    if (node.leaves() == 1) {
      leaf_nodes_[node.begin] = node.id;
    } else {
      number(node.left());
      number(node.right());
    }
  }

  const int64_t dims_;
  const TreeTarget<T> tree_;
  std::vector<int64_t> leaf_nodes_;
};

// The index of points (B, N, D) whose rows are in its own order, and that order (B, N): rows that are not in
// the index come last.
std::tuple<Tensor, std::vector<Tensor>> knn_arrange_cpu(const Tensor& points_in,
                                                        const std::optional<Tensor>& lengths) {
  const Tensor points = to_compute(points_in);
  const Clouds clouds = padded_clouds(points, lengths, "lengths");
  const KnnIndex index = build_index(points, clouds);
  const int64_t rows = points.size(1), dims = points.size(2);
  const int64_t* counts = const_data<int64_t>(index.counts);
  dispatch_compute(points.scalar_type(), "knn_arrange", [&](auto zero) {
    using T = decltype(zero);
    for (int64_t cloud = 0; uses_tree(dims) && cloud < clouds.count(); ++cloud) {
      const ArrangedTree<T> tree(dims, tree_of<T>(index, dims, clouds.leaf[cloud]), counts[cloud]);
      parallel_parts(tree.leaves(), 64, 1, [&](int64_t begin, int64_t end) {
        for (int64_t leaf = begin; leaf < end; ++leaf) tree.sort_leaf(leaf);
      });
    }
  });
  Tensor order = torch::stable::new_empty(points, {points.size(0), rows}, ScalarType::Long);
  int64_t* target = mutable_data<int64_t>(order);
  int32_t* indexed = mutable_data<int32_t>(index.order);
  parallel_tasks(clouds.count(), [&](int64_t cloud) {
    const int64_t count = counts[cloud];
    int32_t* own = indexed + clouds.leaf[cloud] * kLeaf;
    int64_t* place = std::copy_n(own, count, target + cloud * rows);
    if (count < rows) {
      std::vector<bool> is_in(rows, false);
      for (int64_t i = 0; i < count; ++i) is_in[own[i]] = true;
      for (int64_t row = 0; row < rows; ++row) {
        if (!is_in[row]) *place++ = row;
      }
    }
    std::iota(own, own + count, 0);
  });
  return {order, parts_of(index, points, clouds)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avatar_ops, CPU, m) {
  m.impl("knn_arrange", TORCH_BOX(&knn_arrange_cpu));
}

}  // namespace avatar
