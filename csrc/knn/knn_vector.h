// What the search adds to the vectors of common/vector.h.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "common/vector.h"

namespace avatar {
namespace AVATAR_ISA {
namespace {

using FloatVector = Vector<float>;
using DoubleVector = Vector<double>;
typedef int64_t LongVector __attribute__((vector_size(kVectorBytes)));

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

// The lanes of `current` one place up; the last lane of `lower` comes in below.
inline LongVector shift_up(LongVector lower, LongVector current) {
#if defined(__AVX512F__)
  // The unmasked form makes GCC 12 warn of an undefined operand.
  return (LongVector)_mm512_maskz_alignr_epi64(0xff, (__m512i)current, (__m512i)lower, 7);
#elif defined(__AVX2__)
  const __m256i between = _mm256_permute2x128_si256((__m256i)lower, (__m256i)current, 0x21);
  return (LongVector)_mm256_alignr_epi8((__m256i)current, between, 8);
#else
  return LongVector{lower[1], current[0]};
#endif
}

template <typename V>
inline V larger(V a, V b) {
  return a > b ? a : b;
}

}  // namespace
}  // namespace AVATAR_ISA
}  // namespace avatar
