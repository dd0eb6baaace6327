#include "local_attention_pool/local_attention_pool_cpu.h"

#include <algorithm>

#include "common/position_weights.h"
#include "local_attention_pool/local_attention_pool_order.h"
#include "local_attention_pool/local_attention_pool_simd.h"

namespace avatar {
namespace {

constexpr double kLog2E = 1.4426950408889634;

// (B, N, C) as (B * N, C).
Tensor flat(const Tensor& tensor) {
  return torch::stable::view(tensor, {tensor.size(0) * tensor.size(1), tensor.size(2)});
}

// Packed inputs shared by forward and backward.
template <typename T>
struct Pool {
  const TileLayout<T> layout;
  const int64_t channels, position_channels, channels_padded, position_padded, hidden;
  const Tensor points, features, neighbors, score_weight;
  const T* scores;  // those of score_weight
  PositionWeights<T> position;
  Buffer<T> feature_weight, position_weight;

  Pool(const Tensor& points_in, const Tensor& features_in, const Tensor& neighbors_in,
       const std::vector<Tensor>& weights, const std::vector<Tensor>& biases, const Tensor& score_weight_in,
       double slope, double score_factor = 1)
      : layout(TileLayout<T>::of(widths(features_in, weights))),
        channels(features_in.size(2)),
        position_channels(weights.back().size(0)),
        channels_padded(layout.padded(channels)),
        position_padded(layout.padded(position_channels)),
        hidden(channels_padded + position_padded),
        points(flat(to_compute(points_in))),
        features(layout.pad_parts(flat(to_compute(features_in)), {channels})),
        neighbors(as_contiguous(neighbors_in)),
        score_weight(to_compute(score_weight_in)),
        scores(const_data<T>(score_weight)),
        position(layout, points, weights, biases, slope) {
    const T factor = static_cast<T>(score_factor);
    const int64_t width = channels + position_channels;
    // Rows of the scores by padded channels, from those of features or of positions on.
    const auto rows = [&](int64_t begin) {
      return [this, width, begin](int64_t q) {
        return channel(q) < 0 ? nullptr : scores + channel(q) * width + begin;
      };
    };
    feature_weight = layout.pack_rows(channels_padded, channels, hidden, factor, rows(0));
    position_weight = layout.pack_rows(position_padded, position_channels, hidden, factor, rows(channels));
  }

  static std::vector<int64_t> widths(const Tensor& features, const std::vector<Tensor>& weights) {
    std::vector<int64_t> result{features.size(2)};
    for (const Tensor& weight : weights) result.push_back(weight.size(0));
    return result;
  }
  // The place of a padded hidden channel in the unpadded ones, or -1.
  int64_t channel(int64_t padded) const {
    if (padded < channels_padded) return padded < channels ? padded : -1;
    const int64_t p = padded - channels_padded;
    return p < position_channels ? channels + p : -1;
  }
  // score_weight in padded rows and columns.
  T at(int64_t row, int64_t column) const {
    const int64_t r = channel(row), c = channel(column);
    return r < 0 || c < 0 ? T(0) : scores[r * (channels + position_channels) + c];
  }
  PoolArgs<T> args() const {
    PoolArgs<T> args{};
    args.position = position.mlp();
    args.neighbors = const_data<int64_t>(neighbors);
    args.k = neighbors.size(2);
    args.cloud = neighbors.size(1);
    args.channels = channels;
    args.channels_padded = channels_padded;
    args.position_channels = position_channels;
    args.hidden = hidden;
    args.features = const_data<T>(features);
    args.feature_weight = feature_weight.get();
    args.position_weight = position_weight.get();
    return args;
  }
};

}  // namespace

std::tuple<Tensor, Tensor> local_attention_pool_cpu(const Tensor& points, const Tensor& features,
                                                    const Tensor& neighbors,
                                                    std::vector<Tensor> position_weight,
                                                    std::vector<Tensor> position_bias,
                                                    const Tensor& score_weight, double negative_slope,
                                                    bool save_statistics) {
  const int64_t batch = points.size(0), cloud = points.size(1), k = neighbors.size(2);
  const int64_t width = score_weight.size(0);
  const ScalarType type = compute_type(points.scalar_type());
  const Tensor like = to_type(score_weight, type);
  Tensor pooled = new_result(like, {batch, cloud, width});
  Tensor statistics = new_result(like, {batch, cloud, save_statistics ? width : 0});
  FirstBad bad;
  dispatch_compute(type, "local_attention_pool", [&](auto zero) {
    using T = decltype(zero);
    Pool<T> pool(points, features, neighbors, position_weight, position_bias, score_weight, negative_slope,
                 kLog2E);
    const Buffer<T> scores =
        pool.layout.project(pool.features, pool.hidden, pool.feature_weight, static_cast<const T*>(nullptr));
    PoolArgs<T> args = pool.args();
    args.scores = scores.get();
    args.pooled = mutable_data<T>(pooled);
    args.statistics = save_statistics ? mutable_data<T>(statistics) : nullptr;
    const int64_t grain = std::max<int64_t>(16, (1 << 20) / std::max<int64_t>(1, k * width * width));
    const Isa isa = is_narrow(args) ? current_isa() : pool.layout.isa;
    const int64_t rows = batch * cloud;
    Buffer<int64_t> order;
    if (args.position.from_center && !is_narrow(args) && pool.layout.isa == Isa::avx512) {
      args.by_tiles = follows_neighbors(args, rows);
      // Elsewhere only wide codes are worth going to and fro in memory.
      if (!args.by_tiles && pool.hidden >= 256) {
        order = curve_order(args, rows);
        args.by_tiles = true;
      }
    }
    args.order = order.get();
    if (!args.by_tiles && !(is_narrow(args) && isa == Isa::avx512)) {
      pool.position.add_center_part();
      args.position = pool.position.mlp();
    }
    const int64_t step = rows_of_tile(args), tiles = (rows + step - 1) / step;
    parallel_parts(tiles, (grain + step - 1) / step, 1, [&](int64_t begin, int64_t end) {
      bad.report(
          AVATAR_ISA_CALL_OF(isa, local_attention_pool_rows, args, begin * step, std::min(end * step, rows)));
    });
    if (bad.found()) bad.report(first_bad_neighbor(args.neighbors, rows * k, cloud));
    raise_bad_neighbor(bad, "local_attention_pool", pool.neighbors, cloud);
  });
  return {to_type(pooled, points.scalar_type()), statistics};
}

namespace {

// Gradients of points (empty unless `points_gradient`), features and score_weight; of position_weight and
// then position_bias.
std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> local_attention_pool_backward_cpu(
    const Tensor& grad, const Tensor& points, const Tensor& features, const Tensor& neighbors,
    std::vector<Tensor> position_weight, std::vector<Tensor> position_bias, const Tensor& score_weight,
    const Tensor& pooled, const Tensor& statistics, double negative_slope, bool points_gradient) {
  const int64_t batch = points.size(0), cloud = points.size(1), dims = points.size(2);
  const ScalarType type = compute_type(points.scalar_type()), given = points.scalar_type();
  const Tensor like = to_type(score_weight, type);
  Tensor grad_points = torch::stable::new_zeros(like, {points_gradient ? batch : 0, cloud, dims});
  Tensor grad_features = torch::stable::new_empty(like, {batch, cloud, features.size(2)});
  Tensor grad_score = torch::stable::new_empty(like, {score_weight.size(0), score_weight.size(1)});
  std::vector<Tensor> grad_position;
  dispatch_compute(type, "local_attention_pool_backward", [&](auto zero) {
    using T = decltype(zero);
    Pool<T> pool(points, features, neighbors, position_weight, position_bias, score_weight, negative_slope);
    pool.position.add_center_part();
    pool.position.add_transposed();
    FirstBad bad;
    bad.report(
        first_bad_neighbor(const_data<int64_t>(pool.neighbors), batch * cloud * neighbors.size(2), cloud));
    raise_bad_neighbor(bad, "local_attention_pool_backward", pool.neighbors, cloud);
    const std::vector<int64_t> parts{pool.channels, pool.position_channels};
    const Tensor padded_grad = pool.layout.pad_parts(flat(to_compute(grad)), parts);
    const Tensor padded_pooled = pool.layout.pad_parts(flat(to_compute(pooled)), parts);
    const Tensor padded_statistics = pool.layout.pad_parts(flat(to_compute(statistics)), parts);
    const int64_t channels = pool.channels, wide = pool.channels_padded;
    Tensor features_sum = torch::stable::new_zeros(like, {batch * cloud, wide});
    const auto feature_score =
        pool.layout.pack(pool.hidden, wide, [&](int64_t q, int64_t c) { return pool.at(q, c); });
    const auto position_score = pool.layout.pack(pool.hidden, pool.position_padded,
                                                 [&](int64_t q, int64_t p) { return pool.at(q, wide + p); });
    PoolBackwardArgs<T> args{};
    args.pool = pool.args();
    args.grad = const_data<T>(padded_grad);
    args.pooled = const_data<T>(padded_pooled);
    args.statistics = const_data<T>(padded_statistics);
    args.feature_score = feature_score.get();
    args.position_score = position_score.get();
    args.score_gradient = pool.position.gradient_size();
    args.grad_features = mutable_data<T>(features_sum);
    const std::vector<T> weights = backward_by_points<T>(
        pool.neighbors, args.score_gradient + pool.hidden * pool.hidden, dims, pool.hidden,
        points_gradient ? mutable_data<T>(grad_points) : nullptr,
        [&](const IncomingEdges<T>& incoming, int64_t begin, int64_t end, T* block) {
          PoolBackwardArgs<T> round = args;
          round.incoming = incoming;
          AVATAR_ISA_CALL_OF(pool.layout.isa, local_attention_pool_backward_points, round, begin, end, block);
        });
    if (channels == wide) {
      grad_features = torch::stable::view(features_sum, {batch, cloud, channels});
    } else {
      const T* from = const_data<T>(features_sum);
      T* to = mutable_data<T>(grad_features);
      torch::stable::parallel_for(0, batch * cloud, 4096, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row)
          std::copy_n(from + row * wide, channels, to + row * channels);
      });
    }
    T* scores = mutable_data<T>(grad_score);
    for (int64_t q = 0; q < pool.hidden; ++q) {
      for (int64_t c = 0; c < pool.hidden; ++c) {
        const int64_t row = pool.channel(q), column = pool.channel(c);
        if (row < 0 || column < 0) continue;
        scores[row * (pool.channels + pool.position_channels) + column] =
            weights[args.score_gradient + q * pool.hidden + c];
      }
    }
    for (const Tensor& gradient : pool.position.gradients(weights.data())) {
      grad_position.push_back(to_type(gradient, given));
    }
  });
  return {to_type(grad_points, given), to_type(grad_features, given), to_type(grad_score, given),
          grad_position};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avatar_ops, CPU, m) {
  m.impl("local_attention_pool", TORCH_BOX(&local_attention_pool_cpu));
  m.impl("local_attention_pool_backward", TORCH_BOX(&local_attention_pool_backward_cpu));
}

}  // namespace avatar
