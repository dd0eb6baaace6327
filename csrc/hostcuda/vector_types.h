// CUDA's built-in vector types, with its alignments.
#pragma once

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define AVATAR_VECTORS(name, type, align2, align4)                \
  struct alignas(align2) name##2 {                                \
    type x, y;                                                    \
  };                                                              \
  struct alignas(align4) name##4 {                                \
    type x, y, z, w;                                              \
  };                                                              \
  inline name##2 make_##name##2(type x, type y) {                 \
    return {x, y};                                                \
  }                                                               \
  inline name##4 make_##name##4(type x, type y, type z, type w) { \
    return {x, y, z, w};                                          \
  }
AVATAR_VECTORS(char, signed char, 2, 4)
AVATAR_VECTORS(uchar, unsigned char, 2, 4)
AVATAR_VECTORS(short, short, 4, 8)
AVATAR_VECTORS(ushort, unsigned short, 4, 8)
AVATAR_VECTORS(int, int, 8, 16)
AVATAR_VECTORS(uint, unsigned, 8, 16)
AVATAR_VECTORS(float, float, 8, 16)
AVATAR_VECTORS(longlong, long long, 16, 16)
AVATAR_VECTORS(ulonglong, unsigned long long, 16, 16)
AVATAR_VECTORS(double, double, 16, 16)
#undef AVATAR_VECTORS

struct int3 {
  int x, y, z;
};
struct float3 {
  float x, y, z;
};
inline int3 make_int3(int x, int y, int z) {
  return {x, y, z};
}
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) {
  return {x, y, z};
}
inline float3 make_float3(float x, float y, float z) {
  return {x, y, z};
}
