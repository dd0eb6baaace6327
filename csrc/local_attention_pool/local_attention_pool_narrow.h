// Pooling of at most 8 features and 8 position channels, whose scores are one vector of AVX-512. For
// *_simd.cpp only.
//
// A row's edges go from their points to the softmax on their own: what they weigh and their scores are all
// that is kept.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "common/tile_product.h"
#include "local_attention_pool/local_attention_pool_simd.h"

namespace avatar {
namespace AVATAR_ISA {
namespace {

constexpr int kHalf = 8;
typedef float Half __attribute__((vector_size(kHalf * sizeof(float)), aligned(4), may_alias));
typedef float Quad __attribute__((vector_size(4 * sizeof(float)), aligned(4), may_alias));

inline Half half(const float* source) {
  return *reinterpret_cast<const Half*>(source);
}

class NarrowRows {
 public:
  // Rows whose neighbours are fetched ahead.
  static constexpr int64_t kAhead = 3;
  // Edges whose sums are in registers together.
  static constexpr int kBlock = 8;

  explicit NarrowRows(const PoolArgs<float>& args)
      : args_(args),
        most_(round_up(args.k, kLanes<float>)),
        points_(most_),
        codes_(5 * most_),
        values_(kLanes<float> * most_),
        scores_(kLanes<float> * most_) {}

  // Rows [begin, end); the flat position of the first neighbour out of range, or -1.
  int64_t run(int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t base = row / args_.cloud * args_.cloud;
      if (row + kAhead < end) fetch_row(row + kAhead);
      const int64_t* neighbors = args_.neighbors + row * args_.k;
      int64_t count = 0;
      for (int64_t slot = 0; slot < args_.k; ++slot) {
        if (neighbors[slot] < -1 || neighbors[slot] >= args_.cloud) return row * args_.k + slot;
        points_.get()[count] = base + neighbors[slot];
        count += neighbors[slot] >= 0;
      }
      find_codes(row, count);
      pool(row, count);
    }
    return -1;
  }

 private:
  void fetch_row(int64_t row) const {
    const int64_t base = row / args_.cloud * args_.cloud;
    for (int64_t slot = 0; slot < args_.k; ++slot) {
      const int64_t neighbor = args_.neighbors[row * args_.k + slot];
      if (neighbor < 0 || neighbor >= args_.cloud) continue;
      __builtin_prefetch(args_.position.points + 4 * (base + neighbor));
      __builtin_prefetch(args_.scores + kLanes<float> * (base + neighbor));
      __builtin_prefetch(args_.features + kHalf * (base + neighbor));
    }
  }

  // p_i - p_j and |p_i - p_j| of the row's edges.
  void find_codes(int64_t row, int64_t count) const {
    const float* points = args_.position.points;
    const Quad center = *reinterpret_cast<const Quad*>(points + 4 * row);
    float *codes = codes_.get(), *distances = codes + 4 * most_;
    for (int64_t e = 0; e < count; ++e) {
      const Quad difference = center - *reinterpret_cast<const Quad*>(points + 4 * points_.get()[e]);
      *reinterpret_cast<Quad*>(codes + 4 * e) = difference;
      const Quad squares = difference * difference;
      distances[e] = squares[0] + squares[1] + squares[2];
    }
    for (int64_t e = count; e < round_up(count, kLanes<float>); ++e) distances[e] = 0;
    for (int64_t e = 0; e < round_up(count, kLanes<float>); ++e) distances[e] = std::sqrt(distances[e]);
    for (int64_t e = 0; e < count; ++e) codes[4 * e + 3] = distances[e];
  }

  // body(constant number of edges, first edge) for all of them, several at a time, whose sums do not wait for
  // each other.
  template <typename Body>
  static void by_blocks(int64_t count, const Body& body) {
    int64_t e = 0;
    for (; e + kBlock <= count; e += kBlock) body(std::integral_constant<int, kBlock>(), e);
    for (; e < count; ++e) body(std::integral_constant<int, 1>(), e);
  }

  // What the edges' weights weigh: features and, after them, positions.
  void find_values(int64_t row, int64_t count) const {
    const PositionMlp<float>& mlp = args_.position;
    const float slope = mlp.slope;
    const Half own = half(mlp.center_part + row * kHalf);
    by_blocks(count, [&, weight = mlp.layers[0].weight](auto rows, int64_t e) {
      Half sums[rows];
      for (int r = 0; r < rows; ++r) sums[r] = own;
      for (int d = 0; d < 4; ++d) {
        const Half right = half(weight + d * kHalf);
        for (int r = 0; r < rows; ++r) sums[r] += codes_.get()[4 * (e + r) + d] * right;
      }
      for (int r = 0; r < rows; ++r) {
        float* values = values_.row(kLanes<float> * (e + r));
        *reinterpret_cast<Half*>(values) = half(args_.features + kHalf * points_.get()[e + r]);
        keep(values + kHalf, sums[r], slope);
      }
    });
    if (mlp.depth == 1) return;
    by_blocks(count,
              [&, weight = mlp.layers[1].weight, bias = half(mlp.layers[1].bias)](auto rows, int64_t e) {
                float* positions = values_.row(kLanes<float> * e + kHalf);
                Half sums[rows];
                for (int r = 0; r < rows; ++r) sums[r] = bias;
                for (int p = 0; p < kHalf; ++p) {
                  const Half right = half(weight + p * kHalf);
                  for (int r = 0; r < rows; ++r) sums[r] += positions[kLanes<float> * r + p] * right;
                }
                for (int r = 0; r < rows; ++r) keep(positions + kLanes<float> * r, sums[r], slope);
              });
  }

  // The edges' scores, and the largest.
  Vector<float> find_scores(int64_t count) const {
    Vector<float> largest = splat(-std::numeric_limits<float>::infinity());
    by_blocks(count, [&, weight = args_.position_weight](auto rows, int64_t e) {
      const float* positions = values_.row(kLanes<float> * e + kHalf);
      Vector<float> sums[rows];
      for (int r = 0; r < rows; ++r) sums[r] = load(args_.scores + kLanes<float> * points_.get()[e + r]);
      for (int p = 0; p < kHalf; ++p) {
        const Vector<float> right = load(weight + p * kLanes<float>);
        for (int r = 0; r < rows; ++r) sums[r] += splat(positions[kLanes<float> * r + p]) * right;
      }
      for (int r = 0; r < rows; ++r) {
        store(scores_.row(kLanes<float> * (e + r)), sums[r]);
        largest = larger<float>(sums[r], largest);
      }
    });
    return largest;
  }

  void pool(int64_t row, int64_t count) const {
    find_values(row, count);
    const Vector<float> largest = find_scores(count);
    Vector<float> pooled = {}, sum = {};
    for (int64_t e = 0; e < count; ++e) {
      const Vector<float> weight = exp_nonpositive<float>(load(scores_.row(kLanes<float> * e)) - largest);
      sum += weight;
      pooled += weight * load(values_.row(kLanes<float> * e));
    }
    Vector<float> statistic = {};
    if (count > 0) {
      pooled /= sum;
      if (args_.statistics) statistic = largest + log_from_one<float>(sum);
    }
    write(args_.pooled, row, pooled);
    if (args_.statistics) write(args_.statistics, row, statistic);
  }

  static void keep(float* target, Half value, float slope) {
    typedef int32_t Bits __attribute__((vector_size(kHalf * sizeof(float)), aligned(4), may_alias));
    *reinterpret_cast<Half*>(target) = (Bits)value < 0 ? value * slope : value;
  }

  void write(float* target, int64_t row, Vector<float> value) const {
    target += row * (args_.channels + args_.position_channels);
    if (args_.channels == kHalf && args_.position_channels == kHalf) return store(target, value);
    float lanes[kLanes<float>];
    store(lanes, value);
    target = std::copy_n(lanes, args_.channels, target);
    std::copy_n(lanes + kHalf, args_.position_channels, target);
  }

  const PoolArgs<float>& args_;
  const int64_t most_;
  Scratch<int64_t> points_;
  Scratch<float> codes_, values_, scores_;
};

}  // namespace
}  // namespace AVATAR_ISA
}  // namespace avatar
