// Search in feature space: a tiled product of centred points gives |q - p|^2 = |q|^2 + |p|^2 - 2 q.p up to a
// bounded error. Whatever that bound cannot rule out is measured again as the sum of squared differences,
// which alone decides.
#include <algorithm>
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
constexpr int kTileRows = 11;
#else
constexpr int kTileRows = 6;
#endif
constexpr int kTileVectors = 2;
// A block of queries in whole tiles.
constexpr int kBlockRows = (kLeaf + kTileRows - 1) / kTileRows * kTileRows;
static_assert(kBlockRows <= kFeatureBlockRows);

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
//   (dims + 8) u (|q| + |p|)^2 + (dims + 8) u t  +  4 u (|q| + |p|) sqrt(t)
// (Higham, Accuracy and Stability of Numerical Algorithms, 3.1, for the sums; the last term is the rounding
// of the centring), and (|q| + |p|)^2 <= 2 |q|^2 + 2 |p|^2. `relative` covers all three with room to spare,
// `absolute` what underflow loses, flushed to zero or not. Above `limit` something may overflow.
template <typename T>
struct ProductError {
  explicit ProductError(int64_t dims)
      : relative(T(dims + 32) * std::numeric_limits<T>::epsilon()),
        absolute(T(8 * dims + 64) * std::numeric_limits<T>::min()),
        limit(std::numeric_limits<T>::max() / 64) {}

  // p is a neighbour of q only if point_term(|p|^2) - 2 q.p <= query_term(|q|^2, worst distance).
  T point_term(T norm) const {
    if (!(norm < limit)) return -std::numeric_limits<T>::infinity();
    return norm - 2 * relative * norm - absolute;
  }
  T query_term(T norm, T worst) const {
    if (!(norm < limit && worst < limit && relative < T(0.25))) return std::numeric_limits<T>::infinity();
    return worst + relative * worst - norm + 2 * relative * norm + absolute;
  }

  T relative, absolute, limit;
};

// sums[r][v] = sum over d of rows[r][d] * columns[d][v], for kTileRows rows and kTileVectors vectors.
template <typename T>
inline void multiply_tile(const T* rows, const T* columns, int64_t dims,
                          typename Lanes<T>::Vector (&sums)[kTileRows][kTileVectors]) {
  using Vector = typename Lanes<T>::Vector;
  for (auto& row : sums) {
    for (Vector& sum : row) sum = Vector{};
  }
  for (int64_t d = 0; d < dims; ++d) {
    Vector column[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) column[v] = load(columns + d * kLeaf + v * Lanes<T>::kCount);
    for (int r = 0; r < kTileRows; ++r) {
      const Vector value = broadcast(rows[r * dims + d]);
      for (int v = 0; v < kTileVectors; ++v) sums[r][v] = multiply_add(value, column[v], sums[r][v]);
    }
  }
}

template <typename T, typename List>
class BlockSearch {
 public:
  explicit BlockSearch(const FeatureSearchArgs<T>& args) : args_(args), error_(args.dims) {}

  // At most kLeaf queries; one for a BufferList.
  void run(const int32_t* query_rows, int count) {
    const int64_t dims = args_.dims;
    query_rows_ = query_rows;
    count_ = count;
    const int padded = (count + kTileRows - 1) / kTileRows * kTileRows;
    for (int q = 0; q < padded; ++q) {
      T* centered = args_.scratch + q * dims;
      if (q >= count) {
        std::fill_n(centered, dims, T(0));
        continue;
      }
      const T* query = args_.queries + query_rows[q] * dims;
      T norm = 0;
      for (int64_t d = 0; d < dims; ++d) {
        centered[d] = query[d] - args_.center[d];
        norm = multiply_add(centered[d], centered[d], norm);
      }
      norms_[q] = norm;
      List::reset(states_[q], args_.slots);
      update_threshold(q);
    }
    for (int64_t leaf = 0; leaf < args_.leaves; ++leaf) scan_leaf(leaf, padded);
    for (int q = 0; q < count; ++q) {
      write_row<List>(states_[q], args_.slots, args_.k, args_.distances + query_rows[q] * args_.k,
                      args_.indices + query_rows[q] * args_.k);
    }
  }

 private:
  static constexpr int kLanes = Lanes<T>::kCount;
  static constexpr int kStep = kTileVectors * kLanes;
  static_assert(kLeaf % kStep == 0);
  using Vector = typename Lanes<T>::Vector;

  void update_threshold(int q) {
    thresholds_[q] = error_.query_term(norms_[q], List::worst(states_[q]).distance());
  }

  void scan_leaf(int64_t leaf, int padded) {
    const T* columns = args_.coordinates + leaf * args_.dims * kLeaf;
    const int32_t* order = args_.order + leaf * kLeaf;
    T terms[kLeaf];
    for (int i = 0; i < kLeaf; ++i) terms[i] = error_.point_term(args_.norms[leaf * kLeaf + i]);
    for (int i = 0; i < kLeaf; i += kStep) {
      for (int first = 0; first < padded; first += kTileRows) {
        Vector products[kTileRows][kTileVectors];
        multiply_tile(args_.scratch + first * args_.dims, columns + i, args_.dims, products);
        for (int r = 0; r < kTileRows; ++r) {
          const Vector threshold = broadcast(thresholds_[first + r]);
          uint32_t hits = 0;
          for (int v = 0; v < kTileVectors; ++v) {
            const Vector value = multiply_add(products[r][v], broadcast(T(-2)), load(terms + i + v * kLanes));
            hits |= not_greater(value, threshold) << (v * kLanes);
          }
          if (hits && first + r < count_) measure(first + r, order + i, hits);
        }
      }
    }
  }

  void measure(int q, const int32_t* order, uint32_t hits) {
    const int32_t query_row = query_rows_[q];
    const T* query = args_.queries + query_row * args_.dims;
    List list(states_[q]);
    for (; hits; hits &= hits - 1) {
      const int32_t row = order[__builtin_ctz(hits)];
      if (row < 0 || (args_.exclude_self && row == query_row)) continue;
      const Key<T> key =
          Key<T>::make(squared_distance(query, args_.points + row * args_.dims, args_.dims), row);
      if (key < list.worst()) list.insert(key);
    }
    list.save(states_[q]);
    update_threshold(q);
  }

  const FeatureSearchArgs<T>& args_;
  const ProductError<T> error_;
  const int32_t* query_rows_;
  int count_;
  T norms_[kBlockRows] = {}, thresholds_[kBlockRows] = {};
  typename List::State states_[std::is_same_v<List, BufferList<T>> ? 1 : kLeaf];
};

template <typename T>
void search(const FeatureSearchArgs<T>& args, int64_t begin, int64_t end) {
  with_list(T(0), args.slots, [&](auto tag) {
    using List = typename decltype(tag)::type;
    constexpr int kBlock = std::is_same_v<List, BufferList<T>> ? 1 : kLeaf;
    BlockSearch<T, List> block(args);
    for (int64_t q = begin; q < end; q += kBlock) {
      block.run(args.query_rows + q, static_cast<int>(std::min<int64_t>(kBlock, end - q)));
    }
  });
}

}  // namespace

void feature_search(const FeatureSearchArgs<float>& args, int64_t begin, int64_t end) {
  search(args, begin, end);
}
void feature_search(const FeatureSearchArgs<double>& args, int64_t begin, int64_t end) {
  search(args, begin, end);
}

}  // namespace AVATAR_ISA
}  // namespace avatar
