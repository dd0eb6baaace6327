// Several neighbouring elements that one thread loads, works on and stores at once.
#pragma once

#include "common/device.cuh"

namespace avatar {

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T values[kCount];
  __device__ T& operator[](int i) { return values[i]; }
  __device__ const T& operator[](int i) const { return values[i]; }
};

// The widest load there is.
constexpr int kPackBytes = 16;

template <typename T, int kCount>
__device__ Pack<T, kCount> load_pack(const T* source) {
  return *reinterpret_cast<const Pack<T, kCount>*>(source);
}

template <typename T, int kCount>
__device__ void store_pack(T* target, const Pack<T, kCount>& pack) {
  *reinterpret_cast<Pack<T, kCount>*>(target) = pack;
}

inline bool is_aligned(const void* pointer, int bytes = kPackBytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// A block whose x covers `columns` of a row, up to a warp, and whose y takes as many rows or edges as fit.
inline dim3 block_for_columns(int64_t columns, int threads) {
  unsigned lanes = 1;
  while (lanes < kWarpSize && lanes < columns) lanes *= 2;
  return dim3(lanes, threads / lanes);
}

}  // namespace avatar
