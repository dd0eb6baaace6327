// AVX-512 for tests on processors that only have AVX2: vectors of 64 bytes become pairs of registers, and the
// intrinsics that the sources use are made of halves. CMake includes this before the sources of the avx512
// set when AVATAR_OPS_EMULATE_AVX512 is on; what the compiler makes of real AVX-512 is not covered.
#pragma once

#include <immintrin.h>

#if !defined(__AVX512F__)
#define __AVX512F__ 1

namespace avatar {
namespace emulated {
namespace {

template <typename Whole, typename Half>
struct Halves {
  Half low, high;

  explicit Halves(Whole whole) { __builtin_memcpy(this, &whole, sizeof whole); }
  Halves(Half low, Half high) : low(low), high(high) {}

  Whole whole() const {
    Whole joined;
    __builtin_memcpy(&joined, this, sizeof joined);
    return joined;
  }
};

using Floats = Halves<__m512, __m256>;
using Doubles = Halves<__m512d, __m256d>;
using Integers = Halves<__m512i, __m256i>;

inline __m512 fmadd(__m512 a, __m512 b, __m512 c) {
  const Floats x(a), y(b), z(c);
  return Floats(_mm256_fmadd_ps(x.low, y.low, z.low), _mm256_fmadd_ps(x.high, y.high, z.high)).whole();
}

inline __m512d fmadd(__m512d a, __m512d b, __m512d c) {
  const Doubles x(a), y(b), z(c);
  return Doubles(_mm256_fmadd_pd(x.low, y.low, z.low), _mm256_fmadd_pd(x.high, y.high, z.high)).whole();
}

inline __m512 minimum(__m512 a, __m512 b) {
  const Floats x(a), y(b);
  return Floats(_mm256_min_ps(x.low, y.low), _mm256_min_ps(x.high, y.high)).whole();
}

inline __m512d minimum(__m512d a, __m512d b) {
  const Doubles x(a), y(b);
  return Doubles(_mm256_min_pd(x.low, y.low), _mm256_min_pd(x.high, y.high)).whole();
}

template <int kPredicate>
inline __mmask16 compare(__m512 a, __m512 b) {
  const Floats x(a), y(b);
  const int low = _mm256_movemask_ps(_mm256_cmp_ps(x.low, y.low, kPredicate));
  const int high = _mm256_movemask_ps(_mm256_cmp_ps(x.high, y.high, kPredicate));
  return static_cast<__mmask16>(low | high << 8);
}

template <int kPredicate>
inline __mmask8 compare(__m512d a, __m512d b) {
  const Doubles x(a), y(b);
  const int low = _mm256_movemask_pd(_mm256_cmp_pd(x.low, y.low, kPredicate));
  const int high = _mm256_movemask_pd(_mm256_cmp_pd(x.high, y.high, kPredicate));
  return static_cast<__mmask8>(low | high << 4);
}

// Of the sixteen numbers `low`, then `high`, the eight from number kCount on.
template <int kCount>
inline __m512i align(__m512i high, __m512i low) {
  int64_t numbers[16], aligned[8];
  __builtin_memcpy(numbers, &low, sizeof low);
  __builtin_memcpy(numbers + 8, &high, sizeof high);
  __builtin_memcpy(aligned, numbers + kCount, sizeof aligned);
  __m512i result;
  __builtin_memcpy(&result, aligned, sizeof result);
  return result;
}

inline __m512 load(const float* source) {
  return Floats(_mm256_loadu_ps(source), _mm256_loadu_ps(source + 8)).whole();
}

inline __m512d load(const double* source) {
  return Doubles(_mm256_loadu_pd(source), _mm256_loadu_pd(source + 4)).whole();
}

}  // namespace
}  // namespace emulated
}  // namespace avatar

#define _mm512_fmadd_ps(a, b, c) avatar::emulated::fmadd((__m512)(a), (__m512)(b), (__m512)(c))
#define _mm512_fmadd_pd(a, b, c) avatar::emulated::fmadd((__m512d)(a), (__m512d)(b), (__m512d)(c))
#define _mm512_maskz_min_ps(every, a, b) avatar::emulated::minimum((__m512)(a), (__m512)(b))
#define _mm512_maskz_min_pd(every, a, b) avatar::emulated::minimum((__m512d)(a), (__m512d)(b))
#define _mm512_cmp_ps_mask(a, b, predicate) avatar::emulated::compare<predicate>((__m512)(a), (__m512)(b))
#define _mm512_cmp_pd_mask(a, b, predicate) avatar::emulated::compare<predicate>((__m512d)(a), (__m512d)(b))
#define _mm512_maskz_alignr_epi64(every, high, low, count) avatar::emulated::align<count>(high, low)
#define _mm512_loadu_ps(source) avatar::emulated::load(source)
#define _mm512_loadu_pd(source) avatar::emulated::load(source)
#define _mm512_add_ps(a, b) ((__m512)(a) + (__m512)(b))
#define _mm512_add_pd(a, b) ((__m512d)(a) + (__m512d)(b))
#define _mm512_set1_ps(value) ((value) - (__m512){})
#define _mm512_set1_pd(value) ((value) - (__m512d){})

#endif
