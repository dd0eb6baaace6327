// Softmax over a point's edges and what its weights weigh, block of edges by block, as their scores come. For
// *_simd.cpp with AVX-512 only.
#pragma once

#include <cstdint>

#include "local_attention_pool/local_attention_pool_tiles.h"

namespace avatar {
namespace AVATAR_ISA {
namespace {

// One panel of columns, all of features or (kFeature false) of positions. Segments without edges and those
// whose weights are not moderate are left out, and noted.
template <bool kFeature>
class BlockAttention {
 public:
  using Block = TileScores<float>::Block;
  static constexpr int kRows = TileScores<float>::kEdgeRows;
  static constexpr int64_t kPanel = kPanelVectors * kLanes<float>;

  // `totals` has room for two panels, `left_out` for all segments after their number.
  BlockAttention(const PoolArgs<float>& args, const PositionTile<float>& tile, int64_t column, float* totals,
                 int64_t* left_out)
      : args_(args),
        tile_(tile),
        place_(kFeature ? column : column - args.channels_padded),
        stride_(kFeature ? args.channels_padded : args.position.out_padded),
        values_((kFeature ? args.features : tile.output()) + place_),
        neighbors_(tile.neighbors()),
        totals_(totals),
        left_out_(left_out) {
    *left_out = 0;
    for (int64_t s = 0; s < tile.segments(); ++s) {
      if (tile.segment_begin(s) == tile.segment_end(s)) leave_out(s);
    }
  }

  __attribute__((always_inline)) void operator()(
      const Block& block, int64_t, const Vector<float> (&scores)[kRows][kPanelVectors]) const {
    Vector<float> sum[kPanelVectors], pooled[kPanelVectors];
    if (block.begin == tile_.segment_begin(block.segment)) {
#pragma GCC unroll 2
      for (int v = 0; v < kPanelVectors; ++v) sum[v] = pooled[v] = Vector<float>{};
    } else {
#pragma GCC unroll 2
      for (int v = 0; v < kPanelVectors; ++v) {
        sum[v] = load(totals_ + v * kLanes<float>);
        pooled[v] = load(totals_ + kPanel + v * kLanes<float>);
      }
    }
    const auto add = [&](int r) __attribute__((always_inline)) {
      const int64_t row = block.begin + r;
      const float* value = values_ + (kFeature ? neighbors_[row] : row) * stride_;
#pragma GCC unroll 2
      for (int v = 0; v < kPanelVectors; ++v) {
        const Vector<float> weight = exp2_finite(scores[r][v]);
        sum[v] += weight;
        pooled[v] += weight * load(value + v * kLanes<float>);
      }
    };
    if (block.end - block.begin == kRows) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) add(r);
    } else {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        if (r < block.end - block.begin) add(r);
      }
    }
    if (block.end == tile_.segment_end(block.segment)) return finish(block.segment, sum, pooled);
#pragma GCC unroll 2
    for (int v = 0; v < kPanelVectors; ++v) {
      store(totals_ + v * kLanes<float>, sum[v]);
      store(totals_ + kPanel + v * kLanes<float>, pooled[v]);
    }
  }

 private:
  void finish(int64_t segment, const Vector<float> (&sum)[kPanelVectors],
              const Vector<float> (&pooled)[kPanelVectors]) const {
    for (int v = 0; v < kPanelVectors; ++v) {
      if (!is_moderate(sum[v], pooled[v])) return leave_out(segment);
    }
    const int64_t valid = (kFeature ? args_.channels : args_.position_channels) - place_;
    const int64_t first = tile_.segment_point(segment) * (args_.channels + args_.position_channels) +
                          (kFeature ? place_ : args_.channels + place_);
    for (int v = 0; v < kPanelVectors; ++v) {
      const int64_t offset = v * kLanes<float>;
      store_some(args_.pooled + first + offset, pooled[v] / sum[v], valid - offset);
      if (!args_.statistics) continue;
      store_some(args_.statistics + first + offset, natural_log<float>(Vector<float>{}, sum[v]),
                 valid - offset);
    }
  }

  void leave_out(int64_t segment) const { left_out_[++*left_out_] = segment; }

  const PoolArgs<float>& args_;
  const PositionTile<float>& tile_;
  const int64_t place_, stride_;
  const float* const values_;
  const int64_t* const neighbors_;
  float* const totals_;
  int64_t* const left_out_;
};

}  // namespace
}  // namespace AVATAR_ISA
}  // namespace avatar
