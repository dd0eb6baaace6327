// Small matrix products on tiles that stay in cache, and the vector arithmetic around them. For *_simd.cpp
// only; everything here is local to the including file.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "common/memory.h"

namespace avatar {
namespace AVATAR_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRowBlock = 12, kMostOuter = 8;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kRowBlock = 6, kMostOuter = 4;
#else
constexpr int kVectorBytes = 16, kRowBlock = 6, kMostOuter = 4;
#endif
// Columns are worked on in panels of this many vectors; the last panel may have one.
constexpr int kPanelVectors = 2;

template <typename T>
struct Vectors;
template <>
struct Vectors<float> {
  typedef float Type __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef int32_t Bits __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
};
template <>
struct Vectors<double> {
  typedef double Type __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef int64_t Bits __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
};
template <typename T>
using Vector = typename Vectors<T>::Type;
template <typename T>
constexpr int64_t kLanes = kVectorBytes / static_cast<int64_t>(sizeof(T));
// Rows of an outer product held in registers; divides every padded width.
template <typename T>
constexpr int64_t kOuterBlock = std::min<int64_t>(kLanes<T>, kMostOuter);

template <typename T>
inline Vector<T> load(const T* source) {
  return *reinterpret_cast<const Vector<T>*>(source);
}
template <typename T>
inline void store(T* target, Vector<T> value) {
  *reinterpret_cast<Vector<T>*>(target) = value;
}
template <typename T>
inline Vector<T> splat(T value) {
  // Subtracting zero changes no number, so that only the broadcast is left; adding would lose -0.
  return value - Vector<T>{};
}
// Stores the first `count` lanes.
template <typename T>
inline void store_some(T* target, Vector<T> value, int64_t count) {
  if (count >= kLanes<T>) return store(target, value);
#if defined(__AVX512F__)
  const uint32_t mask = (uint32_t{1} << count) - 1;
  if constexpr (sizeof(T) == 4) {
    return _mm512_mask_storeu_ps(target, static_cast<__mmask16>(mask), (__m512)value);
  } else {
    return _mm512_mask_storeu_pd(target, static_cast<__mmask8>(mask), (__m512d)value);
  }
#else
  T lanes[kLanes<T>];
  store(lanes, value);
  for (int64_t lane = 0; lane < count; ++lane) target[lane] = lanes[lane];
#endif
}

// The larger lanes of a, else those of b: NaN in a is left out, NaN in b stays.
template <typename T>
inline Vector<T> larger(Vector<T> a, Vector<T> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#endif
  return a > b ? a : b;
}

template <typename T>
struct Numbers;
// Polynomial for exp(r), |r| <= ln(2) / 2, highest power first: for float that of least relative error with
// exp(0) = 1 (2e-7 as evaluated), for double the Taylor series. Adding `round` rounds to an integer and
// leaves it in the low bits, with the exponent's bias on top; at `least` that sum is 0.
template <>
struct Numbers<float> {
  static constexpr float round = 12582912.f + 127.f, ln2_high = 0.693147181f, ln2_low = 0.f;
  static constexpr float log2e = 1.44269504f, least = -88.02f;
  static constexpr int mantissa = 23, bias = 127, log_terms = 5;
  static constexpr float exp[] = {0.00829030573f, 0.0418979749f, 0.166676372f,
                                  0.499991506f,   0.999999702f,  1.f};
};
template <>
struct Numbers<double> {
  static constexpr double round = 6755399441055744. + 1023., ln2_high = 0x1.62e42fefap-1,
                          ln2_low = 0x1.cf79abc9e3b3ap-40;
  static constexpr double log2e = 1.4426950408889634, least = -709.08;
  static constexpr int mantissa = 52, bias = 1023, log_terms = 11;
  static constexpr double exp[] = {
      1. / 6227020800, 1. / 479001600, 1. / 39916800, 1. / 3628800, 1. / 362880, 1. / 40320, 1. / 5040,
      1. / 720,        1. / 120,       1. / 24,       1. / 6,       1. / 2,      1.,         1.};
};

// exp(r) times the power of two that Numbers<T>::round left in `shifted`.
template <typename T>
inline Vector<T> exp_of_parts(Vector<T> r, Vector<T> shifted) {
  using N = Numbers<T>;
  Vector<T> value = splat<T>(N::exp[0]);
  for (unsigned i = 1; i < sizeof(N::exp) / sizeof(T); ++i) value = value * r + N::exp[i];
  return value * (Vector<T>)((typename Vectors<T>::Bits)shifted << N::mantissa);
}

// exp(x) for x <= 0; 0 below the normal numbers; NaN stays NaN.
template <typename T>
inline Vector<T> exp_nonpositive(Vector<T> x) {
  using N = Numbers<T>;
  const Vector<T> least = splat<T>(N::least);
  x = least > x ? least : x;
  const Vector<T> shifted = x * N::log2e + N::round;
  const Vector<T> power = shifted - N::round;
  Vector<T> r = x - power * N::ln2_high;
  if constexpr (N::ln2_low != 0) r -= power * N::ln2_low;
  return exp_of_parts<T>(r, shifted);
}

// 2^x for x <= 0; 0 below the normal numbers; NaN stays NaN.
template <typename T>
inline Vector<T> exp2_nonpositive(Vector<T> x) {
  using N = Numbers<T>;
  const Vector<T> least = splat<T>(T(-N::bias));
  x = least > x ? least : x;
  const Vector<T> shifted = x + N::round;
  return exp_of_parts<T>((x - (shifted - N::round)) * (N::ln2_high + N::ln2_low), shifted);
}

#if defined(__AVX512F__)
// 2^(i / 32) as bits.
alignas(64) constexpr uint32_t kExp2Steps[32] = {
    0x3f800000, 0x3f82cd87, 0x3f85aac3, 0x3f88980f, 0x3f8b95c2, 0x3f8ea43a, 0x3f91c3d3, 0x3f94f4f0,
    0x3f9837f0, 0x3f9b8d3a, 0x3f9ef532, 0x3fa27043, 0x3fa5fed7, 0x3fa9a15b, 0x3fad583f, 0x3fb123f6,
    0x3fb504f3, 0x3fb8fbaf, 0x3fbd08a4, 0x3fc12c4d, 0x3fc5672a, 0x3fc9b9be, 0x3fce248c, 0x3fd2a81e,
    0x3fd744fd, 0x3fdbfbb8, 0x3fe0ccdf, 0x3fe5b907, 0x3feac0c7, 0x3fefe4ba, 0x3ff5257d, 0x3ffa83b3,
};

// By the lowest five bits.
inline Vectors<float>::Bits exp2_step(Vectors<float>::Bits steps) {
  return (Vectors<float>::Bits)_mm512_permutex2var_epi32(_mm512_load_si512(kExp2Steps), (__m512i)steps,
                                                         _mm512_load_si512(kExp2Steps + 16));
}

// The same with 32 steps of the exponent by a table, which leaves a polynomial of degree 2: half the
// multiplications. Errors below 5e-7, above -10 below 2.5e-7; what lies below the normal numbers may come out
// as up to 1.2e-38.
template <>
inline Vector<float> exp_nonpositive<float>(Vector<float> x) {
  using Bits = Vectors<float>::Bits;
  constexpr float round = 12582912.f, least = -88.02f, steps = 46.1662413f;
  // Least relative error with exp(0) = 1.
  constexpr float linear = 1.00001466f;
  const __m512 limited = _mm512_maskz_max_ps(0xffff, _mm512_set1_ps(least), (__m512)x);
  const __m512 shifted = _mm512_fmadd_ps(limited, _mm512_set1_ps(steps), _mm512_set1_ps(round));
  const Vector<float> r =
      _mm512_fmadd_ps(round - shifted, _mm512_set1_ps(Numbers<float>::ln2_high / 32), limited);
  const Vector<float> value = (r * 0.5f + linear) * r + 1.f;
  const Bits step = (Bits)shifted;
  return value * (Vector<float>)(((step << 18) & static_cast<int32_t>(0xff800000)) + exp2_step(step));
}

// 2^x for finite x, in steps of 1/32 by the same table: infinite from 128 on, 0 below -150; NaN for what is
// not finite.
inline Vector<float> exp2_finite(Vector<float> x) {
  constexpr float round = 12582912.f / 32;
  const Vector<float> shifted = x + round, power = shifted - round, r = x - power;
  const Vector<float> value = (r * 0.240226507f + 0.693157343f) * r + 1.f;
  const Vector<float> scaled = value * (Vector<float>)exp2_step((Vectors<float>::Bits)shifted);
  return _mm512_maskz_scalef_ps(0xffff, (__m512)scaled, (__m512)power);
}

template <>
inline Vector<float> exp2_nonpositive<float>(Vector<float> x) {
  return exp2_finite(_mm512_maskz_max_ps(0xffff, _mm512_set1_ps(-151.f), (__m512)x));
}
#endif

// log(x) for normal x > 0: the series of 2 artanh((m - 1) / (m + 1)) on the mantissa m in [sqrt(1/2),
// sqrt(2)).
template <typename T>
inline Vector<T> log_positive(Vector<T> x) {
  using N = Numbers<T>;
  using Bits = typename Vectors<T>::Bits;
  // Adding 1 - sqrt(1/2) to the mantissa carries into the exponent from sqrt(2) on.
  const Bits root_half = (Bits)splat<T>(T(0.70710678118654752));
  const Bits shifted = (Bits)x - root_half;
  const Bits exponent = shifted >> N::mantissa;
  const Vector<T> m = (Vector<T>)((Bits)x - (exponent << N::mantissa));
  const Vector<T> s = (m - T(1)) / (m + T(1)), square = s * s;
  Vector<T> series = splat<T>(T(1) / T(2 * N::log_terms - 1));
  for (int i = N::log_terms - 1; i > 0; --i) series = series * square + T(1) / T(2 * i - 1);
  const Vector<T> power = __builtin_convertvector(exponent, Vector<T>);
  const Vector<T> result = power * N::ln2_high + (power * N::ln2_low + T(2) * s * series);
  return x == x ? result : x;
}

// log(2^power x).
template <typename T>
inline Vector<T> natural_log(Vector<T> power, Vector<T> x) {
  return power * Numbers<T>::ln2_high + (power * Numbers<T>::ln2_low + log_positive<T>(x));
}

// 64-byte aligned working memory.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : bytes_(static_cast<size_t>(count) * sizeof(T)), data_(static_cast<T*>(take_memory(bytes_))) {}
  ~Scratch() { give_memory(data_, bytes_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }
  T* row(int64_t offset) const { return data_ + offset; }

 private:
  const size_t bytes_;
  T* const data_;
};

inline int64_t round_up(int64_t value, int64_t unit) {
  return (value + unit - 1) / unit * unit;
}
template <typename T>
inline int64_t padded(int64_t columns) {
  return round_up(columns, kLanes<T>);
}

// More columns of the left matrix of a product, kept elsewhere.
template <typename T>
struct Beside {
  const T* a = nullptr;
  int64_t lda = 0, depth = 0;
};

template <int kRows, int kVectors, bool kFetch, typename T, typename Init, typename Done>
__attribute__((always_inline)) inline void product_panel(int64_t row, int64_t column, int64_t depth,
                                                         const T* a, int64_t lda, const T* panel,
                                                         const Init& init, const Done& done,
                                                         const Beside<T>& beside) {
  // Unrolled early, so that the sums are registers throughout.
  Vector<T> sum[kRows][kVectors];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[r][v] = init(row + r, column + v * kLanes<T>);
  }
  const auto add = [&](int64_t depth, const T* a, int64_t lda, const T* panel)
                       __attribute__((always_inline)) {
                         for (int64_t d = 0; d < depth; ++d) {
                           if constexpr (kFetch) __builtin_prefetch(a + kRows * (lda + d));
                           Vector<T> b[kVectors];
                           for (int v = 0; v < kVectors; ++v)
                             b[v] = load(panel + (d * kVectors + v) * kLanes<T>);
#pragma GCC unroll 12
                           for (int r = 0; r < kRows; ++r) {
                             const Vector<T> value = splat(a[r * lda + d]);
#pragma GCC unroll 2
                             for (int v = 0; v < kVectors; ++v) sum[r][v] += value * b[v];
                           }
                         }
                       };
  add(depth, a + row * lda, lda, panel);
  if (beside.depth > 0) {
    add(beside.depth, beside.a + row * beside.lda, beside.lda, panel + depth * kVectors * kLanes<T>);
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) done(row + r, column + v * kLanes<T>, sum[r][v]);
  }
}

// One panel of columns from `column` on of init + [a ; beside] b for all rows, a multiple of kRows; b is
// packed (see TileLayout::pack). `init(row, column)` gives the vector to start from, `done(row, column,
// vector)` takes it: best if they hold what they use by value, as stores might change what they refer to. Not
// inlined, as constants of the code around it would take the registers of the sums. With kFetch the next
// rows of a are fetched meanwhile.
template <int kRows = kRowBlock, bool kFetch = false, typename T, typename Init, typename Done>
__attribute__((noinline)) void product_columns(int64_t rows, int64_t depth, int64_t column, int64_t columns,
                                               const T* a, int64_t lda, const T* packed, Init init, Done done,
                                               Beside<T> beside = {}) {
  const T* panel = packed + (depth + beside.depth) * column;
  if (columns - column >= kPanelVectors * kLanes<T>) {
    for (int64_t row = 0; row < rows; row += kRows) {
      product_panel<kRows, kPanelVectors, kFetch>(row, column, depth, a, lda, panel, init, done, beside);
    }
  } else {
    for (int64_t row = 0; row < rows; row += kRows) {
      product_panel<kRows, 1, kFetch>(row, column, depth, a, lda, panel, init, done, beside);
    }
  }
}

// All columns, a multiple of the vector's lanes. kFetch is for rows of a that follow each other in memory and
// may not be in cache: fetched as they are first gone through, where that takes long enough.
template <int kRows = kRowBlock, bool kFetch = false, typename T, typename Init, typename Done>
inline void product(int64_t rows, int64_t depth, int64_t columns, const T* a, int64_t lda, const T* packed,
                    const Init& init, const Done& done, const Beside<T>& beside = {}) {
  int64_t column = 0;
  if (kFetch && depth >= 64) {
    product_columns<kRows, kFetch>(rows, depth, column, columns, a, lda, packed, init, done, beside);
    column += kPanelVectors * kLanes<T>;
  }
  for (; column < columns; column += kPanelVectors * kLanes<T>) {
    product_columns<kRows>(rows, depth, column, columns, a, lda, packed, init, done, beside);
  }
}

template <int kVectors, typename T>
inline void outer_block(int64_t rows, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc) {
  Vector<T> sum[kOuterBlock<T>][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kOuterBlock<T>; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[r][v] = load(c + r * ldc + v * kLanes<T>);
  }
  for (int64_t e = 0; e < rows; ++e) {
    Vector<T> value[kVectors];
    for (int v = 0; v < kVectors; ++v) value[v] = load(b + e * ldb + v * kLanes<T>);
#pragma GCC unroll 8
    for (int r = 0; r < kOuterBlock<T>; ++r) {
      const Vector<T> factor = splat(a[e * lda + r]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[r][v] += factor * value[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kOuterBlock<T>; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(c + r * ldc + v * kLanes<T>, sum[r][v]);
  }
}

// c += transpose(a) b over `rows` rows; both widths are multiples of the vector's lanes.
template <typename T>
inline void add_outer(int64_t rows, const T* a, int64_t a_columns, int64_t lda, const T* b, int64_t b_columns,
                      int64_t ldb, T* c, int64_t ldc) {
  for (int64_t j = 0; j < b_columns; j += kPanelVectors * kLanes<T>) {
    const bool whole = b_columns - j >= kPanelVectors * kLanes<T>;
    for (int64_t i = 0; i < a_columns; i += kOuterBlock<T>) {
      if (whole) {
        outer_block<kPanelVectors>(rows, a + i, lda, b + j, ldb, c + i * ldc + j, ldc);
      } else {
        outer_block<1>(rows, a + i, lda, b + j, ldb, c + i * ldc + j, ldc);
      }
    }
  }
}

// add_outer for many calls on one c, kept in the order in which they go through it: blocks of kOuterBlock
// rows and a panel of columns, one after the other.
template <typename T>
inline void add_outer_packed(int64_t rows, const T* a, int64_t a_columns, int64_t lda, const T* b,
                             int64_t b_columns, int64_t ldb, T* packed) {
  constexpr int64_t kPanel = kPanelVectors * kLanes<T>;
  for (int64_t i = 0; i < a_columns; i += kOuterBlock<T>) {
    int64_t j = 0;
    for (; j + kPanel <= b_columns; j += kPanel, packed += kOuterBlock<T> * kPanel) {
      outer_block<kPanelVectors>(rows, a + i, lda, b + j, ldb, packed, kPanel);
    }
    for (; j < b_columns; j += kLanes<T>, packed += kOuterBlock<T> * kLanes<T>) {
      outer_block<1>(rows, a + i, lda, b + j, ldb, packed, kLanes<T>);
    }
  }
}

// c (columns, rows) += the transpose of what add_outer_packed gathered.
template <typename T>
inline void add_packed_transposed(int64_t rows, int64_t columns, const T* packed, T* c, int64_t ldc) {
  constexpr int64_t kPanel = kPanelVectors * kLanes<T>;
  for (int64_t i = 0; i < rows; i += kOuterBlock<T>) {
    for (int64_t j = 0; j < columns;) {
      const int64_t width = columns - j >= kPanel ? kPanel : kLanes<T>;
      for (int64_t r = 0; r < kOuterBlock<T>; ++r) {
        for (int64_t x = 0; x < width; ++x) c[(j + x) * ldc + i + r] += *packed++;
      }
      j += width;
    }
  }
}

// sums += the sum of the rows.
template <typename T>
inline void add_rows(int64_t rows, const T* a, int64_t columns, int64_t lda, T* sums) {
  for (int64_t e = 0; e < rows; ++e) {
    for (int64_t c = 0; c < columns; c += kLanes<T>) store(sums + c, load(sums + c) + load(a + e * lda + c));
  }
}

template <typename T>
inline Vector<T> leaky_relu(Vector<T> x, T slope) {
  // By the sign, which selects without a comparison.
  return (typename Vectors<T>::Bits)x < 0 ? x * slope : x;
}

// Asks for `count` numbers that are needed soon.
template <typename T>
inline void fetch(const T* source, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(source + i, 0, 3);
  // Without this GCC takes a function that only fetches for one that does nothing, and drops its calls.
  asm volatile("");
}

// target (rows, columns) = a (rows, depth) times packed b, plus bias (columns) where given.
template <typename T>
void project(int64_t rows, int64_t depth, int64_t columns, const T* a, const T* packed, const T* bias,
             T* target) {
  const auto start = [=](int64_t, int64_t column) { return bias ? load(bias + column) : Vector<T>{}; };
  const int64_t whole = rows / kRowBlock * kRowBlock;
  product<kRowBlock, true>(
      whole, depth, columns, a, depth, packed, start,
      [=](int64_t row, int64_t column, Vector<T> sum) { store(target + row * columns + column, sum); });
  if (whole == rows) return;
  Scratch<T> last(kRowBlock * depth);
  for (int64_t row = 0; row < kRowBlock; ++row) {
    std::copy_n(a + std::min(whole + row, rows - 1) * depth, depth, last.row(row * depth));
  }
  product(static_cast<int64_t>(kRowBlock), depth, columns, last.get(), depth, packed, start,
          [=](int64_t row, int64_t column, Vector<T> sum) {
            if (whole + row < rows) store(target + (whole + row) * columns + column, sum);
          });
}

}  // namespace
}  // namespace AVATAR_ISA
}  // namespace avatar
