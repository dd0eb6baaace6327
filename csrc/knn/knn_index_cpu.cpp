#include <algorithm>
#include <mutex>
#include <thread>

#include "common/radix_sort.h"
#include "knn/knn_index.h"
#include "knn/knn_tree_build.h"

namespace avatar {
namespace {

// Nodes with more leaves than this are split by tasks of their own; smaller ones are built by one.
constexpr int64_t kSubtreeLeaves = 128;
// Nodes of so many leaves or more are split by all threads together, as long as there are too few for a task
// each.
constexpr int64_t kSharedLeaves = 1024;

int64_t leaves_of(int64_t points) {
  return (points + kLeaf - 1) / kLeaf;
}

struct TreeTask {
  int64_t cloud;
  TreeNode node;
  int from;

  TreeTask left() const { return {cloud, node.left(), 1 - from}; }
  TreeTask right() const { return {cloud, node.right(), 1 - from}; }
};

// The tree does not depend on who splits what.
template <typename Builder>
void build_trees(std::vector<Builder>& builders) {
  std::vector<TreeTask> waiting, splits;
  int64_t leaves = 0;
  for (size_t cloud = 0; cloud < builders.size(); ++cloud) {
    const TreeTask whole{static_cast<int64_t>(cloud), {0, 0, builders[cloud].leaves()}, 0};
    if (whole.node.leaves()) waiting.push_back(whole);
    leaves += whole.node.leaves();
  }
  const int64_t threads = torch::stable::get_num_threads();
  while (threads > 1 && static_cast<int64_t>(waiting.size()) < 2 * threads) {
    const auto largest = std::max_element(
        waiting.begin(), waiting.end(),
        [](const TreeTask& a, const TreeTask& b) { return a.node.leaves() < b.node.leaves(); });
    if (largest == waiting.end() || largest->node.leaves() < kSharedLeaves) break;
    const TreeTask task = *largest;
    builders[task.cloud].split(task.node, task.from,
                               [](int64_t tasks, const auto& body) { parallel_tasks(tasks, body); });
    splits.push_back(task);
    *largest = task.right();
    waiting.push_back(task.left());
  }

  // Large nodes are split by whoever is free, which gives two more tasks.
  std::mutex mutex;
  int64_t unfinished = static_cast<int64_t>(waiting.size());
  const auto work = [&](int64_t, int64_t) {
    std::unique_lock lock(mutex);
    while (unfinished) {
      if (waiting.empty()) {
        lock.unlock();
        std::this_thread::yield();
        lock.lock();
        continue;
      }
      const TreeTask task = waiting.back();
      waiting.pop_back();
      lock.unlock();
      Builder& builder = builders[task.cloud];
      const bool large = task.node.leaves() > kSubtreeLeaves;
      if (large) {
        builder.split(task.node, task.from);
      } else {
        builder.build(task.node, task.from);
      }
      lock.lock();
      if (large) {
        splits.push_back(task);
        waiting.push_back(task.right());
        waiting.push_back(task.left());
        ++unfinished;
      } else {
        --unfinished;
      }
    }
  };
  const int64_t useful = (leaves + kSubtreeLeaves - 1) / kSubtreeLeaves;
  torch::stable::parallel_for(0, std::min(useful, threads), 1, work);
  // Every split was noted before those below it.
  for (auto task = splits.rbegin(); task != splits.rend(); ++task) builders[task->cloud].join(task->node);
}

// Makes the records of every cloud and sets the counts.
template <typename Builder>
void read_records(std::vector<Builder>& builders, const Clouds& clouds, int64_t* counts) {
  struct Block {
    int64_t cloud, begin, end, place;
  };
  std::vector<Block> blocks;
  for (int64_t cloud = 0; cloud < clouds.count(); ++cloud) {
    for (int64_t begin = 0; begin < clouds.length[cloud]; begin += Builder::kBlock) {
      blocks.push_back({cloud, begin, std::min(begin + Builder::kBlock, clouds.length[cloud]), 0});
    }
  }
  const int64_t tasks = static_cast<int64_t>(blocks.size());
  const auto is_only = [&](const Block& block) { return clouds.length[block.cloud] <= Builder::kBlock; };
  parallel_tasks(tasks, [&](int64_t task) {
    Block& block = blocks[task];
    Builder& builder = builders[block.cloud];
    // With one block, reading tells the number.
    block.place = is_only(block) ? builder.read(block.begin, block.end, 0)
                                 : builder.count_finite(block.begin, block.end);
  });
  std::fill_n(counts, clouds.count(), 0);
  for (Block& block : blocks) counts[block.cloud] += std::exchange(block.place, counts[block.cloud]);
  parallel_tasks(tasks, [&](int64_t task) {
    const Block& block = blocks[task];
    if (!is_only(block)) builders[block.cloud].read(block.begin, block.end, block.place);
  });
  for (int64_t cloud = 0; cloud < clouds.count(); ++cloud) builders[cloud].set_count(counts[cloud]);
}

// Fills what ragged clouds leave unused, so that an index has no undefined values.
template <typename T>
void clear_unused(const Tensor& tensor, const Clouds& clouds, const int64_t* counts, int64_t per_leaf,
                  T value) {
  T* data = mutable_data<T>(tensor);
  parallel_tasks(clouds.count(), [&](int64_t cloud) {
    const int64_t used = clouds.leaf[cloud] + leaves_of(counts[cloud]);
    std::fill(data + used * per_leaf, data + clouds.leaf[cloud + 1] * per_leaf, value);
  });
}

template <typename T, int kDims>
void fill_tree(const Tensor& points, const Clouds& clouds, const KnnIndex& index) {
  const int64_t dims = points.size(points.dim() - 1), size = dims + 1;
  int64_t* counts = mutable_data<int64_t>(index.counts);
  int64_t rows = 0;
  for (const int64_t length : clouds.length) rows += length;
  const Buffer<T> records = buffer<T>(rows * size), other = buffer<T>(rows * size);
  const Buffer<uint8_t> numbers = buffer<uint8_t>(rows);
  std::vector<TreeBuilder<T, kDims>> builders;
  int64_t row = 0;
  for (int64_t cloud = 0; cloud < clouds.count(); ++cloud) {
    builders.push_back({const_data<T>(points) + clouds.row[cloud] * dims, dims,
                        tree_of<T>(index, dims, clouds.leaf[cloud])});
    builders.back().use_buffers(records.get() + row * size, other.get() + row * size, numbers.get() + row);
    row += clouds.length[cloud];
  }
  read_records(builders, clouds, counts);
  build_trees(builders);
  for (int64_t cloud = 0; cloud < clouds.count(); ++cloud) {
    // The last node of a tree over l leaves is 2 l - 2.
    const int64_t last = 2 * (clouds.leaf[cloud] + leaves_of(counts[cloud])) - 1;
    if (!counts[cloud]) continue;
    std::fill_n(mutable_data<T>(index.bounds) + last * 2 * dims, 2 * dims, T(0));
    mutable_data<int32_t>(index.extra)[last] = -1;
  }
  clear_unused(index.coordinates, clouds, counts, dims * kLeaf, T(0));
  clear_unused(index.order, clouds, counts, kLeaf, int32_t{-1});
  clear_unused(index.bounds, clouds, counts, 4 * dims, T(0));
  clear_unused(index.extra, clouds, counts, 2, int32_t{-1});
}

template <typename T>
void fill_features(const Tensor& points, const Clouds& clouds, const KnnIndex& index) {
  const int64_t dims = points.size(points.dim() - 1);
  const int64_t* counts = const_data<int64_t>(index.counts);
  const int32_t* order = const_data<int32_t>(index.order);
  const T* rows = const_data<T>(points);
  T* centers = mutable_data<T>(index.extra);
  constexpr int64_t kColumns = 64;
  const int64_t column_tasks = (dims + kColumns - 1) / kColumns;
  parallel_tasks(clouds.count() * column_tasks, [&](int64_t task) {
    const int64_t cloud = task / column_tasks, begin = task % column_tasks * kColumns;
    const int64_t columns = std::min(kColumns, dims - begin);
    double sums[kColumns] = {};
    for (int64_t i = 0; i < counts[cloud]; ++i) {
      const T* point = rows + (clouds.row[cloud] + order[clouds.leaf[cloud] * kLeaf + i]) * dims + begin;
      for (int64_t d = 0; d < columns; ++d) sums[d] += point[d];
    }
    const double scale = 1.0 / std::max<int64_t>(counts[cloud], 1);
    for (int64_t d = 0; d < columns; ++d) centers[cloud * dims + begin + d] = static_cast<T>(sums[d] * scale);
  });

  std::vector<int64_t> cloud_of(clouds.leaf.back());
  for (int64_t cloud = 0; cloud < clouds.count(); ++cloud) {
    std::fill(cloud_of.begin() + clouds.leaf[cloud], cloud_of.begin() + clouds.leaf[cloud + 1], cloud);
  }
  T* coordinates = mutable_data<T>(index.coordinates);
  T* norms = mutable_data<T>(index.bounds);
  torch::stable::parallel_for(0, clouds.leaf.back(), 16, [&](int64_t begin, int64_t end) {
    for (int64_t leaf = begin; leaf < end; ++leaf) {
      const int64_t cloud = cloud_of[leaf];
      const T* center = centers + cloud * dims;
      T* packed = coordinates + leaf * dims * kLeaf;
      for (int64_t i = 0; i < kLeaf; ++i) {
        const int64_t row = order[leaf * kLeaf + i];
        const T* point = rows + (clouds.row[cloud] + row) * dims;
        T norm = row < 0 ? padding_norm<T>() : T(0);
        for (int64_t d = 0; d < dims; ++d) {
          const T value = row < 0 ? T(0) : point[d] - center[d];
          packed[d * kLeaf + i] = value;
          norm += value * value;
        }
        norms[leaf * kLeaf + i] = norm;
      }
    }
  });
}

}  // namespace

Clouds padded_clouds(const Tensor& points, const std::optional<Tensor>& lengths, const char* argument) {
  const int64_t batch = points.size(0), rows = points.size(1);
  if (rows > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("knn: got clouds of " + std::to_string(rows) +
                                " points, expected less than 2^31");
  }
  Clouds clouds;
  clouds.length.assign(batch, rows);
  if (lengths) {
    const Tensor contiguous = as_contiguous(*lengths);
    const int64_t* values = const_data<int64_t>(contiguous);
    for (int64_t b = 0; b < batch; ++b) {
      if (values[b] < 0 || values[b] > rows) {
        throw std::invalid_argument("knn: " + std::string(argument) + "[" + std::to_string(b) +
                                    "] = " + std::to_string(values[b]) + "; expected a length in [0, " +
                                    std::to_string(rows) + "]");
      }
      clouds.length[b] = values[b];
    }
  }
  for (int64_t b = 0; b <= batch; ++b) {
    if (b < batch) clouds.row.push_back(b * rows);
    clouds.leaf.push_back(b * leaves_of(rows));
  }
  return clouds;
}

KnnIndex build_index(const Tensor& points, const Clouds& clouds) {
  const int64_t dims = points.size(points.dim() - 1), leaves = clouds.leaf.back();
  const bool tree = uses_tree(dims);
  const auto empty = [&](torch::headeronly::IntHeaderOnlyArrayRef size, ScalarType type) {
    return torch::stable::new_empty(points, size, type);
  };
  const ScalarType type = points.scalar_type();
  KnnIndex index{empty({leaves, dims, kLeaf}, type), empty({leaves, kLeaf}, ScalarType::Int),
                 empty({clouds.count()}, ScalarType::Long),
                 tree ? empty({2 * leaves, 2, dims}, type) : empty({leaves, kLeaf}, type),
                 tree ? empty({2 * leaves}, ScalarType::Int) : empty({clouds.count(), dims}, type)};
  int64_t* counts = mutable_data<int64_t>(index.counts);
  int32_t* order = mutable_data<int32_t>(index.order);
  dispatch_compute(type, "knn", [&](auto zero) {
    using T = decltype(zero);
    if (tree) {
      if (dims == 3) return fill_tree<T, 3>(points, clouds, index);
      if (dims == 2) return fill_tree<T, 2>(points, clouds, index);
      return fill_tree<T, 0>(points, clouds, index);
    }
    parallel_tasks(clouds.count(), [&](int64_t cloud) {
      int32_t* rows = order + clouds.leaf[cloud] * kLeaf;
      counts[cloud] =
          finite_rows(const_data<T>(points) + clouds.row[cloud] * dims, clouds.length[cloud], dims, rows);
      std::fill(rows + counts[cloud], order + clouds.leaf[cloud + 1] * kLeaf, -1);
    });
    fill_features<T>(points, clouds, index);
  });
  return index;
}

std::vector<Tensor> parts_of(const KnnIndex& index, const Tensor& points, const Clouds& clouds) {
  const int64_t batch = points.size(0), dims = points.size(2), leaves = batch ? clouds.leaf[1] : 0;
  const auto batched = [](const Tensor& tensor, std::vector<int64_t> sizes) {
    return torch::stable::reshape(tensor, {sizes.data(), sizes.size()});
  };
  return {batched(index.coordinates, {batch, leaves, dims, kLeaf}),
          batched(index.order, {batch, leaves, kLeaf}), index.counts,
          uses_tree(dims) ? batched(index.bounds, {batch, 2 * leaves, 2, dims})
                          : batched(index.bounds, {batch, leaves, kLeaf}),
          uses_tree(dims) ? batched(index.extra, {batch, 2 * leaves}) : index.extra};
}

}  // namespace avatar
