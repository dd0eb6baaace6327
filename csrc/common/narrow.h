// bfloat16 and float16 in memory, float32 in vectors. Include it in `*_simd.cpp` files only, inside nothing.
#pragma once

#include "common/vector.h"

namespace avatar {
namespace AVATAR_ISA {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

using FloatBits = Index<float>;
typedef uint16_t NarrowBits __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t WideBits __attribute__((vector_size(kVectorBytes)));

inline WideBits widen_bits(const void* source) {
  NarrowBits narrow;
  __builtin_memcpy(&narrow, source, sizeof narrow);
  return __builtin_convertvector(narrow, WideBits);
}

inline void narrow_bits(void* target, WideBits bits) {
  const NarrowBits narrow = __builtin_convertvector(bits, NarrowBits);
  __builtin_memcpy(target, &narrow, sizeof narrow);
}

inline Vector<float> load_floats(const BFloat16* source) {
  return (Vector<float>)(widen_bits(source) << 16);
}

// To the nearest, to even halfway between two; NaN stays NaN.
inline void store_floats(BFloat16* target, Vector<float> value) {
  const WideBits bits = (WideBits)value;
  const WideBits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const WideBits is_number = (WideBits)(value == value);
  narrow_bits(target, (rounded & is_number) | (0x7fff & ~is_number));
}

// float16 has its exponent 112 lower; a factor of 2^112 also makes numbers of its subnormals.
inline Vector<float> load_floats(const Float16* source) {
  const WideBits bits = widen_bits(source);
  const Vector<float> magnitude = (Vector<float>)((bits & 0x7fff) << 13) * 0x1p112f;
  // Infinity and NaN have the largest exponent in both.
  const WideBits special = (WideBits)(magnitude >= 65536.f) & 0x7f800000;
  return (Vector<float>)((WideBits)magnitude | special | (bits & 0x8000) << 16);
}

inline void store_floats(Float16* target, Vector<float> value) {
  const WideBits bits = (WideBits)value, sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  const Vector<float> magnitude = (Vector<float>)size;
  const WideBits normal = (size - (112 << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
  // Adding 1/2 leaves the bits of a subnormal, rounded, at the end of the sum.
  const WideBits subnormal = (WideBits)(magnitude + 0.5f) - 0x3f000000;
  const WideBits is_subnormal = (WideBits)(magnitude < 0x1p-14f);
  WideBits result = (normal & ~is_subnormal) | (subnormal & is_subnormal);
  // From halfway between the largest number and the next power of 2.
  const WideBits overflows = (WideBits)(magnitude >= 65520.f);
  result = (result & ~overflows) | (0x7c00 & overflows);
  const WideBits is_number = (WideBits)(value == value);
  narrow_bits(target, sign | (result & is_number) | (0x7e00 & ~is_number));
}

inline Vector<float> load_floats(const float* source) {
  return load(source);
}

inline void store_floats(float* target, Vector<float> value) {
  store(target, value);
}

// The first `count` lanes, not all.
template <typename Number>
inline Vector<float> load_some_floats(const Number* source, int64_t count) {
  Number values[Lanes<float>::kCount] = {};
  for (int64_t lane = 0; lane < count; ++lane) values[lane] = source[lane];
  return load_floats(values);
}

template <typename Number>
inline void store_some_floats(Number* target, Vector<float> value, int64_t count) {
  Number values[Lanes<float>::kCount];
  store_floats(values, value);
  for (int64_t lane = 0; lane < count; ++lane) target[lane] = values[lane];
}

}  // namespace
}  // namespace AVATAR_ISA
}  // namespace avatar
