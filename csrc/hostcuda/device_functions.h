// The functions of CUDA's device code: barriers, warp operations, atomics, arithmetic.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "block.h"
#include "race.h"

#define AVATAR_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// Barriers of the block.
inline void __syncthreads(AVATAR_SITE) {
  hostcuda::block_barrier(false, {file, line});
}
inline int __syncthreads_count(int vote, AVATAR_SITE) {
  return hostcuda::block_barrier(vote, {file, line}).nonzero;
}
inline int __syncthreads_and(int vote, AVATAR_SITE) {
  const hostcuda::Votes votes = hostcuda::block_barrier(vote, {file, line});
  return votes.nonzero == votes.threads;
}
inline int __syncthreads_or(int vote, AVATAR_SITE) {
  return hostcuda::block_barrier(vote, {file, line}).nonzero > 0;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

namespace hostcuda {

template <typename T>
uint64_t to_bits(T value) {
  static_assert(std::is_arithmetic_v<T>, "warp operations take numbers of at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// What a lane outside the mask holds is undefined: here, all bits are set.
inline uint64_t value_of(const WarpCall& call, int lane) {
  return call.mask >> lane & 1 ? call.values[lane] : ~uint64_t{0};
}

template <typename T>
T warp_shuffle(unsigned mask, T value, int argument, int width, Answer answer, Site site) {
  if (width < 1 || width > kWarpSize || (width & (width - 1)))
    fail("shuffles with a width that is no power of two");
  return from_bits<T>(warp_call(mask, to_bits(value), argument, width, answer, site));
}

inline uint64_t shuffle_from(const WarpCall& call, int lane) {
  const int first = lane & ~(call.width - 1);
  return value_of(call, first + (call.arguments[lane] & (call.width - 1)));
}
inline uint64_t shuffle_up(const WarpCall& call, int lane) {
  const int source = lane - call.arguments[lane];
  return value_of(call, source < (lane & ~(call.width - 1)) ? lane : source);
}
inline uint64_t shuffle_down(const WarpCall& call, int lane) {
  const int source = lane + call.arguments[lane];
  return value_of(call, source > (lane | (call.width - 1)) ? lane : source);
}
inline uint64_t shuffle_xor(const WarpCall& call, int lane) {
  const int source = (lane ^ call.arguments[lane]) & (kWarpSize - 1);
  return value_of(call, source > (lane | (call.width - 1)) ? lane : source);
}
inline uint64_t ballot(const WarpCall& call, int) {
  unsigned bits = 0;
  for (int lane = 0; lane < kWarpSize; ++lane)
    bits |= unsigned{(call.mask >> lane & 1) && call.values[lane]} << lane;
  return bits;
}
inline uint64_t equal_lanes(const WarpCall& call, int lane) {
  unsigned bits = 0;
  for (int other = 0; other < kWarpSize; ++other) {
    bits |= unsigned{(call.mask >> other & 1) && call.values[other] == call.values[lane]} << other;
  }
  return bits;
}

template <typename T, T combine(T, T)>
uint64_t reduce(const WarpCall& call, int) {
  bool first = true;
  T result{};
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!(call.mask >> lane & 1)) continue;
    const T value = from_bits<T>(call.values[lane]);
    result = first ? value : combine(result, value);
    first = false;
  }
  return to_bits(result);
}

template <typename T>
T sum_of(T a, T b) {
  return static_cast<T>(static_cast<unsigned>(a) + static_cast<unsigned>(b));
}
template <typename T>
T least_of(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T greatest_of(T a, T b) {
  return a < b ? b : a;
}
inline unsigned all_bits_of(unsigned a, unsigned b) {
  return a & b;
}
inline unsigned any_bits_of(unsigned a, unsigned b) {
  return a | b;
}
inline unsigned odd_bits_of(unsigned a, unsigned b) {
  return a ^ b;
}

template <typename T, T combine(T, T)>
T warp_reduce(unsigned mask, T value, Site site) {
  return from_bits<T>(warp_call(mask, to_bits(value), 0, kWarpSize, {reduce<T, combine>, true}, site));
}

}  // namespace hostcuda

// Warp operations.
inline void __syncwarp(unsigned mask = 0xffffffffu, AVATAR_SITE) {
  hostcuda::warp_call(mask, 0, 0, hostcuda::kWarpSize, {hostcuda::ballot, true}, {file, line});
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = hostcuda::kWarpSize, AVATAR_SITE) {
  return hostcuda::warp_shuffle(mask, value, lane, width, {hostcuda::shuffle_from}, {file, line});
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = hostcuda::kWarpSize, AVATAR_SITE) {
  return hostcuda::warp_shuffle(mask, value, delta, width, {hostcuda::shuffle_up}, {file, line});
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = hostcuda::kWarpSize, AVATAR_SITE) {
  return hostcuda::warp_shuffle(mask, value, delta, width, {hostcuda::shuffle_down}, {file, line});
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = hostcuda::kWarpSize, AVATAR_SITE) {
  return hostcuda::warp_shuffle(mask, value, bits, width, {hostcuda::shuffle_xor}, {file, line});
}
inline unsigned __ballot_sync(unsigned mask, int vote, AVATAR_SITE) {
  return hostcuda::warp_call(mask, vote != 0, 0, hostcuda::kWarpSize, {hostcuda::ballot, true}, {file, line});
}
inline int __all_sync(unsigned mask, int vote, AVATAR_SITE) {
  return __ballot_sync(mask, vote, file, line) == mask;
}
inline int __any_sync(unsigned mask, int vote, AVATAR_SITE) {
  return __ballot_sync(mask, vote, file, line) != 0;
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value, AVATAR_SITE) {
  return hostcuda::warp_call(mask, hostcuda::to_bits(value), 0, hostcuda::kWarpSize, {hostcuda::equal_lanes},
                             {file, line});
}
#define AVATAR_REDUCE(name, type, combine)                                            \
  inline type __reduce_##name##_sync(unsigned mask, type value, AVATAR_SITE) {        \
    return hostcuda::warp_reduce<type, hostcuda::combine>(mask, value, {file, line}); \
  }
AVATAR_REDUCE(add, int, sum_of)
AVATAR_REDUCE(add, unsigned, sum_of)
AVATAR_REDUCE(min, int, least_of)
AVATAR_REDUCE(min, unsigned, least_of)
AVATAR_REDUCE(max, int, greatest_of)
AVATAR_REDUCE(max, unsigned, greatest_of)
AVATAR_REDUCE(and, unsigned, all_bits_of)
AVATAR_REDUCE(or, unsigned, any_bits_of)
AVATAR_REDUCE(xor, unsigned, odd_bits_of)
#undef AVATAR_REDUCE

// Atomics. Threads run one at a time, so plain reads and writes do.
namespace hostcuda {

template <typename T>
struct Itself {
  using type = T;
};
template <typename T>
using Same = typename Itself<T>::type;

// Stores change(old) at the address and returns the old value.
template <typename T, typename Change>
__attribute__((noinline, no_sanitize("thread"))) T atomic_update(T* address, const Change& change) {
  interleave();
  race::atomic(address, sizeof(T), __builtin_return_address(0));
  const T old = *address;
  *address = change(old);
  return old;
}

}  // namespace hostcuda

#define AVATAR_ATOMIC(name, expression)                                                  \
  template <typename T>                                                                  \
  T name(T* address, hostcuda::Same<T> value) {                                          \
    return hostcuda::atomic_update(address, [value](T old) -> T { return expression; }); \
  }
AVATAR_ATOMIC(atomicAdd, old + value)
AVATAR_ATOMIC(atomicSub, old - value)
AVATAR_ATOMIC(atomicMin, value < old ? value : old)
AVATAR_ATOMIC(atomicMax, old < value ? value : old)
AVATAR_ATOMIC(atomicExch, (static_cast<void>(old), value))
AVATAR_ATOMIC(atomicAnd, old& value)
AVATAR_ATOMIC(atomicOr, old | value)
AVATAR_ATOMIC(atomicXor, old ^ value)
#undef AVATAR_ATOMIC
template <typename T>
T atomicCAS(T* address, hostcuda::Same<T> compare, hostcuda::Same<T> value) {
  return hostcuda::atomic_update(address, [=](T old) -> T { return old == compare ? value : old; });
}

// Loads and stores with a cache hint.
#define AVATAR_LOAD(name)    \
  template <typename T>      \
  T name(const T* address) { \
    return *address;         \
  }
AVATAR_LOAD(__ldg)
AVATAR_LOAD(__ldcs)
AVATAR_LOAD(__ldcg)
#undef AVATAR_LOAD
template <typename T>
void __stcs(T* address, hostcuda::Same<T> value) {
  *address = value;
}

// Bits.
template <typename To, typename From>
To avatar_hostcuda_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}
inline int __float_as_int(float value) {
  return avatar_hostcuda_cast<int>(value);
}
inline unsigned __float_as_uint(float value) {
  return avatar_hostcuda_cast<unsigned>(value);
}
inline float __int_as_float(int value) {
  return avatar_hostcuda_cast<float>(value);
}
inline float __uint_as_float(unsigned value) {
  return avatar_hostcuda_cast<float>(value);
}
inline long long __double_as_longlong(double value) {
  return avatar_hostcuda_cast<long long>(value);
}
inline double __longlong_as_double(long long value) {
  return avatar_hostcuda_cast<double>(value);
}
inline int __popc(unsigned value) {
  return __builtin_popcount(value);
}
inline int __popcll(unsigned long long value) {
  return __builtin_popcountll(value);
}
inline int __clz(int value) {
  return value ? __builtin_clz(value) : 32;
}
inline int __clzll(long long value) {
  return value ? __builtin_clzll(value) : 64;
}
inline int __ffs(int value) {
  return __builtin_ffs(value);
}
inline int __ffsll(long long value) {
  return __builtin_ffsll(value);
}
inline unsigned long long __brevll(unsigned long long value) {
  unsigned long long result = 0;
  for (int bit = 0; bit < 64; ++bit) result |= (value >> bit & 1) << (63 - bit);
  return result;
}
inline unsigned __brev(unsigned value) {
  return static_cast<unsigned>(__brevll(value) >> 32);
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

// Arithmetic. Without contraction (-ffp-contract=off), plain operators round as the _rn functions do.
#define AVATAR_ROUNDED(name, type, expression) \
  inline type name(type a, type b) {           \
    return expression;                         \
  }
AVATAR_ROUNDED(__fadd_rn, float, a + b)
AVATAR_ROUNDED(__fsub_rn, float, a - b)
AVATAR_ROUNDED(__fmul_rn, float, a* b)
AVATAR_ROUNDED(__fdiv_rn, float, a / b)
AVATAR_ROUNDED(__fdividef, float, a / b)
AVATAR_ROUNDED(__dadd_rn, double, a + b)
AVATAR_ROUNDED(__dsub_rn, double, a - b)
AVATAR_ROUNDED(__dmul_rn, double, a* b)
AVATAR_ROUNDED(__ddiv_rn, double, a / b)
AVATAR_ROUNDED(__powf, float, std::pow(a, b))
#undef AVATAR_ROUNDED
#define AVATAR_MATH(name, type, expression) \
  inline type name(type x) {                \
    return expression;                      \
  }
AVATAR_MATH(rsqrtf, float, 1 / std::sqrt(x))
AVATAR_MATH(rsqrt, double, 1 / std::sqrt(x))
AVATAR_MATH(__frsqrt_rn, float, 1 / std::sqrt(x))
AVATAR_MATH(__fsqrt_rn, float, std::sqrt(x))
AVATAR_MATH(__dsqrt_rn, double, std::sqrt(x))
AVATAR_MATH(__frcp_rn, float, 1 / x)
AVATAR_MATH(__expf, float, std::exp(x))
AVATAR_MATH(__logf, float, std::log(x))
AVATAR_MATH(__log2f, float, std::log2(x))
AVATAR_MATH(__sinf, float, std::sin(x))
AVATAR_MATH(__cosf, float, std::cos(x))
AVATAR_MATH(__saturatef, float, x > 0 ? (x < 1 ? x : 1) : 0)
#undef AVATAR_MATH
#define AVATAR_CONVERSION(suffix, round)           \
  inline int __float2int_##suffix(float x) {       \
    return static_cast<int>(round(x));             \
  }                                                \
  inline unsigned __float2uint_##suffix(float x) { \
    return static_cast<unsigned>(round(x));        \
  }
AVATAR_CONVERSION(rn, std::nearbyint)
AVATAR_CONVERSION(rd, std::floor)
AVATAR_CONVERSION(ru, std::ceil)
AVATAR_CONVERSION(rz, std::trunc)
#undef AVATAR_CONVERSION
inline float __fmaf_rn(float a, float b, float c) {
  return std::fma(a, b, c);
}
inline double __fma_rn(double a, double b, double c) {
  return std::fma(a, b, c);
}

// Of numbers of any two types; a NaN gives way to a number.
template <typename A, typename B>
std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmin(T(a), T(b));
  return T(b) < T(a) ? T(b) : T(a);
}
template <typename A, typename B>
std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmax(T(a), T(b));
  return T(a) < T(b) ? T(b) : T(a);
}
