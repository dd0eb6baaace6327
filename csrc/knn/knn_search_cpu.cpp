#include <algorithm>
#include <cmath>

#include "knn/knn_index.h"

namespace avatar {
namespace {

// Leaves of queries that one task searches for in a tree.
constexpr int64_t kTreeTaskLeaves = 8;

struct SearchTask {
  int64_t cloud, begin, end;
};

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

  void run() {
    if (!search_.own_queries && tree_) {
      queries_ = build_index(search_.queries, search_.query_clouds);
    } else if (!search_.own_queries) {
      list_queries();
    } else {
      queries_ = search_.index;
    }
    if (!tree_) search_features<T>(search_, *queries_, distances_, indices_);
    const int64_t* query_counts = const_data<int64_t>(queries_->counts);
    std::vector<SearchTask> tasks;
    int64_t capacity = 0, searched = 0;
    for (int64_t cloud = 0; cloud < search_.clouds.count(); ++cloud) {
      const int64_t queries = query_counts[cloud], slots = slots_of(search_.k, counts_[cloud]);
      if (!slots || !queries) continue;
      searched += queries;
      if (!tree_) continue;
      const int64_t leaves = (queries + kLeaf - 1) / kLeaf;
      for (int64_t begin = 0; begin < leaves; begin += kTreeTaskLeaves) {
        tasks.push_back({cloud, begin, std::min(begin + kTreeTaskLeaves, leaves)});
      }
      capacity = std::max(capacity, buffer_capacity(slots, counts_[cloud]));
    }
    const int64_t count = static_cast<int64_t>(tasks.size());
    const int64_t workers = std::min<int64_t>(count, torch::stable::get_num_threads());
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
      std::vector<char> buffer(capacity * kKeyBytes);
      for (int64_t task = next++; task < count; task = next++) search_tree(tasks[task], buffer.data());
    });
    if (searched < search_.queries.numel() / dims_) fill_missing();
  }

 private:
  // "Missing" for the query rows that are not searched for: those not in use or not finite, and all of a
  // cloud without points.
  void fill_missing() const {
    const int64_t rows = search_.queries.numel() / dims_, k = search_.k;
    const int64_t* query_counts = const_data<int64_t>(queries_->counts);
    std::vector<uint8_t> searched(rows, 0);
    for (int64_t cloud = 0; cloud < search_.clouds.count(); ++cloud) {
      if (!counts_[cloud]) continue;
      const int32_t* order = const_data<int32_t>(queries_->order) + search_.query_clouds.leaf[cloud] * kLeaf;
      for (int64_t i = 0; i < query_counts[cloud]; ++i)
        searched[search_.query_clouds.row[cloud] + order[i]] = 1;
    }
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(k, 1));
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        if (searched[row]) continue;
        std::fill_n(distances_ + row * k, k, std::numeric_limits<T>::infinity());
        std::fill_n(indices_ + row * k, k, int64_t{-1});
      }
    });
  }

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

  void search_tree(const SearchTask& task, void* buffer) const {
    const int64_t cloud = task.cloud;
    const int64_t leaf = search_.clouds.leaf[cloud], query_leaf = search_.query_clouds.leaf[cloud];
    const TreeSearchArgs<T> args{search_args(search_, cloud, counts_[cloud], buffer, distances_, indices_),
                                 const_data<T>(search_.index.bounds) + leaf * 4 * dims_,
                                 const_data<int32_t>(search_.index.extra) + leaf * 2,
                                 const_data<T>(queries_->coordinates) + query_leaf * dims_ * kLeaf,
                                 const_data<int32_t>(queries_->order) + query_leaf * kLeaf};
    AVATAR_ISA_CALL(tree_search, args, task.begin, task.end);
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
    Searcher<T>(search, distances, indices).run();
  });
}

}  // namespace avatar
