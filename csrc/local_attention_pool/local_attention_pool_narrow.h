// Pooling of at most 8 features and 8 position channels, whose scores are one vector of AVX-512. For
// *_simd.cpp only.
//
// A row's edges go from their points to the softmax on their own: what they weigh and their scores are all
// that is kept.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/tile_product.h"
#include "local_attention_pool/local_attention_pool_edges.h"
#include "local_attention_pool/local_attention_pool_simd.h"

namespace avatar {
namespace AVATAR_ISA {
namespace {

constexpr int kHalf = 8;

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
      int64_t count = args_.k;
      uint64_t outside = 0;
      for (int64_t slot = 0; slot < args_.k; ++slot) outside |= !is_inside(neighbors[slot]);
      if (!outside) {
        for (int64_t slot = 0; slot < args_.k; ++slot) points_.get()[slot] = base + neighbors[slot];
      } else {
        count = 0;
        for (int64_t slot = 0; slot < args_.k; ++slot) {
          if (neighbors[slot] != -1 && !is_inside(neighbors[slot])) return row * args_.k + slot;
          points_.get()[count] = base + neighbors[slot];
          count += neighbors[slot] >= 0;
        }
      }
      find_codes(row, count);
      pool(row, count);
    }
    return -1;
  }

 private:
  bool is_inside(int64_t neighbor) const {
    return static_cast<uint64_t>(neighbor) < static_cast<uint64_t>(args_.cloud);
  }

  void fetch_row(int64_t row) const {
    const int64_t base = row / args_.cloud * args_.cloud;
    for (int64_t slot = 0; slot < args_.k; ++slot) {
      const int64_t neighbor = args_.neighbors[row * args_.k + slot];
      if (!is_inside(neighbor)) continue;
      __builtin_prefetch(args_.position.points + 4 * (base + neighbor));
      __builtin_prefetch(args_.scores + kLanes<float> * (base + neighbor));
      __builtin_prefetch(args_.features + kHalf * (base + neighbor));
    }
  }

  // p_i - p_j and |p_i - p_j| of the row's edges, number by number.
  void find_codes(int64_t row, int64_t count) const {
    for (int64_t e = count; e < round_up(count, kLanes<float>); ++e) points_.get()[e] = row;
    edge_codes(args_.position.points, row, points_.get(), count, most_, codes_.get());
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
    Half own = half(mlp.layers[0].bias);
    for (int d = 0; d < 3; ++d) own += mlp.points[4 * row + d] * half(mlp.center_weight + d * kHalf);
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

  void find_scores(int64_t count) const {
    const int64_t* points = points_.get();
    const float *features = args_.scores, *values = values_.get();
    float* scores = scores_.get();
    by_blocks(count, [=, weight = args_.position_weight](auto rows, int64_t e) {
      const float* positions = values + kLanes<float> * e + kHalf;
      Vector<float> sums[rows];
      for (int r = 0; r < rows; ++r) sums[r] = load(features + kLanes<float> * points[e + r]);
#pragma GCC unroll 8
      for (int p = 0; p < kHalf; ++p) {
        const Vector<float> right = load(weight + p * kLanes<float>);
        for (int r = 0; r < rows; ++r) sums[r] += splat(positions[kLanes<float> * r + p]) * right;
      }
      for (int r = 0; r < rows; ++r) store(scores + kLanes<float> * (e + r), sums[r]);
    });
  }

  // The sums of weights, each weight_of(score), and of what they weigh.
  template <typename WeightOf>
  void weigh(int64_t count, const WeightOf& weight_of, Vector<float>& sum, Vector<float>& pooled) const {
    const float *scores = scores_.get(), *values = values_.get();
    const auto add = [&](int64_t e, Vector<float>& to_sum, Vector<float>& to_pooled) {
      const Vector<float> weight = weight_of(load(scores + kLanes<float> * e));
      to_sum += weight;
      to_pooled += weight * load(values + kLanes<float> * e);
    };
    Vector<float> other_sum{}, other_pooled{};
    sum = pooled = other_sum;
    int64_t e = 0;
    for (; e + 1 < count; e += 2) {
      add(e, sum, pooled);
      add(e + 1, other_sum, other_pooled);
    }
    if (e < count) add(e, sum, pooled);
    sum += other_sum;
    pooled += other_pooled;
  }

  void pool(int64_t row, int64_t count) const {
    find_values(row, count);
    find_scores(count);
    Vector<float> pooled{}, statistic{};
    if (count > 0) {
      Vector<float> sum, largest{};
      weigh(count, [](Vector<float> score) { return exp2_finite(score); }, sum, pooled);
      if (!is_moderate(sum, pooled)) {
        largest = load(scores_.get());
        for (int64_t e = 1; e < count; ++e)
          largest = larger<float>(load(scores_.row(kLanes<float> * e)), largest);
        weigh(
            count, [=](Vector<float> score) { return exp2_nonpositive<float>(score - largest); }, sum,
            pooled);
      }
      pooled /= sum;
      if (args_.statistics) statistic = natural_log<float>(largest, sum);
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
