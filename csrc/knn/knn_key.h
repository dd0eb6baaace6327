// What neighbours are ordered by: distance, then row. For *_simd.cpp only.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "knn/knn_vector.h"

namespace avatar {
namespace AVATAR_ISA {
namespace {

template <typename T>
struct Key;

// Distances are never negative, so their bits order as they do, and one comparison orders (distance, row).
// With kOffset the bits, read as a double, are a positive normal number too, which orders them alike.
template <>
struct Key<float> {
  int64_t bits;
  static constexpr int64_t kOffset = int64_t{1} << 52;

  static Key make(float distance, int32_t row) {
    uint32_t high;
    std::memcpy(&high, &distance, sizeof(high));
    return {static_cast<int64_t>(uint64_t{high} << 32 | static_cast<uint32_t>(row)) + kOffset};
  }
  static Key missing() { return make(std::numeric_limits<float>::infinity(), -1); }
  float distance() const {
    const uint32_t high = static_cast<uint32_t>((bits - kOffset) >> 32);
    float distance;
    std::memcpy(&distance, &high, sizeof(distance));
    return distance;
  }
  int32_t row() const { return static_cast<int32_t>(bits); }
  bool operator<(const Key& other) const { return bits < other.bits; }
};

template <>
struct Key<double> {
  double value;
  uint32_t unsigned_row;

  static Key make(double distance, int32_t row) { return {distance, static_cast<uint32_t>(row)}; }
  static Key missing() { return make(std::numeric_limits<double>::infinity(), -1); }
  double distance() const { return value; }
  int32_t row() const { return static_cast<int32_t>(unsigned_row); }
  bool operator<(const Key& other) const {
    return value < other.value || (value == other.value && unsigned_row < other.unsigned_row);
  }
};

// Takes float keys apart.
inline void write_keys(const int64_t* keys, int64_t count, float* distances, int64_t* rows) {
  int64_t i = 0;
#if defined(__AVX2__)
  const __m256i offset = _mm256_set1_epi64x(Key<float>::kOffset);
  const __m256i odd = _mm256_set_epi32(7, 5, 3, 1, 7, 5, 3, 1);
  for (; i + 4 <= count; i += 4) {
    const __m256i bits = _mm256_loadu_si256((const __m256i*)(keys + i));
    const __m256i high = _mm256_permutevar8x32_epi32(_mm256_sub_epi64(bits, offset), odd);
    _mm_storeu_si128((__m128i*)(distances + i), _mm256_castsi256_si128(high));
    const __m256i signs = _mm256_srai_epi32(_mm256_shuffle_epi32(bits, 0xa0), 31);
    _mm256_storeu_si256((__m256i*)(rows + i), _mm256_blend_epi32(bits, signs, 0xaa));
  }
#endif
  for (; i < count; ++i) {
    const Key<float> key{keys[i]};
    distances[i] = key.distance();
    rows[i] = key.row();
  }
}

}  // namespace
}  // namespace AVATAR_ISA
}  // namespace avatar
