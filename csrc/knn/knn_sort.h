// Sorting networks over keys whose bits, read as doubles, are positive numbers or 0: one instruction each
// finds the smaller and the larger of two vectors. For *_simd.cpp only.
#pragma once

#include <algorithm>
#include <utility>

#include "knn/knn_key.h"
#include "knn/knn_vector.h"

namespace avatar {
namespace AVATAR_ISA {
namespace {

// A network that is called hands its vectors over in memory.
#define AVATAR_INLINE inline __attribute__((always_inline))

constexpr int kKeyLanes = Lanes<double>::kCount;

// Leaves the smaller keys in a and the larger in b.
AVATAR_INLINE void exchange(DoubleVector& a, DoubleVector& b) {
  const DoubleVector low = smaller(a, b);
  b = larger(a, b);
  a = low;
}

// Lane i of the result is lane i ^ kMask.
template <int kMask>
AVATAR_INLINE DoubleVector swapped(DoubleVector v) {
#if defined(__AVX512F__)
  if constexpr (kMask == 1) return _mm512_maskz_permute_pd(0xff, v, 0x55);
  if constexpr (kMask == 2) return _mm512_maskz_permutex_pd(0xff, v, 0x4e);
  if constexpr (kMask == 3) return _mm512_maskz_permutex_pd(0xff, v, 0x1b);
  if constexpr (kMask == 4) return _mm512_maskz_shuffle_f64x2(0xff, v, v, 0x4e);
  const __m512i lanes = _mm512_set_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm512_maskz_permutexvar_pd(0xff, lanes, v);
#elif defined(__AVX2__)
  return kMask == 1 ? _mm256_permute_pd(v, 0x5) : _mm256_permute4x64_pd(v, kMask == 2 ? 0x4e : 0x1b);
#elif defined(__SSE2__)
  return _mm_shuffle_pd(v, v, 1);
#else
  return DoubleVector{v[1], v[0]};
#endif
}

// Orders each pair of lanes (i, i ^ kMask), the smaller key first.
template <int kMask>
AVATAR_INLINE DoubleVector exchange_lanes(DoubleVector v) {
  const DoubleVector other = swapped<kMask>(v);
#if defined(__AVX512F__)
  constexpr int kUpper = kMask == 1 ? 0xaa : kMask < 4 ? 0xcc : 0xf0;
  return _mm512_mask_max_pd(smaller(v, other), kUpper, v, other);
#elif defined(__AVX2__)
  constexpr int kUpper = kMask == 1 ? 0xa : 0xc;
  return _mm256_blend_pd(smaller(v, other), larger(v, other), kUpper);
#else
  const DoubleVector low = smaller(v, other), high = larger(v, other);
  return DoubleVector{low[0], high[1]};
#endif
}

AVATAR_INLINE DoubleVector reversed(DoubleVector v) {
  return swapped<kKeyLanes - 1>(v);
}

// Sorts a bitonic sequence of kVectors vectors.
template <int kVectors>
AVATAR_INLINE void merge_bitonic(DoubleVector* v) {
  for (int stride = kVectors / 2; stride; stride /= 2) {
    for (int i = 0; i < kVectors; ++i) {
      if (!(i & stride)) exchange(v[i], v[i + stride]);
    }
  }
  for (int i = 0; i < kVectors; ++i) {
    if constexpr (kKeyLanes > 4) v[i] = exchange_lanes<4>(v[i]);
    if constexpr (kKeyLanes > 2) v[i] = exchange_lanes<2>(v[i]);
    v[i] = exchange_lanes<1>(v[i]);
  }
}

// Sorts two sorted sequences of kVectors / 2 vectors each.
template <int kVectors>
AVATAR_INLINE void merge_sorted(DoubleVector* v) {
  if constexpr (kVectors > 1) {
    for (int i = kVectors / 2; i < kVectors; ++i) v[i] = reversed(v[i]);
    for (int i = 0; i < kVectors / 2; ++i) exchange(v[i], v[kVectors - 1 - i]);
    // Either half is bitonic now, the second one in whatever order of vectors.
    merge_bitonic<kVectors / 2>(v);
    merge_bitonic<kVectors / 2>(v + kVectors / 2);
  }
}

// Sorts each vector by itself.
template <int kVectors>
AVATAR_INLINE void sort_lanes(DoubleVector* v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (kVectors == 4) {
    // By columns, then turned.
    exchange(v[0], v[1]), exchange(v[2], v[3]);
    exchange(v[0], v[2]), exchange(v[1], v[3]);
    exchange(v[1], v[2]);
    const DoubleVector a = _mm256_unpacklo_pd(v[0], v[1]), b = _mm256_unpackhi_pd(v[0], v[1]);
    const DoubleVector c = _mm256_unpacklo_pd(v[2], v[3]), d = _mm256_unpackhi_pd(v[2], v[3]);
    v[0] = _mm256_permute2f128_pd(a, c, 0x20), v[2] = _mm256_permute2f128_pd(a, c, 0x31);
    v[1] = _mm256_permute2f128_pd(b, d, 0x20), v[3] = _mm256_permute2f128_pd(b, d, 0x31);
    return;
  }
#endif
  for (int i = 0; i < kVectors; ++i) {
    v[i] = exchange_lanes<1>(v[i]);
    if constexpr (kKeyLanes > 2) v[i] = exchange_lanes<1>(exchange_lanes<3>(v[i]));
    if constexpr (kKeyLanes > 4) v[i] = exchange_lanes<1>(exchange_lanes<2>(exchange_lanes<7>(v[i])));
  }
}

template <int kVectors, int kSorted = 1>
AVATAR_INLINE void sort_vectors(DoubleVector* v) {
  if constexpr (kSorted == 1) sort_lanes<kVectors>(v);
  if constexpr (kSorted < kVectors) {
    for (int i = 0; i < kVectors; i += 2 * kSorted) merge_sorted<2 * kSorted>(v + i);
    sort_vectors<kVectors, 2 * kSorted>(v);
  }
}

// The smallest keys of the sorted `list` and the sorted `added`, in `list`.
template <int kList, int kAdded>
AVATAR_INLINE void merge_smallest(DoubleVector* list, DoubleVector* added) {
  // Beyond the list's size nothing of what is added can stay.
  constexpr int kCommon = kAdded < kList ? kAdded : kList;
  for (int i = 0; i < kCommon; ++i) {
    list[kList - 1 - i] = smaller(list[kList - 1 - i], reversed(added[i]));
  }
  merge_bitonic<kList>(list);
}

// Comparisons (first, second) of a network, as they follow on each other.
template <int kCount>
struct Network {
  int first[kCount] = {}, second[kCount] = {};
  int count = 0;
  constexpr void add(int a, int b) {
    first[count] = a;
    second[count++] = b;
  }
};

// Batcher's odd-even merge sort.
template <int kKeys>
constexpr auto sorting_network() {
  Network<kKeys * kKeys / 2> network;
  for (int sorted = 1; sorted < kKeys; sorted *= 2) {
    for (int step = sorted; step; step /= 2) {
      for (int begin = step % sorted; begin + step < kKeys; begin += 2 * step) {
        for (int i = begin; i < begin + step && i + step < kKeys; ++i) {
          if (i / (2 * sorted) == (i + step) / (2 * sorted)) network.add(i, i + step);
        }
      }
    }
  }
  return network;
}

// Sorts bitonic sequences.
template <int kKeys>
constexpr auto merging_network() {
  Network<kKeys * kKeys / 2> network;
  for (int stride = kKeys / 2; stride; stride /= 2) {
    for (int i = 0; i < kKeys; ++i) {
      if (!(i & stride)) network.add(i, i + stride);
    }
  }
  return network;
}

template <typename Make, size_t... kPlaces>
AVATAR_INLINE void run_network(DoubleVector* v, Make make, std::index_sequence<kPlaces...>) {
  constexpr auto network = make();
  (exchange(v[network.first[kPlaces]], v[network.second[kPlaces]]), ...);
}

template <typename Make>
AVATAR_INLINE void run_network(DoubleVector* v, Make make) {
  run_network(v, make, std::make_index_sequence<make().count>{});
}

// Spelled out, as a loop would become a call.
template <size_t... kPlaces>
AVATAR_INLINE void copy_vectors(const DoubleVector* from, DoubleVector* to, std::index_sequence<kPlaces...>) {
  ((to[kPlaces] = from[kPlaces]), ...);
}

template <int kCount>
AVATAR_INLINE void copy_vectors(const DoubleVector* from, DoubleVector* to) {
  copy_vectors(from, to, std::make_index_sequence<kCount>{});
}

// Sorts kKeys vectors lane by lane.
template <int kKeys>
inline void sort_columns(DoubleVector* v) {
  DoubleVector keys[kKeys];
  copy_vectors<kKeys>(v, keys);
  run_network(keys, [] { return sorting_network<kKeys>(); });
  copy_vectors<kKeys>(keys, v);
}

template <int kKeys, size_t... kPlaces>
AVATAR_INLINE void take_smaller(DoubleVector* list, const DoubleVector* added,
                                std::index_sequence<kPlaces...>) {
  ((list[kKeys - 1 - kPlaces] = smaller(list[kKeys - 1 - kPlaces], added[kPlaces])), ...);
}

// The smallest keys of the sorted `list` and the sorted `added`, in `list`, lane by lane.
template <int kList, int kAdded>
inline void merge_columns(DoubleVector* list, const DoubleVector* added) {
  DoubleVector keys[kList];
  copy_vectors<kList>(list, keys);
  // Beyond the list's size nothing of what is added can stay.
  take_smaller<kList>(keys, added, std::make_index_sequence<std::min(kAdded, kList)>{});
  run_network(keys, [] { return merging_network<kList>(); });
  copy_vectors<kList>(keys, list);
}

// Makes keys of distances and rows, in two vectors: of lanes 0, 1, 4, 5, ... and of lanes 2, 3, 6, 7, ...
inline void interleave_keys(FloatVector distances, RowVector rows, DoubleVector& low, DoubleVector& high) {
  typedef int64_t Keys __attribute__((vector_size(kVectorBytes)));
#if defined(__AVX512F__)
  const __m512i bits = (__m512i)distances, other = (__m512i)rows;
  low = (DoubleVector)((Keys)_mm512_maskz_unpacklo_epi32(0xffff, other, bits) + Key<float>::kOffset);
  high = (DoubleVector)((Keys)_mm512_maskz_unpackhi_epi32(0xffff, other, bits) + Key<float>::kOffset);
#elif defined(__AVX2__)
  const __m256i bits = (__m256i)distances, other = (__m256i)rows;
  low = (DoubleVector)((Keys)_mm256_unpacklo_epi32(other, bits) + Key<float>::kOffset);
  high = (DoubleVector)((Keys)_mm256_unpackhi_epi32(other, bits) + Key<float>::kOffset);
#else
  const auto key = [&](int lane) { return Key<float>::make(distances[lane], rows[lane]).bits; };
  low = (DoubleVector)Keys{key(0), key(1)};
  high = (DoubleVector)Keys{key(2), key(3)};
#endif
}

inline void store_keys(int64_t* target, DoubleVector keys) {
  store(reinterpret_cast<double*>(target), keys);
}

inline DoubleVector load_keys(const int64_t* source) {
  return load(reinterpret_cast<const double*>(source));
}

// The transpose of a square of keys whose rows begin `stride` apart.
inline void transpose_keys(const int64_t* source, int64_t stride, DoubleVector* target) {
#if defined(__AVX2__)
  constexpr int kSide = 4;
  for (int row = 0; row < kKeyLanes; row += kSide) {
    for (int column = 0; column < kKeyLanes; column += kSide) {
      __m256d r[kSide];
      for (int i = 0; i < kSide; ++i)
        r[i] = _mm256_loadu_pd((const double*)(source + (row + i) * stride + column));
      const __m256d a = _mm256_unpacklo_pd(r[0], r[1]), b = _mm256_unpackhi_pd(r[0], r[1]);
      const __m256d c = _mm256_unpacklo_pd(r[2], r[3]), d = _mm256_unpackhi_pd(r[2], r[3]);
      double* to = reinterpret_cast<double*>(target + column) + row;
      _mm256_storeu_pd(to, _mm256_permute2f128_pd(a, c, 0x20));
      _mm256_storeu_pd(to + kKeyLanes, _mm256_permute2f128_pd(b, d, 0x20));
      _mm256_storeu_pd(to + 2 * kKeyLanes, _mm256_permute2f128_pd(a, c, 0x31));
      _mm256_storeu_pd(to + 3 * kKeyLanes, _mm256_permute2f128_pd(b, d, 0x31));
    }
  }
#else
  for (int column = 0; column < kKeyLanes; ++column) {
    alignas(kVectorBytes) int64_t keys[kKeyLanes];
    for (int row = 0; row < kKeyLanes; ++row) keys[row] = source[row * stride + column];
    target[column] = load_keys(keys);
  }
#endif
}

#undef AVATAR_INLINE

}  // namespace
}  // namespace AVATAR_ISA
}  // namespace avatar
