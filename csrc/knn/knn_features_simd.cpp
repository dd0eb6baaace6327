// Search in feature space: a tiled product of centred points gives |q - p|^2 = |q|^2 + |p|^2 - 2 q.p up to a
// bounded error. What that bound cannot rule out gathers in a list per query, which is cut back when it is
// full; at the end its members are measured again as the sum of squared differences, which alone decides.
#include <algorithm>
#include <limits>

#include "knn/knn_candidates.h"
#include "knn/knn_simd.h"
#include "knn/knn_vector.h"

namespace avatar {
namespace AVATAR_ISA {
namespace {

// Sums in registers: kTileRows * kTileVectors of 32 or 16, with room for the operands.
#if defined(__AVX512F__)
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 6;
#endif
constexpr int kTileVectors = 2;
static_assert(kFeatureBlock % kTileRows == 0);

// Columns of a tile.
template <typename T>
constexpr int kTileStep = kTileVectors * static_cast<int>(Lanes<T>::kCount);

// products[r][i] = starts[i] + sum over d of rows[d][r] * columns[d][i]. There is at least one dimension.
// Not inlined, as the code around it would take the registers of the sums.
template <typename T>
__attribute__((noinline)) void multiply_tile(const T* rows, const T* columns, const T* starts, int64_t dims,
                                             T (&products)[kTileRows][kTileStep<T>]) {
  Vector<T> sums[kTileRows][kTileVectors];
#pragma GCC unroll 12
  for (int r = 0; r < kTileRows; ++r) {
    for (int v = 0; v < kTileVectors; ++v) sums[r][v] = load(starts + v * Lanes<T>::kCount);
  }
  do {
    Vector<T> column[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) column[v] = load(columns + v * Lanes<T>::kCount);
#pragma GCC unroll 12
    for (int r = 0; r < kTileRows; ++r) {
      const Vector<T> value = broadcast(rows[r]);
      for (int v = 0; v < kTileVectors; ++v) sums[r][v] = multiply_add(value, column[v], sums[r][v]);
    }
    rows += kTileRows, columns += kLeaf;
  } while (--dims);
#pragma GCC unroll 12
  for (int r = 0; r < kTileRows; ++r) {
    for (int v = 0; v < kTileVectors; ++v) store(products[r] + v * Lanes<T>::kCount, sums[r][v]);
  }
}

// Multiplies a block of queries, packed into args.tiles, with leaves of points. With kBoth the points are
// queries too, whose place among `queries` is their position.
template <bool kBoth, typename T>
class BlockProduct {
 public:
  // The queries are those from `first` on, `terms` half of their point terms, needed with kBoth only.
  BlockProduct(const FeatureSearchArgs<T>& args, const FeatureQueries<T>& queries, int64_t first, int count,
               const T* terms)
      : args_(args),
        limits_(queries.limits),
        lists_(args, queries),
        first_(first),
        count_(count),
        terms_(terms) {}

  void scan(int64_t leaf) {
    const T* columns = args_.coordinates + leaf * args_.dims * kLeaf;
    // A sum that starts at minus half the point term ends at minus half the lower bound.
    T starts[kLeaf];
    for (int i = 0; i < kLeaf; ++i) {
      starts[i] = lists_.error().point_term(args_.norms[leaf * kLeaf + i]) * T(-0.5);
    }
    // A tile's products are looked through while those of the next one are on their way: branches on what has
    // just been computed would leave the processor idle.
    T products[2][kTileRows][kTileStep<T>];
    int ready_row = -1, ready_column = 0, buffer = 0;
    for (int i = 0; i < kLeaf; i += kTileStep<T>) {
      for (int row = 0; row < count_; row += kTileRows) {
        const T* rows = args_.tiles + (first_ + row) * args_.dims;
        multiply_tile(rows, columns + i, starts + i, args_.dims, products[buffer]);
        buffer = 1 - buffer;
        if (ready_row >= 0)
          collect(ready_row, products[buffer], starts + ready_column, leaf * kLeaf + ready_column);
        ready_row = row, ready_column = i;
      }
    }
    collect(ready_row, products[1 - buffer], starts + ready_column, leaf * kLeaf + ready_column);
  }

 private:
  static constexpr int kLanes = Lanes<T>::kCount, kStep = kTileStep<T>;
  static_assert(kLeaf % kStep == 0 && kStep <= 32 && kTileRows <= 32);

  // Adds candidates from the products of the queries from `row` on with the points from `position` on.
  void collect(int row, const T (&products)[kTileRows][kTileStep<T>], const T* starts, int64_t position) {
    Vector<T> column_limits[kTileVectors];
    for (int v = 0; kBoth && v < kTileVectors; ++v) {
      column_limits[v] = load(limits_ + position + v * kLanes) + load(starts + v * kLanes);
    }
    // A bit for each product that one side or the other may need: most rows have none.
    uint32_t hits[kTileRows], rows_hit = 0;
    for (int r = 0; r < kTileRows; ++r) {
      const Vector<T> limit = broadcast(limits_[first_ + row + r]);
      hits[r] = 0;
      for (int v = 0; v < kTileVectors; ++v) {
        Vector<T> least = limit;
        // Where nothing is known the second is NaN, which is then the smaller one.
        if constexpr (kBoth) least = smaller(limit, column_limits[v] + broadcast(terms_[row + r]));
        hits[r] |= not_greater(least, load(products[r] + v * kLanes)) << v * kLanes;
      }
      rows_hit |= uint32_t{hits[r] != 0} << r;
    }
    if (count_ - row < kTileRows) rows_hit &= (1u << (count_ - row)) - 1;
    for (; rows_hit; rows_hit &= rows_hit - 1) {
      const int r = __builtin_ctz(rows_hit);
      for (uint32_t rest = hits[r]; rest; rest &= rest - 1) {
        const int lane = __builtin_ctz(rest);
        const T product = products[r][lane];
        lists_.add_if(!(limits_[first_ + row + r] > product), first_ + row + r, -2 * product,
                      position + lane);
        if (!kBoth) continue;
        const T start = starts[lane] + terms_[row + r];
        lists_.add_if(!(limits_[position + lane] + start > product), position + lane, 2 * (start - product),
                      first_ + row + r);
      }
    }
  }

  const FeatureSearchArgs<T>& args_;
  const T* limits_;
  CandidateLists<T> lists_;
  const int64_t first_;
  const int count_;
  const T* terms_;
};

// Packs value(query, d) into whole tiles, 0 beyond the last query.
template <typename T, typename Value>
void pack_tiles(T* tiles, int count, int64_t dims, const Value& value) {
  for (int first = 0; first < count; first += kTileRows, tiles += kTileRows * dims) {
    for (int64_t d = 0; d < dims; ++d) {
      for (int r = 0; r < kTileRows; ++r) {
        tiles[d * kTileRows + r] = first + r < count ? value(first + r, d) : T(0);
      }
    }
  }
}

template <typename T>
void search(const FeatureSearchArgs<T>& args, const FeatureQueries<T>& queries, int count) {
  pack_tiles(args.tiles, count, args.dims, [&](int query, int64_t d) {
    return args.queries[queries.rows[query] * args.dims + d] - args.center[d];
  });
  BlockProduct<false, T> block(args, queries, 0, count, nullptr);
  for (int64_t leaf = 0; leaf < args.leaves; ++leaf) block.scan(leaf);
}

// Of a block that begins with a leaf.
template <typename T>
struct LeafBlock {
  LeafBlock(const FeatureSearchArgs<T>& args, int64_t leaf)
      : leaf(leaf),
        end(std::min<int64_t>(leaf + kFeatureBlock / kLeaf, args.leaves)),
        first(leaf * kLeaf),
        count(static_cast<int>((end - leaf) * kLeaf)) {}

  const int64_t leaf, end, first;
  const int count;
};

template <typename T>
void pack(const FeatureSearchArgs<T>& args, int64_t leaf) {
  const LeafBlock<T> block(args, leaf);
  pack_tiles(args.tiles + block.first * args.dims, block.count, args.dims, [&](int query, int64_t d) {
    return args.coordinates[((leaf + query / kLeaf) * args.dims + d) * kLeaf + query % kLeaf];
  });
}

// The `rank`-th largest of kLeaf values; the next smaller ones where several are equal.
template <typename T>
T largest_value(const T* values, int64_t rank) {
  constexpr int kLanes = Lanes<T>::kCount, kVectors = kLeaf / kLanes;
  Vector<T> rest[kVectors];
  for (int v = 0; v < kVectors; ++v) rest[v] = load(values + v * kLanes);
  for (;;) {
    Vector<T> most = rest[0];
    for (int v = 1; v < kVectors; ++v) most = larger(most, rest[v]);
    most = largest_lane(most);
    if (--rank == 0) return most[0];
    for (int v = 0; v < kVectors; ++v) {
      rest[v] = rest[v] == most ? broadcast(-std::numeric_limits<T>::infinity()) : rest[v];
    }
  }
}

// The limits of a block's queries, from the nearest of the sample in each lane.
template <typename T>
void guess(const FeatureSearchArgs<T>& args, const FeatureQueries<T>& queries, const FeatureSample<T>& sample,
           int64_t leaf) {
  constexpr int kLanes = Lanes<T>::kCount, kStep = kTileStep<T>;
  const LeafBlock<T> block(args, leaf);
  const ProductError<T> error(args.dims);
  T starts[kMostSampleLeaves * kLeaf];
  for (int64_t i = 0; i < sample.leaves * kLeaf; ++i) starts[i] = error.point_term(sample.norms[i]) * T(-0.5);
  for (int row = 0; row < block.count; row += kTileRows) {
    T nearest[kTileRows][kLeaf], products[kTileRows][kStep];
    std::fill_n(nearest[0], kTileRows * kLeaf, -std::numeric_limits<T>::infinity());
    const T* rows = args.tiles + (block.first + row) * args.dims;
    for (int64_t i = 0; i < sample.leaves * kLeaf; i += kStep) {
      const int64_t lane = i % kLeaf;
      const T* columns = sample.coordinates + (i - lane) * args.dims + lane;
      multiply_tile(rows, columns, starts + i, args.dims, products);
      for (int r = 0; r < kTileRows; ++r) {
        for (int v = 0; v < kStep; v += kLanes) {
          T* seen = nearest[r] + lane + v;
          store(seen, larger(load(seen), load(products[r] + v)));
        }
      }
    }
    for (int r = 0; r < std::min(kTileRows, block.count - row); ++r) {
      const int64_t query = block.first + row + r;
      if (queries.rows[query] < 0) continue;
      const T norm = queries.norms[query];
      const T sum = error.far_term(norm) - 2 * largest_value(nearest[r], sample.rank);
      const T distance = error.farthest(std::max(sum, T(0)));
      queries.guesses[query] = distance;
      queries.limits[query] = error.query_term(norm, distance) * T(-0.5);
    }
  }
}

template <typename T>
void search_pair(const FeatureSearchArgs<T>& args, const FeatureQueries<T>& queries, int64_t row_leaf,
                 int64_t column_leaf) {
  const LeafBlock<T> rows(args, row_leaf), columns(args, column_leaf);
  if (row_leaf == column_leaf) {
    BlockProduct<false, T> product(args, queries, rows.first, rows.count, nullptr);
    for (int64_t leaf = columns.leaf; leaf < columns.end; ++leaf) product.scan(leaf);
    return;
  }
  const ProductError<T> error(args.dims);
  T terms[kFeatureBlock];
  for (int row = 0; row < rows.count; ++row) {
    terms[row] = error.point_term(args.norms[rows.first + row]) * T(0.5);
  }
  BlockProduct<true, T> product(args, queries, rows.first, rows.count, terms);
  for (int64_t leaf = columns.leaf; leaf < columns.end; ++leaf) product.scan(leaf);
}

template <typename T>
void finish(const FeatureSearchArgs<T>& args, const FeatureQueries<T>& queries, int count) {
  CandidateLists<T> lists(args, queries);
  for (int query = 0; query < count; ++query) {
    if (queries.rows[query] < 0) continue;
    lists.finish(query);
    const T* distances = args.distances + queries.rows[query] * args.k;
    if (!(distances[args.slots.count - 1] <= queries.guesses[query])) queries.counts[query] = kIncomplete;
  }
}

}  // namespace

#define AVATAR_DEFINE(T)                                                                                  \
  void feature_search(const FeatureSearchArgs<T>& args, const FeatureQueries<T>& queries, int count) {    \
    search(args, queries, count);                                                                         \
  }                                                                                                       \
  void feature_pack(const FeatureSearchArgs<T>& args, int64_t leaf) {                                     \
    pack(args, leaf);                                                                                     \
  }                                                                                                       \
  void feature_guess(const FeatureSearchArgs<T>& args, const FeatureQueries<T>& queries,                  \
                     const FeatureSample<T>& sample, int64_t leaf) {                                      \
    guess(args, queries, sample, leaf);                                                                   \
  }                                                                                                       \
  void feature_pair(const FeatureSearchArgs<T>& args, const FeatureQueries<T>& queries, int64_t row_leaf, \
                    int64_t column_leaf) {                                                                \
    search_pair(args, queries, row_leaf, column_leaf);                                                    \
  }                                                                                                       \
  void feature_finish(const FeatureSearchArgs<T>& args, const FeatureQueries<T>& queries, int count) {    \
    finish(args, queries, count);                                                                         \
  }
AVATAR_DEFINE(float)
AVATAR_DEFINE(double)
#undef AVATAR_DEFINE

}  // namespace AVATAR_ISA
}  // namespace avatar
