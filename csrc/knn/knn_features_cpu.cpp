#include <cmath>
#include <memory>
#include <mutex>

#include "knn/knn_index.h"

namespace avatar {
namespace {

// Candidates that a worker keeps at a time, in bytes, where the points are not the queries.
constexpr int64_t kBlockBytes = int64_t{1} << 20;
// Fewer points are searched without a sample of them.
constexpr int64_t kLeastSampled = 1024;

template <typename T>
class FeatureSearcher {
 public:
  FeatureSearcher(const KnnSearch& search, const KnnIndex& queries, T* distances, int64_t* indices)
      : search_(search),
        dims_(search.points.size(search.points.dim() - 1)),
        counts_(const_data<int64_t>(search.index.counts)),
        query_counts_(const_data<int64_t>(queries.counts)),
        query_order_(const_data<int32_t>(queries.order)),
        distances_(distances),
        indices_(indices) {
    int64_t most_slots = 0, most_places = 0;
    for (int64_t cloud = 0; cloud < search.clouds.count(); ++cloud) {
      const int64_t slots = slots_of(search.k, counts_[cloud]);
      if (!slots || !query_counts_[cloud]) continue;
      clouds_.push_back(cloud);
      most_slots = std::max(most_slots, slots);
      most_places = std::max(most_places, (counts_[cloud] + kLeaf - 1) / kLeaf * kLeaf);
      buffer_capacity_ = std::max(buffer_capacity_, buffer_capacity(slots, counts_[cloud]));
    }
    // A list that all points fit in is never full.
    capacity_ = std::min(feature_capacity(most_slots), most_places + 1);
  }

  void run() const {
    if (search_.own_queries && search_.k <= kSortedSlots && enough_pairs()) {
      search_pairs();
    } else {
      std::vector<Queries> all;
      for (const int64_t cloud : clouds_) {
        all.push_back({cloud, query_order_ + search_.query_clouds.leaf[cloud] * kLeaf, query_counts_[cloud]});
      }
      search_blocks(all);
    }
  }

 private:
  // What a worker needs for itself.
  struct Worker {
    explicit Worker(const FeatureSearcher& searcher)
        : buffer(searcher.buffer_capacity_ * kKeyBytes), sums(feature_sums(searcher.capacity_)) {}
    std::vector<char> buffer;
    std::vector<T> sums;
  };

  // Candidates of some queries.
  struct Lists {
    Lists(int64_t queries, int64_t capacity)
        : limits(queries + kLimitPad),
          guesses(queries, std::numeric_limits<T>::infinity()),
          counts(queries, 0),
          candidates(new Candidate<T>[queries * capacity]) {}
    std::vector<T> limits, guesses;
    std::vector<int32_t> counts;
    std::unique_ptr<Candidate<T>[]> candidates;
  };

  // Rows of a cloud of queries.
  struct Queries {
    int64_t cloud;
    const int32_t* rows;
    int64_t count;
  };

  // A part of a cloud's points, in leaves.
  struct Sample {
    std::vector<T> coordinates, norms;
    int64_t rank = 0;
    FeatureSample<T> view() const {
      return {coordinates.data(), norms.data(), static_cast<int64_t>(norms.size()) / kLeaf, rank};
    }
  };

  FeatureSearchArgs<T> feature_args(int64_t cloud, Worker& worker, T* tiles) const {
    const int64_t leaf = search_.clouds.leaf[cloud];
    return {search_args(search_, cloud, counts_[cloud], worker.buffer.data(), distances_, indices_),
            const_data<T>(search_.index.extra) + cloud * dims_,
            const_data<T>(search_.index.bounds) + leaf * kLeaf,
            const_data<T>(search_.points) + search_.clouds.row[cloud] * dims_,
            const_data<T>(search_.queries) + search_.query_clouds.row[cloud] * dims_,
            capacity_,
            tiles,
            worker.sums.data()};
  }

  // Nothing is a neighbour of "no query".
  static void reset(T* limits, const int32_t* rows, int64_t count) {
    constexpr T kInfinity = std::numeric_limits<T>::infinity();
    for (int64_t i = 0; i < count; ++i) limits[i] = rows[i] < 0 ? kInfinity : -kInfinity;
  }

  void search_blocks(const std::vector<Queries>& all) const {
    const int64_t list_bytes = capacity_ * static_cast<int64_t>(sizeof(Candidate<T>));
    const int64_t size = std::clamp<int64_t>(kBlockBytes / list_bytes, 12, kFeatureBlock);
    std::vector<Queries> tasks;
    for (const auto& [cloud, rows, count] : all) {
      for (int64_t begin = 0; begin < count; begin += size) {
        tasks.push_back({cloud, rows + begin, std::min(size, count - begin)});
      }
    }
    for_each_task(static_cast<int64_t>(tasks.size()), [&](Worker& worker) {
      return [&, lists = Lists(size, capacity_), norms = std::vector<T>(size),
              tiles = std::vector<T>(kFeatureBlock * dims_)](int64_t task) mutable {
        const int64_t cloud = tasks[task].cloud;
        const int32_t* rows = tasks[task].rows;
        const int count = static_cast<int>(tasks[task].count);
        const FeatureSearchArgs<T> args = feature_args(cloud, worker, tiles.data());
        for (int i = 0; i < count; ++i) {
          norms[i] = 0;
          for (int64_t d = 0; d < dims_; ++d) {
            const T value = args.queries[rows[i] * dims_ + d] - args.center[d];
            norms[i] += value * value;
          }
        }
        reset(lists.limits.data(), rows, count);
        std::fill(lists.counts.begin(), lists.counts.end(), 0);
        const FeatureQueries<T> queries{rows,
                                        norms.data(),
                                        lists.limits.data(),
                                        lists.guesses.data(),
                                        lists.counts.data(),
                                        lists.candidates.get()};
        AVATAR_ISA_CALL(feature_search, args, queries, count);
        AVATAR_ISA_CALL(feature_finish, args, queries, count);
      };
    });
  }

  static int64_t blocks_of(int64_t points) { return (points + kFeatureBlock - 1) / kFeatureBlock; }

  // Pairs of blocks can be worked on at the same time where they have no block in common.
  bool enough_pairs() const {
    int64_t pairs = 0;
    for (const int64_t cloud : clouds_) pairs += (blocks_of(counts_[cloud]) + 1) / 2;
    const int64_t threads = torch::stable::get_num_threads();
    return threads == 1 || pairs >= 2 * threads;
  }

  // Points at equal distances in the order; none where the last neighbour's rank among them would be too far
  // from the first to tell much.
  Sample sample_of(int64_t cloud) const {
    const int64_t count = counts_[cloud];
    if (count < kLeastSampled) return {};
    const int64_t leaves = std::min(static_cast<int64_t>(std::sqrt(double(count)) / 11), kMostSampleLeaves);
    // Neighbours in the sample, on average; there is one in two hundred chance of `rank` or more.
    const double neighbors = double(slots_of(search_.k, count) + 1) * double(leaves * kLeaf) / double(count);
    const auto rank = static_cast<int64_t>(std::ceil(neighbors + 2.2 * std::sqrt(neighbors) + 1));
    if (rank > kLeaf / 2) return {};
    Sample sample{std::vector<T>(leaves * dims_ * kLeaf), std::vector<T>(leaves * kLeaf), rank};
    const int64_t first_leaf = search_.clouds.leaf[cloud];
    const T* coordinates = const_data<T>(search_.index.coordinates) + first_leaf * dims_ * kLeaf;
    const T* norms = const_data<T>(search_.index.bounds) + first_leaf * kLeaf;
    for (int64_t i = 0; i < leaves * kLeaf; ++i) {
      const int64_t place = i * count / (leaves * kLeaf);
      const T* from = coordinates + place / kLeaf * dims_ * kLeaf + place % kLeaf;
      T* to = sample.coordinates.data() + i / kLeaf * dims_ * kLeaf + i % kLeaf;
      for (int64_t d = 0; d < dims_; ++d) to[d * kLeaf] = from[d * kLeaf];
      sample.norms[i] = norms[place];
    }
    return sample;
  }

  void search_pairs() const {
    const int64_t places = search_.clouds.leaf.back() * kLeaf;
    Lists lists(places, capacity_);
    // Of each cloud, the first of its pairs and of its blocks, then the number of all.
    std::vector<int64_t> first_pair{0}, first_block{0};
    for (const int64_t cloud : clouds_) {
      const int64_t blocks = blocks_of(counts_[cloud]);
      first_block.push_back(first_block.back() + blocks);
      first_pair.push_back(first_pair.back() + Rounds(blocks).pairs());
    }
    std::unique_ptr<T[]> tiles(new T[first_block.back() * kFeatureBlock * dims_]);
    const auto cloud_at = [](const std::vector<int64_t>& first, int64_t task) {
      return std::upper_bound(first.begin(), first.end(), task) - first.begin() - 1;
    };
    const auto queries_of = [&](int64_t cloud, int64_t offset) {
      const int64_t place = search_.clouds.leaf[cloud] * kLeaf + offset;
      return FeatureQueries<T>{query_order_ + place,        const_data<T>(search_.index.bounds) + place,
                               lists.limits.data() + place, lists.guesses.data() + place,
                               lists.counts.data() + place, lists.candidates.get() + place * capacity_};
    };
    const auto args_of = [&](int64_t n, Worker& worker) {
      return feature_args(clouds_[n], worker, tiles.get() + first_block[n] * kFeatureBlock * dims_);
    };
    // Calls body(args, cloud, leaf, points) for every block, which are those in the cloud's leaves from
    // `leaf` on.
    const auto for_each_block = [&](const auto& body) {
      for_each_task(first_block.back(), [&](Worker& worker) {
        return [&](int64_t task) {
          const int64_t n = cloud_at(first_block, task), cloud = clouds_[n];
          const int64_t leaf = (task - first_block[n]) * (kFeatureBlock / kLeaf);
          const FeatureSearchArgs<T> args = args_of(n, worker);
          body(args, cloud, leaf, std::min<int64_t>(kFeatureBlock, (args.leaves - leaf) * kLeaf));
        };
      });
    };
    std::vector<Sample> samples(search_.clouds.count());
    parallel_tasks(static_cast<int64_t>(clouds_.size()),
                   [&](int64_t n) { samples[clouds_[n]] = sample_of(clouds_[n]); });
    for_each_block([&](const FeatureSearchArgs<T>& args, int64_t cloud, int64_t leaf, int64_t points) {
      const FeatureQueries<T> queries = queries_of(cloud, leaf * kLeaf);
      reset(queries.limits, queries.rows, points);
      AVATAR_ISA_CALL(feature_pack, args, leaf);
      const FeatureSample<T> sample = samples[cloud].view();
      if (sample.leaves) AVATAR_ISA_CALL(feature_guess, args, queries_of(cloud, 0), sample, leaf);
    });
    std::vector<std::mutex> in_use(first_block.back());
    for_each_task(first_pair.back(), [&](Worker& worker) {
      return [&](int64_t task) {
        const int64_t n = cloud_at(first_pair, task), cloud = clouds_[n];
        const int64_t blocks = first_block[n + 1] - first_block[n];
        const auto [row, column] = Rounds(blocks).pair(task - first_pair[n]);
        if (row >= blocks || column >= blocks) return;
        const std::unique_lock first(in_use[first_block[n] + std::min(row, column)]);
        const std::unique_lock second =
            row == column ? std::unique_lock<std::mutex>()
                          : std::unique_lock(in_use[first_block[n] + std::max(row, column)]);
        constexpr int64_t kLeaves = kFeatureBlock / kLeaf;
        AVATAR_ISA_CALL(feature_pair, args_of(n, worker), queries_of(cloud, 0), row * kLeaves,
                        column * kLeaves);
      };
    });
    for_each_block([&](const FeatureSearchArgs<T>& args, int64_t cloud, int64_t leaf, int64_t points) {
      AVATAR_ISA_CALL(feature_finish, args, queries_of(cloud, leaf * kLeaf), static_cast<int>(points));
    });
    search_again(lists.counts.data());
  }

  // Without a guess, the queries whose guess was too small.
  void search_again(const int32_t* counts) const {
    std::vector<std::vector<int32_t>> rows(search_.clouds.count());
    std::vector<Queries> again;
    for (const int64_t cloud : clouds_) {
      const int64_t place = search_.clouds.leaf[cloud] * kLeaf;
      for (int64_t i = 0; i < counts_[cloud]; ++i) {
        if (counts[place + i] == kIncomplete) rows[cloud].push_back(query_order_[place + i]);
      }
      again.push_back({cloud, rows[cloud].data(), static_cast<int64_t>(rows[cloud].size())});
    }
    search_blocks(again);
  }

  // All pairs of blocks, each with itself too, in rounds in which every block appears once.
  struct Rounds {
    explicit Rounds(int64_t blocks) : count(blocks | 1) {}
    int64_t pairs() const { return count * (count + 1) / 2; }
    // A block beyond the last one stands for none.
    std::pair<int64_t, int64_t> pair(int64_t number) const {
      const int64_t round = number / ((count + 1) / 2), step = number % ((count + 1) / 2);
      return {(round + step) % count, (round - step + count) % count};
    }
    const int64_t count;  // odd
  };

  // make(worker) gives what one worker calls for its tasks.
  template <typename Make>
  void for_each_task(int64_t count, const Make& make) const {
    const int64_t workers = std::min<int64_t>(count, torch::stable::get_num_threads());
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
      Worker worker(*this);
      auto body = make(worker);
      for (int64_t task = next++; task < count; task = next++) body(task);
    });
  }

  const KnnSearch& search_;
  const int64_t dims_;
  const int64_t* counts_;
  const int64_t* query_counts_;
  const int32_t* query_order_;
  T* distances_;
  int64_t* indices_;
  std::vector<int64_t> clouds_;
  int64_t capacity_ = 0, buffer_capacity_ = 0;
};

}  // namespace

template <typename T>
void search_features(const KnnSearch& search, const KnnIndex& queries, T* distances, int64_t* indices) {
  FeatureSearcher<T>(search, queries, distances, indices).run();
}

template void search_features(const KnnSearch&, const KnnIndex&, float*, int64_t*);
template void search_features(const KnnSearch&, const KnnIndex&, double*, int64_t*);

}  // namespace avatar
