// Which factor LeakyReLU's channels have on a tile of edges, from their signs in blocks of edges, and which
// channels of a block have an excess above it. For *_simd.cpp with AVX-512 only.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/tile_product.h"

namespace avatar {
namespace AVATAR_ISA {
namespace {

// Bit l: whether lane l has its sign bit set.
template <typename T>
inline uint32_t sign_bits(typename Vectors<T>::Bits value) {
  if constexpr (sizeof(T) == 4) {
    return _mm512_mask_cmpgt_epi32_mask(0xffff, (__m512i)(value ^ value), (__m512i)value);
  }
  uint32_t bits = 0;
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) bits |= uint32_t{value[lane] < 0} << lane;
  return bits;
}

// The numbers of the mask, moved together. Reads and writes 16.
inline void compress(uint32_t mask, const int32_t* source, int32_t* target) {
  _mm512_storeu_si512(target, _mm512_maskz_compress_epi32(mask, _mm512_loadu_si512(source)));
}

// Of one layer.
template <typename T>
class TileFactors {
 public:
  TileFactors(T slope, int64_t widest, int64_t blocks)
      : slope_(slope),
        has_majority_(slope >= T(1e-3)),
        vectors_(widest / kLanes<T>),
        signs_(2 * (blocks + 1) * vectors_),
        excess_(2 * widest) {
    for (int64_t lane = 0; lane < kLanes<T>; ++lane) lane_bits_[lane] = 1 << lane;
  }

  // Notes the signs of a block's first `count` rows of kVectors vectors, from vector `first` on.
  template <int kRows, int kVectors>
  __attribute__((always_inline)) inline void find_signs(int64_t block, int64_t first,
                                                        const Vector<T> (&rows)[kRows][kVectors],
                                                        int64_t count) {
    using Bits = typename Vectors<T>::Bits;
    uint32_t *any_sign = any(block) + first, *all_signs = all(block) + first;
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      Bits somewhere{}, everywhere = ~Bits{};
      if (count == kRows) {
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          somewhere |= (Bits)rows[r][v];
          everywhere &= (Bits)rows[r][v];
        }
      } else {
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const Bits counts = Bits{} - (r < count);
          somewhere |= (Bits)rows[r][v] & counts;
          everywhere &= (Bits)rows[r][v] | ~counts;
        }
      }
      any_sign[v] = slope_ == T(1) ? 0 : sign_bits<T>(somewhere);
      all_signs[v] = slope_ == T(1) ? 0 : sign_bits<T>(everywhere);
    }
  }

  // Chooses the factors of `vectors` vectors of channels that leave the fewest with an excess; how many edges
  // and channels they leave. edges_of(block). Does not look closely where that is almost everywhere.
  template <typename EdgesOf>
  int64_t choose(int64_t vectors, int64_t blocks, int64_t edges, const EdgesOf& edges_of) {
    int64_t all_mixed = 0, excess = 0;
    for (int64_t v = 0; v < vectors; ++v) {
      uint32_t any_sign = 0, all_signs = ~uint32_t{0};
      for (int64_t b = 0; b < blocks; ++b) {
        any_sign |= any(b)[v];
        all_signs &= all(b)[v];
      }
      negative()[v] = any_sign & all_signs;
      none()[v] = any_sign & ~all_signs;
      all_mixed += __builtin_popcount(none()[v]);
    }
    const int64_t width = vectors * kLanes<T>;
    if (4 * all_mixed > 3 * width) return edges * width;
    for (int64_t v = 0; v < vectors; ++v) {
      const uint32_t mixed = none()[v];
      if (!mixed) continue;
      if (has_majority_) {
        negative()[v] |= mixed & mostly_negative(v, blocks);
        none()[v] = 0;
      }
      for (int64_t b = 0; b < blocks; ++b) excess += edges_of(b) * __builtin_popcount(listed(b, v));
    }
    return excess;
  }

  // Channels of a vector with an excess in a block.
  uint32_t listed(int64_t block, int64_t v) const {
    const uint32_t other = negative()[v];
    return (any(block)[v] & ~other) | (~all(block)[v] & other) | none()[v];
  }

  // The factors of a vector of channels; sets what excess() goes by.
  Vector<T> factor(int64_t v) {
    const Vector<T> zero{}, one = splat(T(1)), slope = splat(slope_);
    const Bits is_none = has(none()[v]), is_negative = has(negative()[v]);
    // What an edge of the other sign has above the factor times its number.
    store(excess_.row(2 * v * kLanes<T>), is_none ? one : is_negative ? one - slope : zero);
    store(excess_.row((2 * v + 1) * kLanes<T>), is_none ? one : is_negative ? zero : one - one / slope);
    return is_none ? zero : is_negative ? slope : one;
  }

  // What numbers above and below zero that LeakyReLU gave are to be multiplied by for their excess.
  Vector<T> above(int64_t v) const { return load(excess_.row(2 * v * kLanes<T>)); }
  Vector<T> below(int64_t v) const { return load(excess_.row((2 * v + 1) * kLanes<T>)); }

 private:
  using Bits = typename Vectors<T>::Bits;

  // By vectors of channels: whether any and whether all edges of a block have a negative sign.
  uint32_t* any(int64_t block) const { return signs_.row(2 * (block + 1) * vectors_); }
  uint32_t* all(int64_t block) const { return any(block) + vectors_; }
  // Whether the tile's factor is that of negative numbers, and whether it is zero.
  uint32_t* negative() const { return signs_.get(); }
  uint32_t* none() const { return signs_.row(vectors_); }

  Bits has(uint32_t bits) const {
    const Bits lanes = (Bits)load(reinterpret_cast<const T*>(lane_bits_));
    return (lanes & (Bits{} + static_cast<decltype(lanes[0] + 0)>(bits))) != 0;
  }

  // The channels of a vector that have a negative sign in more than half of the blocks, where blocks with
  // both signs count half.
  uint32_t mostly_negative(int64_t v, int64_t blocks) const {
    Bits balance{};
    // Each sign counts -1.
    for (int64_t b = 0; b < blocks; ++b) balance += has(any(b)[v]) + has(all(b)[v]);
    return sign_bits<T>(balance + static_cast<decltype(balance[0] + 0)>(blocks));
  }

  const T slope_;
  // Whether an excess can be told from what LeakyReLU gave: a slope of next to 0 hides it.
  const bool has_majority_;
  const int64_t vectors_;
  Scratch<uint32_t> signs_;
  Scratch<T> excess_;
  std::conditional_t<sizeof(T) == 4, int32_t, int64_t> lane_bits_[kLanes<T>];
};

}  // namespace
}  // namespace AVATAR_ISA
}  // namespace avatar
