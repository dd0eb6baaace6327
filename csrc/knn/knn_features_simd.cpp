// Search in feature space: a tiled product of centred points gives |q - p|^2 = |q|^2 + |p|^2 - 2 q.p up to a
// bounded error. What that bound cannot rule out gathers in a list per query, which is cut back when it is
// full; at the end its members are measured again as the sum of squared differences, which alone decides.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "knn/knn_list.h"
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

// sum of (a - b)^2 over dims, in several partial sums.
template <typename T>
T squared_distance(const T* a, const T* b, int64_t dims) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int kLanes = Lanes<T>::kCount, kSums = 4;
  Vector sums[kSums] = {};
  int64_t d = 0;
  for (; d + kSums * kLanes <= dims; d += kSums * kLanes) {
    for (int i = 0; i < kSums; ++i) {
      const Vector difference = load(a + d + i * kLanes) - load(b + d + i * kLanes);
      sums[i] = multiply_add(difference, difference, sums[i]);
    }
  }
  for (; d + kLanes <= dims; d += kLanes) {
    const Vector difference = load(a + d) - load(b + d);
    sums[0] = multiply_add(difference, difference, sums[0]);
  }
  T tail = 0;
  for (; d < dims; ++d) tail = multiply_add(a[d] - b[d], a[d] - b[d], tail);
  const Vector sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  T lanes[kLanes];
  store(lanes, sum);
  for (int half = kLanes / 2; half; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0] + tail;
}

// Rounding of the product form. With u the unit roundoff, the centred norms |q|, |p| and the distance t
// measured directly, the product form differs from t by at most
//   (dims + 8) u ((|q| + |p|)^2 + max(|q|, |p|)^2) + (dims + 8) u t  +  4 u (|q| + |p|) sqrt(t)
// (Higham, Accuracy and Stability of Numerical Algorithms, 3.1, for the sums, of which the product's begins
// with one of the norms; the last term is the rounding of the centring), and (|q| + |p|)^2 <= 2 |q|^2 + 2
// |p|^2. `relative` covers all three with room to spare, `absolute` what underflow loses, flushed to zero or
// not. Above `limit` something may overflow.
template <typename T>
struct ProductError {
  explicit ProductError(int64_t dims)
      : relative(T(dims + 32) * std::numeric_limits<T>::epsilon()),
        absolute(T(8 * dims + 64) * std::numeric_limits<T>::min()),
        limit(std::numeric_limits<T>::max() / 64) {}

  // p is a neighbour of q only if point_term(|p|^2) - 2 q.p <= query_term(|q|^2, worst distance).
  T point_term(T norm) const {
    if (!(norm < limit)) return -kInfinity;
    return norm - 2 * relative * norm - absolute;
  }
  T query_term(T norm, T worst) const {
    if (!(norm < limit && worst < limit && relative < T(0.25))) return kInfinity;
    return worst + relative * worst - norm + 2 * relative * norm + absolute;
  }
  // At least the distance of q and p where point_term(|p|^2) - 2 q.p + far_term(|q|^2) is `sum`, and no less
  // for larger sums: |p|^2 in the bound is itself at most 2 |q|^2 + 2 t.
  T farthest(T sum) const { return sum < limit ? sum * (1 + 12 * relative) : kInfinity; }
  T far_term(T query_norm) const {
    if (!(query_norm < limit && relative < T(0.025))) return kInfinity;
    return query_norm + 10 * relative * query_norm + 2 * absolute;
  }
  // `lower` of a distance known exactly.
  T lower_of(T distance, T point_norm, T query_norm) const {
    return point_norm < limit ? distance - query_norm - 2 * relative * point_norm - absolute : -kInfinity;
  }

  static constexpr T kInfinity = std::numeric_limits<T>::infinity();
  T relative, absolute, limit;
};

// sums[r][v] += sum over d of rows[d][r] * columns[d][v], for kTileRows rows and kTileVectors vectors.
template <typename T>
inline void multiply_tile(const T* rows, const T* columns, int64_t dims,
                          Vector<T> (&sums)[kTileRows][kTileVectors]) {
  for (int64_t d = 0; d < dims; ++d, rows += kTileRows, columns += kLeaf) {
    Vector<T> column[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) column[v] = load(columns + v * Lanes<T>::kCount);
    for (int r = 0; r < kTileRows; ++r) {
      const Vector<T> value = broadcast(rows[r]);
      for (int v = 0; v < kTileVectors; ++v) sums[r][v] = multiply_add(value, column[v], sums[r][v]);
    }
  }
}

// A value that at least `rank` of the values, none negative, do not exceed, and not many more where they
// differ. Room for a vector follows the values.
template <typename T>
T upper_quantile(T* values, int count, int64_t rank) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  constexpr int kLanes = Lanes<T>::kCount;
  const auto value_of = [](Bits bits) {
    T value;
    std::memcpy(&value, &bits, sizeof(T));
    return value;
  };
  const auto bits_of = [](T value) {
    Bits bits;
    std::memcpy(&bits, &value, sizeof(T));
    return bits;
  };
  Vector<T> least = broadcast(values[0]), most = least;
  store(values + count, least);
  for (int i = 0; i < count; i += kLanes) {
    const Vector<T> value = load(values + i);
    least = value < least ? value : least;
    most = larger(value, most);
  }
  // Numbers that are not negative order as their bits do.
  Bits low = bits_of(least[0]), high = bits_of(most[0]);
  for (int lane = 1; lane < kLanes; ++lane) {
    low = std::min(low, bits_of(least[lane]));
    high = std::max(high, bits_of(most[lane]));
  }
  store(values + count, broadcast(std::numeric_limits<T>::infinity()));
  while (high - low > 1) {
    const Bits middle = low + (high - low) / 2;
    const Vector<T> bound = broadcast(value_of(middle));
    Index<T> counts = {};
    for (int i = 0; i < count; i += kLanes) counts -= load(values + i) <= bound;
    int64_t below = 0;
    for (int lane = 0; lane < kLanes; ++lane) below += counts[lane];
    if (below < rank) {
      low = middle;
      continue;
    }
    high = middle;
    if (below <= rank + rank / 8) break;
  }
  return value_of(high);
}

// The lists of candidates of some queries.
template <typename T>
class CandidateLists {
  // Candidates measured while a point is on its way from memory.
  static constexpr int kAhead = 4;

 public:
  CandidateLists(const FeatureSearchArgs<T>& args, const FeatureQueries<T>& queries)
      : args_(args), queries_(queries), error_(args.dims) {}

  // What is no neighbour, as the query itself may be, is found out later.
  void add(int64_t query, T lower, int64_t position) {
    int32_t& count = queries_.counts[query];
    list(query)[count] = {lower, static_cast<int32_t>(position)};
    if (++count == args_.capacity) cut(query);
  }

  // Writes the row of a query.
  void finish(int64_t query) {
    drop_far(query);
    measure(query);
    T* distances = row_of(args_.distances, query);
    int64_t* indices = row_of(args_.indices, query);
    const int64_t slots = args_.slots.count;
    for (int64_t slot = 0; slot < slots; ++slot) {
      if (indices[slot] >= 0) indices[slot] = args_.order[indices[slot]];
    }
    std::fill_n(distances + slots, args_.k - slots, std::numeric_limits<T>::infinity());
    std::fill_n(indices + slots, args_.k - slots, int64_t{-1});
  }

  const ProductError<T>& error() const { return error_; }

 private:
  Candidate<T>* list(int64_t query) const { return queries_.candidates + query * args_.capacity; }
  template <typename Value>
  Value* row_of(Value* rows, int64_t query) const {
    return rows + queries_.rows[query] * args_.k;
  }

  void tighten(int64_t query, T worst) {
    const T limit = error_.query_term(queries_.norms[query], worst) * T(-0.5);
    queries_.limits[query] = std::max(queries_.limits[query], limit);
  }

  __attribute__((noinline)) void cut(int64_t query) {
    if (queries_.rows[query] < 0) {
      queries_.counts[query] = 0;
      return;
    }
    drop_far(query);
    const int64_t slots = args_.slots.count;
    // Cutting again and again for a few places each would be slow: then the distances themselves decide.
    if (queries_.counts[query] > args_.capacity - (args_.capacity - slots) / 4) keep_nearest(query);
  }

  // Drops candidates that are none, or farther than enough others.
  void drop_far(int64_t query) {
    const bool may_be_none = args_.exclude_self || args_.count % kLeaf;
    if (may_be_none) {
      const int32_t excluded = args_.exclude_self ? queries_.rows[query] : -1;
      keep(query, [&](const Candidate<T>& candidate) {
        const int32_t row = args_.order[candidate.position];
        return (row >= 0) & (row != excluded);
      });
    }
    const int count = queries_.counts[query];
    if (count <= args_.slots.count) return;
    const Candidate<T>* candidates = list(query);
    const T far_term = error_.far_term(queries_.norms[query]);
    T* sums = args_.sums;
    for (int i = 0; i < count; ++i) {
      const T sum = candidates[i].lower + far_term;
      // Where NaN or an overflow took part, nothing is known.
      sums[i] = std::abs(sum) < error_.limit ? std::max(sum, T(0)) : ProductError<T>::kInfinity;
    }
    tighten(query, error_.farthest(upper_quantile(sums, count, args_.slots.count)));
    const T most = queries_.limits[query] * T(-2);
    keep(query, [&](const Candidate<T>& candidate) { return !(candidate.lower > most); });
  }

  template <typename Wanted>
  void keep(int64_t query, const Wanted& wanted) {
    Candidate<T>* candidates = list(query);
    const int count = queries_.counts[query];
    int kept = 0;
    for (int i = 0; i < count; ++i) {
      const Candidate<T> candidate = candidates[i];
      candidates[kept] = candidate;
      kept += wanted(candidate);
    }
    queries_.counts[query] = kept;
  }

  void prefetch(const T* point) const {
    for (int64_t d = 0; d < std::min<int64_t>(args_.dims, 512 / sizeof(T)); d += 64 / sizeof(T)) {
      __builtin_prefetch(point + d);
    }
  }

  void keep_nearest(int64_t query) {
    measure(query);
    const T* distances = row_of(args_.distances, query);
    const int64_t* positions = row_of(args_.indices, query);
    Candidate<T>* candidates = list(query);
    const int64_t slots = args_.slots.count;
    for (int64_t slot = 0; slot < slots; ++slot) {
      const int64_t position = positions[slot];
      const T lower = error_.lower_of(distances[slot], args_.norms[position], queries_.norms[query]);
      candidates[slot] = {lower, static_cast<int32_t>(position)};
    }
    queries_.counts[query] = static_cast<int32_t>(slots);
    tighten(query, distances[slots - 1]);
  }

  // Leaves the nearest candidates, by distance and position, in the query's rows of distances and indices.
  void measure(int64_t query) {
    with_list(T(0), args_.slots, [&](auto tag) {
      using List = typename decltype(tag)::type;
      const T* point = args_.queries + queries_.rows[query] * args_.dims;
      const Candidate<T>* candidates = list(query);
      typename List::State state;
      List::reset(state, args_.slots);
      List nearest(state);
      const auto point_at = [&](int i) {
        return args_.points + args_.order[candidates[i].position] * args_.dims;
      };
      const int count = queries_.counts[query];
      for (int i = 0; i < count; ++i) {
        prefetch(point_at(std::min(i + kAhead, count - 1)));
        const int32_t position = candidates[i].position;
        const T* other = point_at(i);
        const Key<T> key = Key<T>::make(squared_distance(point, other, args_.dims), position);
        if (key < nearest.worst()) nearest.insert(key);
      }
      List::finish(state, args_.slots, row_of(args_.distances, query), row_of(args_.indices, query));
    });
  }

  const FeatureSearchArgs<T>& args_;
  const FeatureQueries<T> queries_;
  const ProductError<T> error_;
};

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
    for (int i = 0; i < kLeaf; i += kStep) {
      for (int row = 0; row < count_; row += kTileRows) {
        multiply(row, columns + i, starts + i, leaf * kLeaf + i);
      }
    }
  }

 private:
  static constexpr int kLanes = Lanes<T>::kCount;
  static constexpr int kStep = kTileVectors * kLanes;
  static_assert(kLeaf % kStep == 0);

  static constexpr int kRowsPerWord = std::min(64 / kStep, kTileRows);
  static constexpr int kWords = (kTileRows + kRowsPerWord - 1) / kRowsPerWord;
  // A bit for each element of a tile.
  struct Hits {
    uint64_t words[kWords] = {};
    void set(int row, int vector, uint32_t bits) {
      words[row / kRowsPerWord] |= uint64_t{bits} << (row % kRowsPerWord * kStep + vector * kLanes);
    }
    // Calls body(row, lane) where row < rows.
    template <typename Body>
    void each(int rows, const Body& body) const {
      for (int word = 0; word < kWords; ++word) {
        for (uint64_t rest = words[word]; rest; rest &= rest - 1) {
          const int bit = __builtin_ctzll(rest), row = word * kRowsPerWord + bit / kStep;
          if (row < rows) body(row, bit % kStep);
        }
      }
    }
  };

  void multiply(int row, const T* columns, const T* starts, int64_t position) {
    Vector<T> sums[kTileRows][kTileVectors];
    for (auto& sum : sums) {
      for (int v = 0; v < kTileVectors; ++v) sum[v] = load(starts + v * kLanes);
    }
    multiply_tile(args_.tiles + (first_ + row) * args_.dims, columns, args_.dims, sums);
    Hits row_hits, column_hits;
    T values[kTileRows][kStep];
    Vector<T> column_limits[kTileVectors];
    for (int v = 0; kBoth && v < kTileVectors; ++v) {
      column_limits[v] = load(limits_ + position + v * kLanes) + load(starts + v * kLanes);
    }
    for (int r = 0; r < kTileRows; ++r) {
      const Vector<T> limit = broadcast(limits_[first_ + row + r]);
      for (int v = 0; v < kTileVectors; ++v) {
        row_hits.set(r, v, not_greater(limit, sums[r][v]));
        if constexpr (kBoth) {
          column_hits.set(r, v, not_greater(column_limits[v] + broadcast(terms_[row + r]), sums[r][v]));
        }
        store(values[r] + v * kLanes, sums[r][v]);
      }
    }
    row_hits.each(count_ - row, [&](int r, int lane) {
      lists_.add(first_ + row + r, -2 * values[r][lane], position + lane);
    });
    column_hits.each(count_ - row, [&](int r, int lane) {
      const T lower = 2 * (starts[lane] + terms_[row + r] - values[r][lane]);
      lists_.add(position + lane, lower, first_ + row + r);
    });
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
    if (queries.rows[query] >= 0) lists.finish(query);
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
