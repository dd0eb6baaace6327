#include "local_attention_pool/local_attention_pool_simd.h"

#include <algorithm>

#include "common/position_tile.h"

namespace avatar {
namespace AVATAR_ISA {
namespace {

// What one edge's hidden vector holds at `column`: the neighbour's feature, then the position network's
// output.
template <typename T>
struct HiddenRows {
  const PoolArgs<T>& args;
  const PositionTile<T>& tile;
  const T* position;

  explicit HiddenRows(const PoolArgs<T>& args, const PositionTile<T>& tile)
      : args(args), tile(tile), position(tile.output()) {}
  Vector<T> operator()(int64_t row, int64_t column) const {
    return column < args.channels_padded
               ? load(args.features + tile.neighbor(row) * args.channels_padded + column)
               : load(position + row * args.position.out_padded + column - args.channels_padded);
  }
};

// Softmax over each segment's scores of kVectors vectors of channels: scores turn into weights that are not
// yet divided by their sum. `most` (segments, kVectors) takes the largest scores.
template <int kVectors, typename T>
void soften(const PositionTile<T>& tile, T* scores, int64_t stride, T* most) {
  for (int64_t s = 0; s < tile.segments(); ++s, most += kVectors * kLanes<T>) {
    const int64_t begin = tile.segment_begin(s), end = tile.segment_end(s);
    if (begin == end) continue;
    Vector<T> largest[kVectors];
    for (int v = 0; v < kVectors; ++v) largest[v] = load(scores + begin * stride + v * kLanes<T>);
    for (int64_t row = begin + 1; row < end; ++row) {
      for (int v = 0; v < kVectors; ++v) {
        const Vector<T> score = load(scores + row * stride + v * kLanes<T>);
        largest[v] = score > largest[v] ? score : largest[v];
      }
    }
    for (int v = 0; v < kVectors; ++v) store(most + v * kLanes<T>, largest[v]);
    for (int64_t row = begin; row < end; ++row) {
      for (int v = 0; v < kVectors; ++v) {
        T* score = scores + row * stride + v * kLanes<T>;
        store(score, exp_nonpositive<T>(load(score) - largest[v]));
      }
    }
  }
}

// The weighted mean of what the weights of one vector of channels weigh, in each segment.
template <bool kFeature, typename T>
void pool_column(const PoolArgs<T>& args, const PositionTile<T>& tile, const T* weights, int64_t stride,
                 const T* most, int64_t most_stride, int64_t column) {
  const int64_t place = kFeature ? column : column - args.channels_padded;
  const int64_t row_stride = kFeature ? args.channels_padded : args.position.out_padded;
  const T* values = (kFeature ? args.features : tile.output()) + place;
  const int64_t width = args.channels + args.position_channels;
  const int64_t target = kFeature ? place : args.channels + place;
  const int64_t valid = (kFeature ? args.channels : args.position_channels) - place;
  for (int64_t s = 0; s < tile.segments(); ++s) {
    const int64_t begin = tile.segment_begin(s), end = tile.segment_end(s);
    Vector<T> pooled{}, sum{}, statistic{};
    // Two sums of each, as one would wait for itself.
    Vector<T> other_pooled{}, other_sum{};
    const auto add = [&](int64_t row, Vector<T>& to_sum, Vector<T>& to_pooled) {
      const Vector<T> weight = load(weights + row * stride);
      to_sum += weight;
      to_pooled += weight * load(values + (kFeature ? tile.neighbor(row) : row) * row_stride);
    };
    int64_t row = begin;
    for (; row + 1 < end; row += 2) {
      add(row, sum, pooled);
      add(row + 1, other_sum, other_pooled);
    }
    if (row < end) add(row, sum, pooled);
    sum += other_sum;
    pooled += other_pooled;
    if (begin < end) pooled /= sum;
    const int64_t position = tile.segment_point(s) * width + target;
    store_some(args.pooled + position, pooled, valid);
    if (!args.statistics) continue;
    if (begin < end) statistic = load(most + s * most_stride) + log_from_one<T>(sum);
    store_some(args.statistics + position, statistic, valid);
  }
}

template <typename T>
int64_t pool_rows(const PoolArgs<T>& args, int64_t begin, int64_t end) {
  constexpr int64_t kPanel = kPanelVectors * kLanes<T>;
  PositionTile<T> tile(args.position, args.k);
  Scratch<T> panel(tile.capacity() * kPanel), largest(tile.capacity() * kPanel);
  T *scores = panel.get(), *most = largest.get();
  const auto ahead = [&](int64_t point) {
    fetch(args.position.points + point * args.position.point_stride, args.position.point_stride);
    fetch(args.scores + point * args.hidden, args.hidden);
    fetch(args.features + point * args.channels_padded, args.channels_padded);
  };
  return walk_rows(tile, args.neighbors, args.k, args.cloud, begin, end, ahead, [&](int64_t, int64_t) {
    if (tile.count() > 0) tile.forward();
    for (int64_t column = 0; column < args.hidden; column += kPanel) {
      product_columns(
          tile.rows(), args.position.out_padded, column, args.hidden, tile.output(), args.position.out_padded,
          args.position_weight,
          [&](int64_t row, int64_t c) { return load(args.scores + tile.neighbor(row) * args.hidden + c); },
          [=](int64_t row, int64_t c, Vector<T> sum) { store(scores + row * kPanel + c - column, sum); });
      const int64_t width = std::min(kPanel, args.hidden - column);
      if (width == kPanel) {
        soften<kPanelVectors>(tile, scores, kPanel, most);
      } else {
        soften<1>(tile, scores, kPanel, most);
      }
      for (int64_t c = 0; c < width; c += kLanes<T>) {
        if (column + c < args.channels_padded) {
          pool_column<true>(args, tile, scores + c, kPanel, most + c, width, column + c);
        } else {
          pool_column<false>(args, tile, scores + c, kPanel, most + c, width, column + c);
        }
      }
    }
  });
}

// Gradients of the scores and of what they weigh, for one vector of channels.
template <typename T>
void unpool_column(const PoolBackwardArgs<T>& args, const PositionTile<T>& tile, const T* scores,
                   int64_t stride, int64_t column, T* score_gradients, T* position_gradients, T* score_sums,
                   T* feature_sums) {
  const PoolArgs<T>& pool = args.pool;
  const HiddenRows<T> hidden(pool, tile);
  const bool feature = column < pool.channels_padded;
  for (int64_t s = 0; s < tile.segments(); ++s) {
    const int64_t point = tile.segment_point(s);
    Vector<T> score_sum{}, feature_sum{};
    for (int64_t row = tile.segment_begin(s); row < tile.segment_end(s); ++row) {
      const int64_t center = tile.center(row) * pool.hidden + column;
      const Vector<T> attention =
          exp_nonpositive<T>(load(scores + row * stride) - load(args.statistics + center));
      const Vector<T> weighted = attention * load(args.grad + center);
      const Vector<T> gradient = weighted * (hidden(row, column) - load(args.pooled + center));
      store(score_gradients + row * pool.hidden + column, gradient);
      score_sum += gradient;
      if (feature) {
        feature_sum += weighted;
      } else {
        store(position_gradients + row * pool.position.out_padded + column - pool.channels_padded, weighted);
      }
    }
    T* total = score_sums + point * pool.hidden + column;
    store(total, load(total) + score_sum);
    if (!feature) continue;
    total = feature_sums + point * pool.channels_padded + column;
    store(total, load(total) + feature_sum);
  }
}

template <typename T>
void backward_points(const PoolBackwardArgs<T>& args, int64_t begin, int64_t end, T* weights) {
  constexpr int64_t kPanel = kPanelVectors * kLanes<T>;
  const PoolArgs<T>& pool = args.pool;
  const PositionMlp<T>& mlp = pool.position;
  const int64_t hidden = pool.hidden, channels = pool.channels_padded, position = mlp.out_padded;
  PositionTile<T> tile(mlp, 0);
  PointBlock<T> block(mlp);
  const int64_t capacity = tile.capacity();
  Scratch<T> panel(capacity * kPanel), score_gradients(capacity * hidden);
  Scratch<T> gradient(capacity * mlp.widest), other(capacity * mlp.widest);
  Scratch<T> features(kPointBlock * channels), scores(kPointBlock * hidden);
  Scratch<T> score_sums(kPointBlock * hidden), feature_sums(kPointBlock * channels);
  T* dU = weights + args.score_gradient;

  const auto tile_backward = [&](int64_t first) {
    tile.forward();
    for (int64_t column = 0; column < hidden; column += kPanel) {
      product_columns(
          tile.rows(), position, column, hidden, tile.output(), position, pool.position_weight,
          [&](int64_t row, int64_t c) {
            return load(scores.get() + (tile.neighbor(row) - first) * hidden + c);
          },
          [&](int64_t row, int64_t c, Vector<T> sum) {
            store(panel.get() + row * kPanel + c - column, sum);
          });
      for (int64_t c = column; c < std::min(column + kPanel, hidden); c += kLanes<T>) {
        unpool_column(args, tile, panel.get() + c - column, kPanel, c, score_gradients.get(), gradient.get(),
                      score_sums.get(), feature_sums.get());
      }
    }
    product(
        tile.rows(), hidden, position, score_gradients.get(), hidden, args.position_score,
        [&](int64_t row, int64_t c) { return load(gradient.get() + row * position + c); },
        [&](int64_t row, int64_t c, Vector<T> sum) { store(gradient.get() + row * position + c, sum); });
    add_outer(tile.count(), score_gradients.get(), hidden, hidden, tile.output(), position, position,
              dU + channels, hidden);
    tile.backward(gradient.get(), other.get(), weights, block.sums(), block.gradients(),
                  args.incoming.edge_gradient);
  };

  for (int64_t first = begin; first < end; first += kPointBlock) {
    const int64_t count = std::min(kPointBlock, end - first);
    const int64_t* offsets = args.incoming.offsets + first - args.incoming.first_point;
    if (offsets[0] == offsets[count]) continue;
    // Points that no edge leads to stay out, whatever they hold.
    for (int64_t p = 0; p < count; ++p) {
      T* row = features.row(p * channels);
      if (offsets[p] == offsets[p + 1]) {
        std::fill_n(row, channels, T(0));
      } else {
        std::copy_n(pool.features + (first + p) * channels, channels, row);
      }
    }
    project(count, channels, hidden, features.get(), pool.feature_weight, static_cast<const T*>(nullptr),
            scores.get());
    std::fill_n(score_sums.get(), kPointBlock * hidden, T(0));
    std::fill_n(feature_sums.get(), kPointBlock * channels, T(0));
    block.begin();
    walk_incoming(tile, args.incoming, first, count, [&] { tile_backward(first); });
    block.finish(args.incoming, first, count, weights);
    add_outer(count, score_sums.get(), hidden, hidden, features.get(), channels, channels, dU, hidden);
    T* grad_features = args.grad_features + first * channels;
    product(
        round_up(count, kRowBlock), hidden, channels, score_sums.get(), hidden, args.feature_score,
        [&](int64_t row, int64_t c) { return load(feature_sums.get() + row * channels + c); },
        [=](int64_t row, int64_t c, Vector<T> sum) {
          T* target = grad_features + row * channels + c;
          if (row < count) store(target, load(target) + sum);
        });
  }
}

}  // namespace

#define AVATAR_DEFINE(T)                                                                                 \
  int64_t local_attention_pool_rows(const PoolArgs<T>& args, int64_t begin, int64_t end) {               \
    return pool_rows(args, begin, end);                                                                  \
  }                                                                                                      \
  void local_attention_pool_backward_points(const PoolBackwardArgs<T>& args, int64_t begin, int64_t end, \
                                            T* weights) {                                                \
    backward_points(args, begin, end, weights);                                                          \
  }
AVATAR_DEFINE(float)
AVATAR_DEFINE(double)
#undef AVATAR_DEFINE

}  // namespace AVATAR_ISA
}  // namespace avatar
