#include <algorithm>
#include <cmath>

#include "knn/knn_index.h"

namespace avatar {
namespace {

// Leaves of queries, or blocks of them, that one task searches for.
constexpr int64_t kTreeTaskLeaves = 8;
constexpr int64_t kFeatureTaskRows = kLeaf;

struct SearchTask {
  int64_t cloud, begin, end;
};

int64_t slots_of(int64_t k, int64_t points) {
  return std::min(k, points);
}

// Keys that one query's list has room for: twice its slots, but never more than all points fill.
int64_t capacity_of(int64_t slots, int64_t points) {
  return slots <= kSortedSlots ? 0 : std::min(2 * slots, points + 1);
}

// "Missing" for the query rows that were not searched for.
template <typename T>
void fill_missing(const std::vector<uint8_t>& searched, int64_t k, T* distances, int64_t* indices) {
  const int64_t rows = static_cast<int64_t>(searched.size());
  if (std::find(searched.begin(), searched.end(), 0) == searched.end()) return;
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(k, 1));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (searched[row]) continue;
      std::fill_n(distances + row * k, k, std::numeric_limits<T>::infinity());
      std::fill_n(indices + row * k, k, int64_t{-1});
    }
  });
}

template <typename T>
class Searcher {
 public:
  Searcher(const KnnSearch& search, const Tensor& distances, const Tensor& indices)
      : search_(search),
        dims_(search.points.size(search.points.dim() - 1)),
        tree_(uses_tree(dims_)),
        counts_(const_data<int64_t>(search.index.counts)),
        distances_(mutable_data<T>(distances)),
        indices_(mutable_data<int64_t>(indices)) {}

  // Searches for every query that is in use and finite; returns a mark for each query row that was.
  std::vector<uint8_t> run() {
    if (!search_.own_queries && tree_) {
      queries_ = build_index(search_.queries, search_.query_clouds);
    } else if (!search_.own_queries) {
      list_queries();
    } else {
      queries_ = search_.index;
    }
    const int64_t* query_counts = const_data<int64_t>(queries_->counts);
    const int32_t* query_order = const_data<int32_t>(queries_->order);
    std::vector<uint8_t> searched(search_.queries.numel() / dims_, 0);
    std::vector<SearchTask> tasks;
    int64_t capacity = 0;
    for (int64_t cloud = 0; cloud < search_.clouds.count(); ++cloud) {
      const int64_t queries = query_counts[cloud], slots = slots_of(search_.k, counts_[cloud]);
      if (!slots || !queries) continue;
      const int32_t* rows = query_order + search_.query_clouds.leaf[cloud] * kLeaf;
      for (int64_t i = 0; i < queries; ++i) searched[search_.query_clouds.row[cloud] + rows[i]] = 1;
      const int64_t size = tree_ ? (queries + kLeaf - 1) / kLeaf : queries;
      const int64_t step = tree_ ? kTreeTaskLeaves : kFeatureTaskRows;
      for (int64_t begin = 0; begin < size; begin += step) {
        tasks.push_back({cloud, begin, std::min(begin + step, size)});
      }
      capacity = std::max(capacity, capacity_of(slots, counts_[cloud]));
    }
    const int64_t scratch = tree_ ? 0 : feature_scratch(dims_);
    const int64_t count = static_cast<int64_t>(tasks.size());
    const int64_t workers = std::min<int64_t>(count, torch::stable::get_num_threads());
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
      std::vector<char> buffer(capacity * kKeyBytes);
      std::vector<T> values(scratch);
      for (int64_t task = next++; task < count; task = next++) {
        search_task(tasks[task], buffer.data(), values.data());
      }
    });
    return searched;
  }

 private:
  // In feature space queries only have to be listed.
  void list_queries() {
    const Clouds& clouds = search_.query_clouds;
    KnnIndex listed{search_.queries,
                    torch::stable::new_empty(search_.queries, {clouds.leaf.back() * kLeaf}, ScalarType::Int),
                    torch::stable::new_empty(search_.queries, {clouds.count()}, ScalarType::Long),
                    search_.queries, search_.queries};
    parallel_tasks(clouds.count(), [&](int64_t cloud) {
      mutable_data<int64_t>(listed.counts)[cloud] =
          finite_rows(const_data<T>(search_.queries) + clouds.row[cloud] * dims_, clouds.length[cloud], dims_,
                      mutable_data<int32_t>(listed.order) + clouds.leaf[cloud] * kLeaf);
    });
    queries_ = listed;
  }

  void search_task(const SearchTask& task, void* buffer, T* scratch) const {
    const int64_t cloud = task.cloud;
    const int64_t leaf = search_.clouds.leaf[cloud], query_leaf = search_.query_clouds.leaf[cloud];
    const int64_t row = search_.clouds.row[cloud], query_row = search_.query_clouds.row[cloud];
    const int64_t slots = slots_of(search_.k, counts_[cloud]);
    SearchArgs<T> common;
    common.dims = dims_;
    common.coordinates = const_data<T>(search_.index.coordinates) + leaf * dims_ * kLeaf;
    common.order = const_data<int32_t>(search_.index.order) + leaf * kLeaf;
    common.leaves = (counts_[cloud] + kLeaf - 1) / kLeaf;
    common.slots = {slots, buffer, capacity_of(slots, counts_[cloud])};
    common.k = search_.k;
    common.exclude_self = search_.exclude_self;
    common.distances = distances_ + query_row * search_.k;
    common.indices = indices_ + query_row * search_.k;
    const int32_t* query_order = const_data<int32_t>(queries_->order) + query_leaf * kLeaf;
    if (tree_) {
      TreeSearchArgs<T> args{common, const_data<T>(search_.index.bounds) + leaf * 4 * dims_,
                             const_data<int32_t>(search_.index.extra) + leaf * 2,
                             const_data<T>(queries_->coordinates) + query_leaf * dims_ * kLeaf, query_order};
      AVATAR_ISA_CALL(tree_search, args, task.begin, task.end);
    } else {
      FeatureSearchArgs<T> args{common,
                                const_data<T>(search_.index.extra) + cloud * dims_,
                                const_data<T>(search_.index.bounds) + leaf * kLeaf,
                                const_data<T>(search_.points) + row * dims_,
                                const_data<T>(search_.queries) + query_row * dims_,
                                query_order,
                                scratch};
      AVATAR_ISA_CALL(feature_search, args, task.begin, task.end);
    }
  }

  const KnnSearch& search_;
  const int64_t dims_;
  const bool tree_;
  const int64_t* counts_;
  T* distances_;
  int64_t* indices_;
  std::optional<KnnIndex> queries_;
};

}  // namespace

void search_index(const KnnSearch& search, const Tensor& distances, const Tensor& indices) {
  dispatch_compute(search.points.scalar_type(), "knn", [&](auto zero) {
    using T = decltype(zero);
    const std::vector<uint8_t> searched = Searcher<T>(search, distances, indices).run();
    fill_missing(searched, search.k, mutable_data<T>(distances), mutable_data<int64_t>(indices));
  });
}

}  // namespace avatar
