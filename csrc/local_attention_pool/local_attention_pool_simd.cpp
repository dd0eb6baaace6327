#include "local_attention_pool/local_attention_pool_simd.h"

#include <algorithm>
#include <type_traits>

#include "common/position_tile.h"
#include "local_attention_pool/local_attention_pool_linear.h"
#if defined(__AVX512F__)
#include "local_attention_pool/local_attention_pool_attend.h"
#include "local_attention_pool/local_attention_pool_narrow.h"
#endif

namespace avatar {
namespace AVATAR_ISA {
namespace {

// Softmax of one vector of channels' scores over each of some segments, and the mean of what its weights
// weigh. The scores' rows start with the first segment's.
template <bool kFeature, typename T>
void attend_column(const PoolArgs<T>& args, const PositionTile<T>& tile, int64_t first, int64_t last,
                   const T* scores, int64_t stride, int64_t column) {
  const int64_t place = kFeature ? column : column - args.channels_padded;
  const int64_t row_stride = kFeature ? args.channels_padded : args.position.out_padded;
  const T* values = (kFeature ? args.features : tile.output()) + place;
  const int64_t* neighbors = tile.neighbors();
  const int64_t width = args.channels + args.position_channels;
  const int64_t target = kFeature ? place : args.channels + place;
  const int64_t valid = (kFeature ? args.channels : args.position_channels) - place;
  scores -= tile.segment_begin(first) * stride;
  for (int64_t s = first; s < last; ++s) {
    const int64_t begin = tile.segment_begin(s), end = tile.segment_end(s);
    Vector<T> sum{}, pooled{}, largest{};
    // Sums of weights, each weight_of(score), and of what they weigh: two of each, as one would wait for
    // itself.
    const auto weigh = [&](const auto& weight_of) {
      Vector<T> other_sum{}, other_pooled{};
      sum = pooled = Vector<T>{};
      const auto add = [&](int64_t row, Vector<T>& to_sum, Vector<T>& to_pooled) {
        const Vector<T> weight = weight_of(load(scores + row * stride));
        to_sum += weight;
        to_pooled += weight * load(values + (kFeature ? neighbors[row] : row) * row_stride);
      };
      int64_t row = begin;
      for (; row + 1 < end; row += 2) {
        add(row, sum, pooled);
        add(row + 1, other_sum, other_pooled);
      }
      if (row < end) add(row, sum, pooled);
      sum += other_sum;
      pooled += other_pooled;
    };
    const auto weigh_below_largest = [&] {
      largest = load(scores + begin * stride);
      Vector<T> other_largest = largest;
      int64_t row = begin + 1;
      for (; row + 1 < end; row += 2) {
        largest = larger<T>(load(scores + row * stride), largest);
        other_largest = larger<T>(load(scores + (row + 1) * stride), other_largest);
      }
      if (row < end) largest = larger<T>(load(scores + row * stride), largest);
      largest = larger<T>(other_largest, largest);
      weigh([&](Vector<T> score) { return exp2_nonpositive<T>(score - largest); });
    };
    if (begin < end) {
#if defined(__AVX512F__)
      if constexpr (std::is_same_v<T, float>) {
        weigh([](Vector<T> score) { return exp2_finite(score); });
        if (!is_moderate(sum, pooled)) weigh_below_largest();
      } else {
        weigh_below_largest();
      }
#else
      weigh_below_largest();
#endif
      pooled /= sum;
    }
    const int64_t position = tile.segment_point(s) * width + target;
    store_some(args.pooled + position, pooled, valid);
    if (args.statistics) {
      const Vector<T> statistic = begin < end ? natural_log<T>(largest, sum) : Vector<T>{};
      store_some(args.statistics + position, statistic, valid);
    }
  }
}

template <typename T>
int64_t pool_rows(const PoolArgs<T>& args, int64_t begin, int64_t end) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    if (is_narrow(args)) return NarrowRows(args).run(begin, end);
  }
#endif
  constexpr int64_t kPanel = kPanelVectors * kLanes<T>;
  const int64_t most_rows = rows_of_tile(args);
  PositionTile<T> tile(args.position, most_rows * args.k);
  Scratch<T> panel((tile.capacity() + kRowBlock) * kPanel);
  T* scores = panel.get();
  const int64_t* neighbors = tile.neighbors();
  const auto fetch_point = [=](int64_t point) {
    fetch(args.position.points + point * args.position.point_stride, args.position.point_stride);
    fetch(args.scores + point * args.hidden, args.hidden);
    fetch(args.features + point * args.channels_padded, args.channels_padded);
  };
  const auto of_features = [=, features = args.scores, hidden = args.hidden](int64_t row, int64_t c) {
    return load(features + neighbors[row] * hidden + c);
  };
  // Segments [first, last), one panel of columns.
  const auto attend = [&](int64_t first, int64_t last, int64_t column) {
    for (int64_t c = column; c < std::min(column + kPanel, args.hidden); c += kLanes<T>) {
      const auto attend_vector = c < args.channels_padded ? attend_column<true, T> : attend_column<false, T>;
      attend_vector(args, tile, first, last, scores + c - column, kPanel, c);
    }
  };
  const auto walk = [&](const auto& ahead, const auto& pool) {
    return walk_rows(tile, args.neighbors, args.k, args.cloud, args.order, begin, end, most_rows, ahead,
                     pool);
  };

#if defined(__AVX512F__)
  if (args.by_tiles) {
    TileScores<T> by_tile(args, tile);
    BlockAttention<T> attention(args, tile);
    // Segments go together whose scores stay in the first-level cache.
    const auto by_parts = [&](const auto& body) {
      for (int64_t first = 0, last = 0; first < tile.segments(); first = last) {
        for (last = first + 1; last < tile.segments(); ++last) {
          if (tile.segment_end(last) - tile.segment_begin(first) > kTileRows) break;
        }
        body(first, last);
      }
    };
    const auto part = [&](int64_t first, int64_t last, int64_t column) {
      by_tile.scores(first, last, column, of_features, scores);
      attend(first, last, column);
    };
    // Neighbours of rows that follow each other are rows not far from there, seldom asked for the first time.
    const Ahead<decltype(fetch_point)> rows_ahead{256, fetch_point};
    return walk(rows_ahead, [&] {
      by_tile.forward();
      if (!by_tile.shared()) {
        return by_parts([&](int64_t first, int64_t last) {
          for (int64_t column = 0; column < args.hidden; column += kPanel) part(first, last, column);
        });
      }
      by_tile.prepare();
      attention.clear();
      by_tile.take_scores([&](int64_t column) { return attention.takes(column); }, of_features,
                          [&](const auto& block, int64_t column, const auto& sums)
                              __attribute__((always_inline)) {
                                if constexpr (sizeof(T) == sizeof(float)) attention.add(block, column, sums);
                              });
      for (int64_t n = 0; n < attention.rest_count(); ++n) {
        const auto [segment, column] = attention.rest(n);
        part(segment, segment + 1, column);
      }
      for (int64_t column = 0; column < args.hidden; column += kPanel) {
        if (!attention.takes(column)) {
          by_parts([&](int64_t first, int64_t last) { part(first, last, column); });
          continue;
        }
        for (int64_t s = 0; s < tile.segments(); ++s) {
          if (tile.segment_begin(s) == tile.segment_end(s)) attend(s, s + 1, column);
        }
      }
    });
  }
#endif
  LinearChannels<T> channels(args.position, args.position.from_neighbor ? args.position.from_center : nullptr,
                             tile);
  return walk(neighbors_ahead(args.neighbors, args.k, args.cloud, fetch_point), [&] {
    if (tile.count() > 0) tile.forward();
    const bool linear = channels.find_each(tile);
    for (int64_t column = 0; column < args.hidden; column += kPanel) {
      if (linear) {
        channels.scores(tile, args.position_weight, column, args.hidden, of_features, scores);
      } else {
        product_columns(
            tile.rows(), args.position.out_padded, column, args.hidden, tile.output(),
            args.position.out_padded, args.position_weight, of_features,
            [=](int64_t row, int64_t c, Vector<T> sum) { store(scores + row * kPanel + c - column, sum); });
      }
      attend(0, tile.segments(), column);
    }
  });
}

// What one tile of edges leaves behind on its way back: gradients of scores, `stride` apart, and of what the
// position network gave; sums of both over the edges into each point.
template <typename T>
struct TileGradients {
  T* scores;
  int64_t stride;
  T *positions, *score_sums, *feature_sums;
};

// Gradients of the scores and of what they weigh, for one vector of channels.
template <bool kFeature, typename T>
void unpool_column(const PoolBackwardArgs<T>& args, const PositionTile<T>& tile, const T* scores,
                   int64_t score_stride, int64_t column, const TileGradients<T>& gradients) {
  const PoolArgs<T>& pool = args.pool;
  const int64_t hidden = pool.hidden, stride = gradients.stride;
  const int64_t place = kFeature ? column : column - pool.channels_padded;
  const int64_t row_stride = kFeature ? pool.channels_padded : pool.position.out_padded;
  const T* values = (kFeature ? pool.features : tile.output()) + place;
  const T *statistics = args.statistics + column, *grad = args.grad + column, *pooled = args.pooled + column;
  T *score_gradients = gradients.scores + column, *position_gradients = gradients.positions + place;
  const int64_t *centers = tile.centers(), *neighbors = tile.neighbors();
  for (int64_t s = 0; s < tile.segments(); ++s) {
    const int64_t point = tile.segment_point(s), end = tile.segment_end(s);
    Vector<T> score_sum{}, feature_sum{};
    for (int64_t row = tile.segment_begin(s); row < end; ++row) {
      const int64_t center = centers[row] * hidden;
      // Above zero by rounding alone, but by much where scores are large.
      const Vector<T> logarithm = load(scores + row * score_stride) - load(statistics + center);
      const Vector<T> attention = exp_nonpositive<T>(logarithm > T(0) ? Vector<T>{} : logarithm);
      const Vector<T> weighted = attention * load(grad + center);
      const Vector<T> value = load(values + (kFeature ? neighbors[row] : row) * row_stride);
      const Vector<T> gradient = weighted * (value - load(pooled + center));
      store(score_gradients + row * stride, gradient);
      score_sum += gradient;
      if (kFeature) {
        feature_sum += weighted;
      } else {
        store(position_gradients + row * row_stride, weighted);
      }
    }
    T* total = gradients.score_sums + point * hidden + column;
    store(total, load(total) + score_sum);
    if (!kFeature) continue;
    total = gradients.feature_sums + point * row_stride + column;
    store(total, load(total) + feature_sum);
  }
}

template <typename T>
void backward_points(const PoolBackwardArgs<T>& args, int64_t begin, int64_t end, T* weights) {
  constexpr int64_t kPanel = kPanelVectors * kLanes<T>;
  const PoolArgs<T>& pool = args.pool;
  const PositionMlp<T>& mlp = pool.position;
  const int64_t hidden = pool.hidden, channels = pool.channels_padded, position = mlp.out_padded;
  // Rows a power of two apart would share few sets of the cache.
  const int64_t stride = hidden + kPanel;
  // Gradients by segments write less often where tiles are larger.
  PositionTile<T> tile(mlp, mlp.from_neighbor ? 2 * kTileRows : 0);
  PointBlock<T> block(mlp);
  const int64_t capacity = tile.capacity();
  Scratch<T> panel(capacity * kPanel), score_gradients(capacity * stride);
  Scratch<T> gradient(capacity * mlp.widest), other(capacity * mlp.widest);
  Scratch<T> features(kPointBlock * channels), scores(kPointBlock * hidden);
  Scratch<T> score_sums(kPointBlock * hidden), feature_sums(kPointBlock * channels);
  Scratch<T> position_outer(position * hidden);
  std::fill_n(position_outer.get(), position * hidden, T(0));
  // Gradients of points want those of every edge's code.
  const bool edges = args.incoming.edge_gradient;
  LinearChannels<T> linear(mlp, edges ? nullptr : mlp.from_neighbor, tile);
  constexpr int64_t kTerms = LinearChannels<T>::kTerms;
  Scratch<T> score_terms(capacity * hidden), position_terms(capacity * position), code_sums(4 * position);
  std::fill_n(code_sums.get(), 4 * position, T(0));
  T* dU = weights + args.score_gradient;

  const TileGradients<T> gradients{score_gradients.get(), stride, gradient.get(), score_sums.get(),
                                   feature_sums.get()};

  const auto tile_backward = [&](int64_t first) {
    tile.forward();
    const bool by_segments = linear.find_all(tile, first);
    for (int64_t column = 0; column < hidden; column += kPanel) {
      const auto of_features = [=, scores = scores.get(), neighbors = tile.neighbors(),
                                next = tile.next_centers(), statistics = args.statistics, grad = args.grad,
                                pooled = args.pooled](int64_t row, int64_t c) {
        if (c == column) {
          const int64_t place = next[row] * hidden + c;
          __builtin_prefetch(statistics + place);
          __builtin_prefetch(grad + place);
          __builtin_prefetch(pooled + place);
        }
        return load(scores + (neighbors[row] - first) * hidden + c);
      };
      if (by_segments) {
        linear.scores(tile, pool.position_weight, column, hidden, of_features, panel.get());
      } else {
        product_columns(tile.rows(), position, column, hidden, tile.output(), position, pool.position_weight,
                        of_features, [=, panel = panel.get()](int64_t row, int64_t c, Vector<T> sum) {
                          store(panel + row * kPanel + c - column, sum);
                        });
      }
      for (int64_t c = column; c < std::min(column + kPanel, hidden); c += kLanes<T>) {
        const auto unpool = c < channels ? unpool_column<true, T> : unpool_column<false, T>;
        unpool(args, tile, panel.get() + c - column, kPanel, c, gradients);
      }
    }
    const auto add_scores = [&](auto rows_at_once, int64_t rows, const T* a, int64_t lda, T* sums) {
      product<decltype(rows_at_once)::value>(
          rows, hidden, position, a, lda, args.position_score,
          [=](int64_t row, int64_t c) { return load(sums + row * position + c); },
          [=](int64_t row, int64_t c, Vector<T> sum) { store(sums + row * position + c, sum); });
    };
    if (by_segments) {
      linear.sum_terms(tile, score_gradients.get(), stride, hidden, score_terms.get());
      linear.sum_terms(tile, gradient.get(), position, position, position_terms.get());
      add_scores(std::integral_constant<int, kTerms>(), kTerms * tile.segments(), score_terms.get(), hidden,
                 position_terms.get());
      linear.add_outer(tile, score_gradients.get(), stride, hidden, score_terms.get(), position_outer.get());
      return linear.add_gradients(tile, gradient.get(), position_terms.get(), score_gradients.get(), stride,
                                  hidden, pool.position_weight, block.sums(), code_sums.get());
    }
    add_scores(std::integral_constant<int, kRowBlock>(), tile.rows(), score_gradients.get(), stride,
               gradient.get());
    add_outer_packed(tile.count(), tile.output(), position, position, score_gradients.get(), hidden, stride,
                     position_outer.get());
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
        [=, sums = feature_sums.get()](int64_t row, int64_t c) { return load(sums + row * channels + c); },
        [=](int64_t row, int64_t c, Vector<T> sum) {
          T* target = grad_features + row * channels + c;
          if (row < count) store(target, load(target) + sum);
        });
  }
  add_packed_transposed(position, hidden, position_outer.get(), dU + channels, hidden);
  if (mlp.depth != 1 || mlp.dims != 3) return;
  const PositionLayer<T>& layer = mlp.layers[0];
  for (int64_t p = 0; p < position; ++p) {
    for (int64_t d = 0; d < 4; ++d)
      weights[layer.gradient + p * layer.in + d] += code_sums.get()[d * position + p];
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
