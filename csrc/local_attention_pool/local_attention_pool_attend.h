// Softmax over a point's edges and what its weights weigh, block of edges by block, as their scores come. For
// *_simd.cpp with AVX-512 only.
#pragma once

#include <cstdint>
#include <numeric>

#include "local_attention_pool/local_attention_pool_tiles.h"

namespace avatar {
namespace AVATAR_ISA {
namespace {

// Takes the scores of a tile's blocks in panels, each all of features or all of positions; of float only.
template <typename T>
class BlockAttention {
 public:
  using Block = typename TileScores<T>::Block;
  static constexpr int kRows = TileScores<T>::kEdgeRows;
  static constexpr int64_t kPanel = kPanelVectors * kLanes<T>;

  // A segment and a panel whose weights are not moderate.
  struct Rest {
    int64_t segment, column;
  };

  BlockAttention(const PoolArgs<T>& args, const PositionTile<T>& tile)
      : args_(args),
        tile_(tile),
        totals_(2 * args.hidden),
        own_rows_(tile.capacity()),
        rest_((tile.capacity() + 1) * (args.hidden / kPanel + 1)) {
    std::iota(own_rows_.get(), own_rows_.row(tile.capacity()), 0);
  }

  // Whether a panel is whole and of one kind.
  bool takes(int64_t column) const {
    return sizeof(T) == sizeof(float) &&
           column + kPanel <= (column < args_.channels_padded ? args_.channels_padded : args_.hidden);
  }

  // What the blocks since the last call have left out.
  void clear() { rest_count_ = 0; }
  int64_t rest_count() const { return rest_count_; }
  const Rest& rest(int64_t n) const { return rest_.get()[n]; }

  __attribute__((always_inline)) void add(const Block& block, int64_t column,
                                          const Vector<T> (&scores)[kRows][kPanelVectors]) {
    const bool is_feature = column < args_.channels_padded;
    const T* values = is_feature ? args_.features + column : tile_.output() + column - args_.channels_padded;
    const int64_t stride = is_feature ? args_.channels_padded : args_.position.out_padded;
    const int64_t* rows = (is_feature ? tile_.neighbors() : own_rows_.get()) + block.begin;
    T *sums = totals_.row(column), *pools = totals_.row(args_.hidden + column);
    Vector<T> sum[kPanelVectors], pooled[kPanelVectors];
    const bool begins = block.begin == tile_.segment_begin(block.segment);
#pragma GCC unroll 2
    for (int v = 0; v < kPanelVectors; ++v) {
      sum[v] = begins ? Vector<T>{} : load(sums + v * kLanes<T>);
      pooled[v] = begins ? Vector<T>{} : load(pools + v * kLanes<T>);
    }
    const auto add_row = [&](int r) __attribute__((always_inline)) {
      const T* value = values + rows[r] * stride;
#pragma GCC unroll 2
      for (int v = 0; v < kPanelVectors; ++v) {
        const Vector<T> weight = exp2_finite(scores[r][v]);
        sum[v] += weight;
        pooled[v] += weight * load(value + v * kLanes<T>);
      }
    };
    const int64_t count = block.end - block.begin;
    if (count == kRows) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) add_row(r);
    } else {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        if (r < count) add_row(r);
      }
    }
    if (block.end == tile_.segment_end(block.segment)) return finish(block.segment, column, sum, pooled);
#pragma GCC unroll 2
    for (int v = 0; v < kPanelVectors; ++v) {
      store(sums + v * kLanes<T>, sum[v]);
      store(pools + v * kLanes<T>, pooled[v]);
    }
  }

 private:
  void finish(int64_t segment, int64_t column, const Vector<T> (&sum)[kPanelVectors],
              const Vector<T> (&pooled)[kPanelVectors]) {
    for (int v = 0; v < kPanelVectors; ++v) {
      if (is_moderate(sum[v], pooled[v])) continue;
      rest_.get()[rest_count_++] = {segment, column};
      return;
    }
    const bool is_feature = column < args_.channels_padded;
    const int64_t place = is_feature ? column : column - args_.channels_padded;
    const int64_t valid = (is_feature ? args_.channels : args_.position_channels) - place;
    const int64_t first = tile_.segment_point(segment) * (args_.channels + args_.position_channels) +
                          (is_feature ? place : args_.channels + place);
    for (int v = 0; v < kPanelVectors; ++v) {
      const int64_t offset = v * kLanes<T>;
      store_some(args_.pooled + first + offset, pooled[v] / sum[v], valid - offset);
      if (!args_.statistics) continue;
      store_some(args_.statistics + first + offset, natural_log<T>(Vector<T>{}, sum[v]), valid - offset);
    }
  }

  const PoolArgs<T>& args_;
  const PositionTile<T>& tile_;
  Scratch<T> totals_;
  Scratch<int64_t> own_rows_;
  int64_t rest_count_ = 0;
  Scratch<Rest> rest_;
};

}  // namespace
}  // namespace AVATAR_ISA
}  // namespace avatar
