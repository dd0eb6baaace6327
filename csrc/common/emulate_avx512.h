// AVX-512 for tests on processors that only have AVX2: the compiler splits vectors of 64 bytes, and the
// intrinsics that the sources use work lane by lane as Intel's guide describes them. CMake includes this
// before the sources of the avx512 set when AVATAR_OPS_EMULATE_AVX512 is on; what the compiler makes of real
// AVX-512 is not covered.
#pragma once

#include <immintrin.h>

#if !defined(__AVX512F__)
#define __AVX512F__ 1

#include <cstdint>
#include <cstring>

namespace avatar {
namespace emulated {
namespace {

// The 64 bytes of a vector as lanes of T.
template <typename T>
struct Register {
  static constexpr int kLanes = 64 / sizeof(T);
  T lane[kLanes];

  Register() : lane{} {}
  template <typename V>
  explicit Register(V vector) {
    static_assert(sizeof(V) == sizeof(lane), "64 bytes");
    std::memcpy(lane, &vector, sizeof lane);
  }

  template <typename V>
  operator V() const {
    static_assert(sizeof(V) == sizeof(lane), "64 bytes");
    V vector;
    std::memcpy(&vector, lane, sizeof lane);
    return vector;
  }
};

// Lane i is lane_of(i) where its bit of the mask is set, else that of `other`.
template <typename T, typename LaneOf>
inline Register<T> masked(uint32_t mask, Register<T> other, LaneOf lane_of) {
  for (int i = 0; i < Register<T>::kLanes; ++i) {
    if (mask >> i & 1) other.lane[i] = lane_of(i);
  }
  return other;
}

// The bits of the mask whose lanes hold.
template <typename T, typename Holds>
inline uint32_t where(uint32_t mask, Holds holds) {
  uint32_t bits = 0;
  for (int i = 0; i < Register<T>::kLanes; ++i) bits |= uint32_t{holds(i)} << i;
  return bits & mask;
}

template <typename T>
inline Register<T> all(T value) {
  return masked(~0u, Register<T>(), [&](int) { return value; });
}

inline Register<float> fmadd(Register<float> a, Register<float> b, Register<float> c) {
  return masked(~0u, c, [&](int i) { return __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]); });
}

inline Register<double> fmadd(Register<double> a, Register<double> b, Register<double> c) {
  return masked(~0u, c, [&](int i) { return __builtin_fma(a.lane[i], b.lane[i], c.lane[i]); });
}

// a 2^floor(b).
inline Register<float> scale(uint32_t mask, Register<float> a, Register<float> b) {
  return masked(mask, Register<float>(),
                [&](int i) { return a.lane[i] * __builtin_exp2f(__builtin_floorf(b.lane[i])); });
}

template <typename T>
inline Register<T> add(Register<T> a, Register<T> b) {
  return masked(~0u, a, [&](int i) { return a.lane[i] + b.lane[i]; });
}

// The second where neither is smaller.
template <typename T>
inline Register<T> minimum(uint32_t mask, Register<T> a, Register<T> b) {
  return masked(mask, Register<T>(), [&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}

template <typename T>
inline Register<T> maximum(Register<T> other, uint32_t mask, Register<T> a, Register<T> b) {
  return masked(mask, other, [&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}

template <int kPredicate, typename T>
inline uint32_t compare(Register<T> a, Register<T> b) {
  static_assert(kPredicate == _CMP_NGT_UQ || kPredicate == _CMP_LT_OQ || kPredicate == _CMP_EQ_OQ ||
                    kPredicate == _CMP_NEQ_UQ,
                "add it");
  return where<T>(~0u, [&](int i) {
    if (kPredicate == _CMP_NGT_UQ) return !(a.lane[i] > b.lane[i]);
    if (kPredicate == _CMP_NEQ_UQ) return a.lane[i] != b.lane[i];
    return kPredicate == _CMP_LT_OQ ? a.lane[i] < b.lane[i] : a.lane[i] == b.lane[i];
  });
}

// The lanes of the mask, moved together.
template <typename T>
inline Register<T> compress(uint32_t mask, Register<T> a) {
  Register<T> packed;
  int count = 0;
  for (int i = 0; i < Register<T>::kLanes; ++i) {
    if (mask >> i & 1) packed.lane[count++] = a.lane[i];
  }
  return packed;
}

// Lane i is lane source(i) of a.
template <typename T, typename Source>
inline Register<T> permute(uint32_t mask, Register<T> a, Source source) {
  return masked(mask, Register<T>(), [&](int i) { return a.lane[source(i)]; });
}

// Lane i is number lanes[i] of those of a and, after them, of b.
inline Register<int32_t> permute_both(Register<int32_t> a, Register<int32_t> lanes, Register<int32_t> b) {
  return masked(~0u, Register<int32_t>(), [&](int i) {
    const int lane = lanes.lane[i] & 31;
    return lane < 16 ? a.lane[lane] : b.lane[lane - 16];
  });
}

// From each 16 bytes of a and b in turn, the lower two numbers (kFirst = 0) or the upper two (2).
template <int kFirst>
inline Register<int32_t> unpack(uint32_t mask, Register<int32_t> a, Register<int32_t> b) {
  return masked(mask, Register<int32_t>(),
                [&](int i) { return (i % 2 ? b : a).lane[i / 4 * 4 + kFirst + i % 4 / 2]; });
}

// Of the sixteen numbers `low`, then `high`, the eight from number kCount on.
template <int kCount>
inline Register<int64_t> align(uint32_t mask, Register<int64_t> high, Register<int64_t> low) {
  return masked(mask, Register<int64_t>(),
                [&](int i) { return i + kCount < 8 ? low.lane[i + kCount] : high.lane[i + kCount - 8]; });
}

template <typename T>
inline Register<T> load(const void* source) {
  Register<T> loaded;
  std::memcpy(loaded.lane, source, sizeof loaded.lane);
  return loaded;
}

template <typename T>
inline void store(void* target, Register<T> stored) {
  std::memcpy(target, stored.lane, sizeof stored.lane);
}

template <typename T>
inline void store_where(T* target, uint32_t mask, Register<T> stored) {
  for (int i = 0; i < Register<T>::kLanes; ++i) {
    if (mask >> i & 1) std::memcpy(target + i, stored.lane + i, sizeof(T));
  }
}

}  // namespace
}  // namespace emulated
}  // namespace avatar

#define AVATAR_FLOATS(a) avatar::emulated::Register<float>(a)
#define AVATAR_DOUBLES(a) avatar::emulated::Register<double>(a)
#define AVATAR_INTS(a) avatar::emulated::Register<int32_t>(a)
#define AVATAR_LONGS(a) avatar::emulated::Register<int64_t>(a)

#define _mm512_loadu_ps(p) (__m512) avatar::emulated::load<float>(p)
#define _mm512_loadu_pd(p) (__m512d) avatar::emulated::load<double>(p)
#define _mm512_loadu_si512(p) (__m512i) avatar::emulated::load<int64_t>(p)
#define _mm512_load_si512(p) _mm512_loadu_si512(p)
#define _mm512_storeu_ps(p, a) avatar::emulated::store(p, AVATAR_FLOATS(a))
#define _mm512_storeu_si512(p, a) avatar::emulated::store(p, AVATAR_LONGS(a))
#define _mm512_mask_storeu_ps(p, mask, a) avatar::emulated::store_where(p, mask, AVATAR_FLOATS(a))
#define _mm512_mask_storeu_pd(p, mask, a) avatar::emulated::store_where(p, mask, AVATAR_DOUBLES(a))
#define _mm512_set1_ps(value) (__m512) avatar::emulated::all<float>(value)
#define _mm512_set1_pd(value) (__m512d) avatar::emulated::all<double>(value)
#define _mm512_set1_epi32(value) (__m512i) avatar::emulated::all<int32_t>(value)
#define _mm512_set_epi64(h, g, f, e, d, c, b, a) ((__m512i){a, b, c, d, e, f, g, h})

#define _mm512_add_ps(a, b) (__m512) avatar::emulated::add(AVATAR_FLOATS(a), AVATAR_FLOATS(b))
#define _mm512_add_pd(a, b) (__m512d) avatar::emulated::add(AVATAR_DOUBLES(a), AVATAR_DOUBLES(b))
#define _mm512_fmadd_ps(a, b, c) \
  (__m512) avatar::emulated::fmadd(AVATAR_FLOATS(a), AVATAR_FLOATS(b), AVATAR_FLOATS(c))
#define _mm512_fmadd_pd(a, b, c) \
  (__m512d) avatar::emulated::fmadd(AVATAR_DOUBLES(a), AVATAR_DOUBLES(b), AVATAR_DOUBLES(c))
#define _mm512_maskz_min_ps(mask, a, b) \
  (__m512) avatar::emulated::minimum(mask, AVATAR_FLOATS(a), AVATAR_FLOATS(b))
#define _mm512_maskz_min_pd(mask, a, b) \
  (__m512d) avatar::emulated::minimum(mask, AVATAR_DOUBLES(a), AVATAR_DOUBLES(b))
#define _mm512_maskz_max_ps(mask, a, b)                                                           \
  (__m512) avatar::emulated::maximum(avatar::emulated::Register<float>(), mask, AVATAR_FLOATS(a), \
                                     AVATAR_FLOATS(b))
#define _mm512_maskz_max_pd(mask, a, b)                                                              \
  (__m512d) avatar::emulated::maximum(avatar::emulated::Register<double>(), mask, AVATAR_DOUBLES(a), \
                                      AVATAR_DOUBLES(b))
#define _mm512_mask_max_pd(other, mask, a, b) \
  (__m512d) avatar::emulated::maximum(AVATAR_DOUBLES(other), mask, AVATAR_DOUBLES(a), AVATAR_DOUBLES(b))

#define _mm512_cmp_ps_mask(a, b, predicate) \
  (__mmask16) avatar::emulated::compare<predicate>(AVATAR_FLOATS(a), AVATAR_FLOATS(b))
#define _mm512_cmp_pd_mask(a, b, predicate) \
  (__mmask8) avatar::emulated::compare<predicate>(AVATAR_DOUBLES(a), AVATAR_DOUBLES(b))
#define _mm512_cmpeq_epi32_mask(a, b) \
  (__mmask16) avatar::emulated::compare<_CMP_EQ_OQ>(AVATAR_INTS(a), AVATAR_INTS(b))
#define _mm512_mask_cmpgt_epi32_mask(mask, a, b) \
  (__mmask16)((mask) & avatar::emulated::compare<_CMP_LT_OQ>(AVATAR_INTS(b), AVATAR_INTS(a)))

#define _mm512_maskz_scalef_ps(mask, a, b) \
  (__m512) avatar::emulated::scale(mask, AVATAR_FLOATS(a), AVATAR_FLOATS(b))
#define _mm512_maskz_compress_ps(mask, a) (__m512) avatar::emulated::compress(mask, AVATAR_FLOATS(a))
#define _mm512_maskz_compress_pd(mask, a) (__m512d) avatar::emulated::compress(mask, AVATAR_DOUBLES(a))
#define _mm512_maskz_compress_epi32(mask, a) (__m512i) avatar::emulated::compress(mask, AVATAR_INTS(a))
#define _mm512_maskz_permute_pd(mask, a, control)              \
  (__m512d) avatar::emulated::permute(mask, AVATAR_DOUBLES(a), \
                                      [](int i) { return (i & ~1) + ((control) >> i & 1); })
#define _mm512_maskz_permutex_pd(mask, a, control)             \
  (__m512d) avatar::emulated::permute(mask, AVATAR_DOUBLES(a), \
                                      [](int i) { return (i & ~3) + ((control) >> 2 * (i & 3) & 3); })
// The sources give the same vector twice.
#define _mm512_maskz_shuffle_f64x2(mask, a, b, control)        \
  (__m512d) avatar::emulated::permute(mask, AVATAR_DOUBLES(a), \
                                      [](int i) { return ((control) >> 2 * (i / 2) & 3) * 2 + i % 2; })
#define _mm512_maskz_permutexvar_pd(mask, lanes, a)            \
  (__m512d) avatar::emulated::permute(mask, AVATAR_DOUBLES(a), \
                                      [&](int i) { return AVATAR_LONGS(lanes).lane[i] & 7; })
#define _mm512_permutex2var_epi32(a, lanes, b) \
  (__m512i) avatar::emulated::permute_both(AVATAR_INTS(a), AVATAR_INTS(lanes), AVATAR_INTS(b))
#define _mm512_maskz_unpacklo_epi32(mask, a, b) \
  (__m512i) avatar::emulated::unpack<0>(mask, AVATAR_INTS(a), AVATAR_INTS(b))
#define _mm512_maskz_unpackhi_epi32(mask, a, b) \
  (__m512i) avatar::emulated::unpack<2>(mask, AVATAR_INTS(a), AVATAR_INTS(b))
#define _mm512_maskz_alignr_epi64(mask, high, low, count) \
  (__m512i) avatar::emulated::align<count>(mask, AVATAR_LONGS(high), AVATAR_LONGS(low))

#endif
