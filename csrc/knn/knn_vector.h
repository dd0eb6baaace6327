// What the search adds to the vectors of common/vector.h.
#pragma once

#include <cstdint>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "common/vector.h"

namespace avatar {
namespace AVATAR_ISA {
namespace {

using FloatVector = Vector<float>;
using DoubleVector = Vector<double>;
using RowVector = Index<float>;

template <typename T>
inline Vector<T> broadcast(T value) {
  return value - Vector<T>{};
}

// a * b + c, fused exactly where the instruction set has it: every distance and every lower bound of one is
// then rounded alike, and bounds hold to the last bit.
inline float multiply_add(float a, float b, float c) {
#if defined(__FP_FAST_FMAF) || defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

inline double multiply_add(double a, double b, double c) {
#if defined(__FP_FAST_FMA) || defined(__FMA__)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

inline FloatVector multiply_add(FloatVector a, FloatVector b, FloatVector c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__FP_FAST_FMAF)
  for (int lane = 0; lane < Lanes<float>::kCount; ++lane) c[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
  return c;
#else
  return a * b + c;
#endif
}

inline DoubleVector multiply_add(DoubleVector a, DoubleVector b, DoubleVector c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_pd(a, b, c);
#elif defined(__FP_FAST_FMA)
  for (int lane = 0; lane < Lanes<double>::kCount; ++lane) c[lane] = __builtin_fma(a[lane], b[lane], c[lane]);
  return c;
#else
  return a * b + c;
#endif
}

// A bit for each lane where !(a > b): NaN counts.
inline uint32_t not_greater(FloatVector a, FloatVector b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(a, b, _CMP_NGT_UQ);
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NGT_UQ));
#elif defined(__SSE2__)
  return _mm_movemask_ps(_mm_cmpngt_ps(a, b));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < Lanes<float>::kCount; ++lane) bits |= uint32_t(!(a[lane] > b[lane])) << lane;
  return bits;
#endif
}

inline uint32_t not_greater(DoubleVector a, DoubleVector b) {
#if defined(__AVX512F__)
  return _mm512_cmp_pd_mask(a, b, _CMP_NGT_UQ);
#elif defined(__AVX2__)
  return _mm256_movemask_pd(_mm256_cmp_pd(a, b, _CMP_NGT_UQ));
#elif defined(__SSE2__)
  return _mm_movemask_pd(_mm_cmpngt_pd(a, b));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < Lanes<double>::kCount; ++lane) bits |= uint32_t(!(a[lane] > b[lane])) << lane;
  return bits;
#endif
}

// A bit for each of kCount rows that is `row`.
template <int kCount>
inline uint32_t equal_rows(const int32_t* rows, int32_t row) {
  uint32_t bits = 0;
  for (int lane = 0; lane < kCount; ++lane) bits |= uint32_t(rows[lane] == row) << lane;
  return bits;
}

#if defined(__AVX2__)
template <>
inline uint32_t equal_rows<8>(const int32_t* rows, int32_t row) {
  const __m256i equal = _mm256_cmpeq_epi32(_mm256_loadu_si256((const __m256i*)rows), _mm256_set1_epi32(row));
  return _mm256_movemask_ps((__m256)equal);
}
#endif
#if defined(__AVX512F__)
template <>
inline uint32_t equal_rows<16>(const int32_t* rows, int32_t row) {
  return _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(rows), _mm512_set1_epi32(row));
}
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
// For each mask the lanes that are set, a byte each.
struct CompressTable {
  uint64_t lanes[256] = {};
  constexpr CompressTable() {
    for (int mask = 0; mask < 256; ++mask) {
      for (int lane = 0, place = 0; lane < 8; ++lane) {
        if (mask >> lane & 1) lanes[mask] |= uint64_t(lane) << 8 * place++;
      }
    }
  }
};
constexpr CompressTable kCompressTable;
#endif

// Stores the lanes of a and of b that are set in `mask`, one after the other; may write whole vectors.
inline void store_lanes(float* target_a, FloatVector a, int32_t* target_b, const int32_t* b, uint32_t mask) {
#if defined(__AVX512F__)
  _mm512_storeu_ps(target_a, _mm512_maskz_compress_ps(mask, a));
  _mm512_storeu_si512(target_b, _mm512_maskz_compress_epi32(mask, _mm512_loadu_si512(b)));
#elif defined(__AVX2__)
  const __m256i lanes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)&kCompressTable.lanes[mask]));
  _mm256_storeu_ps(target_a, _mm256_permutevar8x32_ps(a, lanes));
  _mm256_storeu_si256((__m256i*)target_b,
                      _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i*)b), lanes));
#else
  for (int place = 0; mask; mask &= mask - 1, ++place) {
    const int lane = __builtin_ctz(mask);
    target_a[place] = a[lane], target_b[place] = b[lane];
  }
#endif
}

// The larger lanes.
inline FloatVector larger(FloatVector a, FloatVector b) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(0xffff, a, b);
#elif defined(__AVX__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

inline DoubleVector larger(DoubleVector a, DoubleVector b) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_pd(0xff, a, b);
#elif defined(__AVX__)
  return _mm256_max_pd(a, b);
#elif defined(__SSE2__)
  return _mm_max_pd(a, b);
#else
  return a > b ? a : b;
#endif
}

template <int kHalf, typename V, int... kLane>
inline V swap_halves(V vector, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(vector, vector, (kLane ^ kHalf)...);
}

// The largest lane, in every lane.
template <int kHalf = 0, typename V>
inline V largest_lane(V vector) {
  constexpr int kLanes = sizeof(V) / sizeof(vector[0]), kDistance = kHalf ? kHalf : kLanes / 2;
  vector = larger(vector, swap_halves<kDistance>(vector, std::make_integer_sequence<int, kLanes>()));
  if constexpr (kDistance > 1) return largest_lane<kDistance / 2>(vector);
  return vector;
}

// The sum of the lanes, in every lane.
template <int kHalf = 0, typename V>
inline V sum_lanes(V vector) {
  constexpr int kLanes = sizeof(V) / sizeof(vector[0]), kDistance = kHalf ? kHalf : kLanes / 2;
  vector += swap_halves<kDistance>(vector, std::make_integer_sequence<int, kLanes>());
  if constexpr (kDistance > 1) return sum_lanes<kDistance / 2>(vector);
  return vector;
}

// A bit for each lane where (distance, row) is below (limit, limit row).
inline uint32_t below(FloatVector distance, int32_t row, FloatVector limit, RowVector limit_row) {
#if defined(__AVX512F__)
  const __mmask16 ties = _mm512_cmp_ps_mask(distance, limit, _CMP_EQ_OQ);
  return _mm512_cmp_ps_mask(distance, limit, _CMP_LT_OQ) |
         _mm512_mask_cmpgt_epi32_mask(ties, (__m512i)limit_row, _mm512_set1_epi32(row));
#else
  const RowVector lanes = (distance < limit) | ((distance == limit) & (limit_row > row));
#if defined(__AVX2__)
  return _mm256_movemask_ps((__m256)lanes);
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)lanes);
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < Lanes<float>::kCount; ++lane) bits |= uint32_t(lanes[lane] & 1) << lane;
  return bits;
#endif
#endif
}

}  // namespace
}  // namespace AVATAR_ISA
}  // namespace avatar
