#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <thread>

#include "knn/knn_index.h"

namespace avatar {
namespace {

// Nodes with more leaves than this are split by tasks of their own; smaller ones are built by one.
constexpr int64_t kSubtreeLeaves = 128;

int64_t leaves_of(int64_t points) {
  return (points + kLeaf - 1) / kLeaf;
}

int64_t middle_of(int64_t begin, int64_t end) {
  return begin + (end - begin + 1) / 2;
}

// Sorts as (coordinate, row) does.
struct FloatSplitKey {
  uint64_t bits;

  FloatSplitKey() = default;
  FloatSplitKey(float coordinate, int32_t row) {
    uint32_t high;
    std::memcpy(&high, &coordinate, sizeof(high));
    high ^= high >> 31 ? 0xffffffffu : 0x80000000u;
    bits = uint64_t{high} << 32 | static_cast<uint32_t>(row);
  }
  int32_t row() const { return static_cast<int32_t>(bits); }
  bool operator<(const FloatSplitKey& other) const { return bits < other.bits; }
};

struct DoubleSplitKey {
  double coordinate;
  int32_t point;

  DoubleSplitKey() = default;
  DoubleSplitKey(double coordinate, int32_t row) : coordinate(coordinate), point(row) {}
  int32_t row() const { return point; }
  bool operator<(const DoubleSplitKey& other) const {
    return coordinate < other.coordinate || (coordinate == other.coordinate && point < other.point);
  }
};

template <typename T>
using SplitKey = std::conditional_t<std::is_same_v<T, float>, FloatSplitKey, DoubleSplitKey>;

// Builds the tree of one cloud; nodes of disjoint leaves may be built at the same time.
template <typename T>
struct TreeBuilder {
  const T* points;
  int64_t dims, count;
  int32_t* order;
  T* coordinates;
  T* boxes;
  int32_t* lowest;
  SplitKey<T>* keys;

  // Halves the points of leaves [begin, end) at the middle of their widest dimension.
  void split(int64_t begin, int64_t end) const {
    const int64_t first = begin * kLeaf, last = std::min(end * kLeaf, count);
    T low[kTreeDims], high[kTreeDims];
    std::copy_n(points + order[first] * dims, dims, low);
    std::copy_n(low, dims, high);
    for (int64_t i = first + 1; i < last; ++i) {
      const T* point = points + order[i] * dims;
      for (int64_t d = 0; d < dims; ++d) {
        low[d] = std::min(low[d], point[d]);
        high[d] = std::max(high[d], point[d]);
      }
    }
    int64_t widest = 0;
    for (int64_t d = 1; d < dims; ++d) {
      if (high[d] - low[d] > high[widest] - low[widest]) widest = d;
    }
    for (int64_t i = first; i < last; ++i) keys[i] = {points[order[i] * dims + widest], order[i]};
    std::nth_element(keys + first, keys + middle_of(begin, end) * kLeaf, keys + last);
    for (int64_t i = first; i < last; ++i) order[i] = keys[i].row();
  }

  void build(int64_t id, int64_t begin, int64_t end) const {
    if (end - begin == 1) return pack(id, begin);
    split(begin, end);
    const int64_t middle = middle_of(begin, end);
    build(id + 1, begin, middle);
    build(id + 2 * (middle - begin), middle, end);
    join(id, begin, end);
  }

  void pack(int64_t id, int64_t leaf) const {
    const int64_t first = leaf * kLeaf, filled = std::min<int64_t>(kLeaf, count - first);
    std::fill_n(order + first + filled, kLeaf - filled, -1);
    for (int64_t d = 0; d < dims; ++d) {
      T* values = coordinates + (leaf * dims + d) * kLeaf;
      for (int64_t i = 0; i < filled; ++i) values[i] = points[order[first + i] * dims + d];
      std::fill_n(values + filled, kLeaf - filled, std::numeric_limits<T>::infinity());
      boxes[id * 2 * dims + d] = *std::min_element(values, values + filled);
      boxes[(id * 2 + 1) * dims + d] = *std::max_element(values, values + filled);
    }
    lowest[id] = *std::min_element(order + first, order + first + filled);
  }

  void join(int64_t id, int64_t begin, int64_t end) const {
    const int64_t left = id + 1, right = id + 2 * (middle_of(begin, end) - begin);
    for (int64_t d = 0; d < dims; ++d) {
      boxes[id * 2 * dims + d] = std::min(boxes[left * 2 * dims + d], boxes[right * 2 * dims + d]);
      boxes[(id * 2 + 1) * dims + d] =
          std::max(boxes[(left * 2 + 1) * dims + d], boxes[(right * 2 + 1) * dims + d]);
    }
    lowest[id] = std::min(lowest[left], lowest[right]);
  }
};

struct TreeTask {
  int64_t cloud, id, begin, end;
};

// Large nodes are split by whoever is free, which gives two more tasks; the tree does not depend on by whom.
template <typename T>
void build_trees(const std::vector<TreeBuilder<T>>& builders) {
  std::vector<TreeTask> waiting, splits;
  int64_t points = 0;
  for (size_t cloud = 0; cloud < builders.size(); ++cloud) {
    const int64_t leaves = leaves_of(builders[cloud].count);
    if (leaves) waiting.push_back({static_cast<int64_t>(cloud), 0, 0, leaves});
    points += builders[cloud].count;
  }
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
      const TreeBuilder<T>& builder = builders[task.cloud];
      const bool large = task.end - task.begin > kSubtreeLeaves;
      if (large) {
        builder.split(task.begin, task.end);
      } else {
        builder.build(task.id, task.begin, task.end);
      }
      lock.lock();
      if (large) {
        const int64_t middle = middle_of(task.begin, task.end);
        splits.push_back(task);
        waiting.push_back({task.cloud, task.id + 1, task.begin, middle});
        waiting.push_back({task.cloud, task.id + 2 * (middle - task.begin), middle, task.end});
        ++unfinished;
      } else {
        --unfinished;
      }
    }
  };
  const int64_t useful = (points + kSubtreeLeaves * kLeaf - 1) / (kSubtreeLeaves * kLeaf);
  torch::stable::parallel_for(0, std::min<int64_t>(useful, torch::stable::get_num_threads()), 1, work);
  // Every split was noted before those below it.
  for (auto task = splits.rbegin(); task != splits.rend(); ++task) {
    builders[task->cloud].join(task->id, task->begin, task->end);
  }
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

template <typename T>
void fill_tree(const Tensor& points, const Clouds& clouds, const KnnIndex& index) {
  const int64_t dims = points.size(points.dim() - 1);
  const int64_t* counts = const_data<int64_t>(index.counts);
  std::vector<SplitKey<T>> keys(clouds.leaf.back() * kLeaf);
  std::vector<TreeBuilder<T>> builders;
  for (int64_t cloud = 0; cloud < clouds.count(); ++cloud) {
    const int64_t leaf = clouds.leaf[cloud];
    builders.push_back({const_data<T>(points) + clouds.row[cloud] * dims, dims, counts[cloud],
                        mutable_data<int32_t>(index.order) + leaf * kLeaf,
                        mutable_data<T>(index.coordinates) + leaf * dims * kLeaf,
                        mutable_data<T>(index.bounds) + leaf * 4 * dims,
                        mutable_data<int32_t>(index.extra) + leaf * 2, keys.data() + leaf * kLeaf});
    // The last node of a tree over l leaves is 2 l - 2.
    const int64_t leaves = leaves_of(counts[cloud]);
    if (leaves) {
      std::fill_n(builders.back().boxes + (2 * leaves - 1) * 2 * dims, 2 * dims, T(0));
      builders.back().lowest[2 * leaves - 1] = -1;
    }
  }
  build_trees(builders);
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
    const Tensor contiguous = torch::stable::contiguous(*lengths);
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
    parallel_tasks(clouds.count(), [&](int64_t cloud) {
      int32_t* rows = order + clouds.leaf[cloud] * kLeaf;
      counts[cloud] =
          finite_rows(const_data<T>(points) + clouds.row[cloud] * dims, clouds.length[cloud], dims, rows);
      std::fill(rows + counts[cloud], order + clouds.leaf[cloud + 1] * kLeaf, -1);
    });
    if (tree) {
      clear_unused(index.coordinates, clouds, counts, dims * kLeaf, T(0));
      fill_tree<T>(points, clouds, index);
    } else {
      fill_features<T>(points, clouds, index);
    }
  });
  return index;
}

}  // namespace avatar
