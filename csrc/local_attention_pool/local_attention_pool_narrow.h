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
        codes_(4 * most_),
        hidden_(kHalf * most_),
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

  // Lane 4 i + r of number c is number c of the point of edge 4 i + r, for 16 edges.
  static void load_points(const float* points, const int64_t* edges, Vector<float> (&axes)[3]) {
    const auto quad = [=](int e) { return *reinterpret_cast<const Quad*>(points + 4 * edges[e]); };
    Vector<float> rows[4];
    for (int r = 0; r < 4; ++r) {
      const Half low = __builtin_shufflevector(quad(r), quad(4 + r), 0, 1, 2, 3, 4, 5, 6, 7);
      const Half high = __builtin_shufflevector(quad(8 + r), quad(12 + r), 0, 1, 2, 3, 4, 5, 6, 7);
      rows[r] = both(low, high);
    }
    const Vector<float> low0 = unpack<0>(rows[0], rows[1]), low1 = unpack<0>(rows[2], rows[3]);
    const Vector<float> high0 = unpack<2>(rows[0], rows[1]), high1 = unpack<2>(rows[2], rows[3]);
    axes[0] = pairs<0>(low0, low1);
    axes[1] = pairs<2>(low0, low1);
    axes[2] = pairs<0>(high0, high1);
  }
  static Vector<float> both(Half low, Half high) {
    return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  }
  // From each four lanes of a and b in turn: lanes k and k + 1 one after the other, and as they are.
  template <int k>
  static Vector<float> unpack(Vector<float> a, Vector<float> b) {
    return __builtin_shufflevector(a, b, k, k + 16, k + 1, k + 17, k + 4, k + 20, k + 5, k + 21, k + 8,
                                   k + 24, k + 9, k + 25, k + 12, k + 28, k + 13, k + 29);
  }
  template <int k>
  static Vector<float> pairs(Vector<float> a, Vector<float> b) {
    return __builtin_shufflevector(a, b, k, k + 1, k + 16, k + 17, k + 4, k + 5, k + 20, k + 21, k + 8, k + 9,
                                   k + 24, k + 25, k + 12, k + 13, k + 28, k + 29);
  }

  // p_i - p_j and |p_i - p_j| of the row's edges, number by number.
  void find_codes(int64_t row, int64_t count) const {
    const float* points = args_.position.points;
    const float* center = points + 4 * row;
    for (int64_t e = count; e < round_up(count, kLanes<float>); ++e) points_.get()[e] = row;
    for (int64_t e = 0; e < count; e += kLanes<float>) {
      Vector<float> axes[3];
      load_points(points, points_.row(e), axes);
      float distances[kLanes<float>];
      Vector<float> squared{};
      for (int d = 0; d < 3; ++d) {
        const Vector<float> difference = splat(center[d]) - axes[d];
        store(codes_.row(d * most_ + e), difference);
        squared = d == 0 ? difference * difference : squared + difference * difference;
      }
      store(distances, squared);
      for (float& distance : distances) distance = std::sqrt(distance);
      store(codes_.row(3 * most_ + e), load(distances));
    }
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
    const float *features = args_.features, *codes = codes_.get();
    float *hidden = hidden_.get(), *values = values_.get();
    const int64_t *points = points_.get(), most = most_;
    const auto finish = [=](int64_t e, Half positions) {
      store(values + kLanes<float> * e, both(half(features + kHalf * points[e]), positions));
    };
    const Half own = half(mlp.center_part + row * kHalf);
    by_blocks(count, [=, weight = mlp.layers[0].weight, slope = mlp.slope, last = mlp.depth == 1](auto rows,
                                                                                                  int64_t e) {
      Half sums[rows];
      for (int r = 0; r < rows; ++r) sums[r] = own;
      for (int d = 0; d < 4; ++d) {
        const Half right = half(weight + d * kHalf);
        for (int r = 0; r < rows; ++r) sums[r] += codes[d * most + e + r] * right;
      }
      for (int r = 0; r < rows; ++r) {
        if (last) {
          finish(e + r, activate(sums[r], slope));
        } else {
          *reinterpret_cast<Half*>(hidden + kHalf * (e + r)) = activate(sums[r], slope);
        }
      }
    });
    if (mlp.depth == 1) return;
    by_blocks(count, [=, weight = mlp.layers[1].weight, slope = mlp.slope, bias = half(mlp.layers[1].bias)](
                         auto rows, int64_t e) {
      Half sums[rows];
      for (int r = 0; r < rows; ++r) sums[r] = bias;
      for (int p = 0; p < kHalf; ++p) {
        const Half right = half(weight + p * kHalf);
        for (int r = 0; r < rows; ++r) sums[r] += hidden[kHalf * (e + r) + p] * right;
      }
      for (int r = 0; r < rows; ++r) finish(e + r, activate(sums[r], slope));
    });
  }

  // The edges' scores, and the largest.
  Vector<float> find_scores(int64_t count) const {
    Vector<float> largest = splat(-std::numeric_limits<float>::infinity());
    const int64_t* points = points_.get();
    const float *features = args_.scores, *values = values_.get();
    float* scores = scores_.get();
    by_blocks(count, [=, &largest, weight = args_.position_weight](auto rows, int64_t e) {
      const float* positions = values + kLanes<float> * e + kHalf;
      Vector<float> sums[rows];
      for (int r = 0; r < rows; ++r) sums[r] = load(features + kLanes<float> * points[e + r]);
#pragma GCC unroll 8
      for (int p = 0; p < kHalf; ++p) {
        const Vector<float> right = load(weight + p * kLanes<float>);
        for (int r = 0; r < rows; ++r) sums[r] += splat(positions[kLanes<float> * r + p]) * right;
      }
      for (int r = 0; r < rows; ++r) {
        store(scores + kLanes<float> * (e + r), sums[r]);
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

  static Half activate(Half value, float slope) {
    typedef int32_t Bits __attribute__((vector_size(kHalf * sizeof(float)), aligned(4), may_alias));
    return (Bits)value < 0 ? value * slope : value;
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
  Scratch<float> codes_, hidden_, values_, scores_;
};

}  // namespace
}  // namespace AVATAR_ISA
}  // namespace avatar
