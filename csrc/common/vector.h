// Vectors of the instruction set that a `*_simd.cpp` file is built for. Include it there only, inside
// nothing.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace avatar {
namespace AVATAR_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Lanes of T, and signed integers of the same size, which comparisons of lanes give.
template <typename T>
struct Lanes {
  static constexpr int64_t kCount = kVectorBytes / sizeof(T);
  using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T Vector __attribute__((vector_size(kVectorBytes)));
  typedef Integer Index __attribute__((vector_size(kVectorBytes)));
};

template <typename T>
using Vector = typename Lanes<T>::Vector;
template <typename T>
using Index = typename Lanes<T>::Index;

template <typename T>
inline Vector<T> load(const T* source) {
  Vector<T> vector;
  __builtin_memcpy(&vector, source, sizeof vector);
  return vector;
}

template <typename T>
inline void store(T* target, Vector<T> vector) {
  __builtin_memcpy(target, &vector, sizeof vector);
}

// The smaller lanes, those of b where neither is smaller.
inline Vector<float> smaller(Vector<float> a, Vector<float> b) {
#if defined(__AVX512F__)
  return _mm512_maskz_min_ps(0xffff, a, b);
#elif defined(__AVX__)
  return _mm256_min_ps(a, b);
#elif defined(__SSE2__)
  return _mm_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

inline Vector<double> smaller(Vector<double> a, Vector<double> b) {
#if defined(__AVX512F__)
  return _mm512_maskz_min_pd(0xff, a, b);
#elif defined(__AVX__)
  return _mm256_min_pd(a, b);
#elif defined(__SSE2__)
  return _mm_min_pd(a, b);
#else
  return a < b ? a : b;
#endif
}

// The first `count` lanes.
template <typename T>
inline void store_some(T* target, Vector<T> vector, int64_t count) {
  if (count >= Lanes<T>::kCount) return store(target, vector);
  for (int64_t lane = 0; lane < count; ++lane) target[lane] = vector[lane];
}

template <typename T>
inline Vector<T> load_some(const T* source, int64_t count) {
  if (count >= Lanes<T>::kCount) return load(source);
  Vector<T> vector = {};
  for (int64_t lane = 0; lane < count; ++lane) vector[lane] = source[lane];
  return vector;
}

}  // namespace
}  // namespace AVATAR_ISA
}  // namespace avatar
