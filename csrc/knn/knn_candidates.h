// Candidates in feature space: the error bound of the product form, and lists of what it cannot rule out. For
// *_simd.cpp only.
#pragma once

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
  return sum_lanes(sum)[0] + tail;
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
  Bits low = bits_of(-largest_lane(-least)[0]), high = bits_of(largest_lane(most)[0]);
  store(values + count, broadcast(std::numeric_limits<T>::infinity()));
  while (high - low > 1) {
    const Bits middle = low + (high - low) / 2;
    const Vector<T> bound = broadcast(value_of(middle));
    int64_t below = 0;
    for (int i = 0; i < count; i += kLanes) below += __builtin_popcount(not_greater(load(values + i), bound));
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

  // What is no neighbour, as the query itself may be, is found out later. Without a branch on `wanted`, which
  // nobody could predict.
  void add_if(bool wanted, int64_t query, T lower, int64_t position) {
    int32_t& count = queries_.counts[query];
    list(query)[count] = {lower, static_cast<int32_t>(position)};
    count += wanted;
    if (count == args_.capacity) cut(query);
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

}  // namespace
}  // namespace AVATAR_ISA
}  // namespace avatar
