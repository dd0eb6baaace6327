// Position networks between torch and kernels: packing weights, precomputing the per-point halves, and
// handing weight gradients back.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "common/adjacency.h"
#include "common/position_mlp.h"
#include "common/tensor.h"
#include "common/tile_layout.h"

namespace avatar {

// The position network of points (rows, dims): owns what its PositionMlp points to.
template <typename T>
class PositionWeights {
 public:
  PositionWeights(const TileLayout<T>& layout, const Tensor& points, const std::vector<Tensor>& weights,
                  const std::vector<Tensor>& biases, double slope)
      : layout_(layout), points_(points), depth_(weights.size()) {
    const int64_t dims = points.size(1);
    mlp_.points = const_data<T>(points);
    mlp_.dims = mlp_.point_stride = dims;
    if (dims == 3) {
      mlp_.point_stride = 4;
      widened_points_ = widen(points);
      mlp_.points = widened_points_.get();
    }
    mlp_.dims_padded = layout_.padded(dims);
    mlp_.code_padded = layout_.padded(dims + 1);
    mlp_.depth = depth_;
    mlp_.slope = static_cast<T>(slope);
    mlp_.out_padded = mlp_.hidden_sum = mlp_.widest = layout_.padded(3 * dims + 1);
    if (depth_ == 0) return;
    mlp_.hidden_sum = 0;
    mlp_.widest = mlp_.code_padded;
    for (int64_t l = 0; l < depth_; ++l) {
      weights_.push_back(to_compute(weights[l]));
      given_.push_back({const_data<T>(weights_.back()), weights_.back().size(0), weights_.back().size(1)});
      biases_.push_back(to_compute(biases[l]));
      add_layer(l);
    }
    mlp_.layers = layers_.data();
    mlp_.out_padded = layers_.back().out;
    const int64_t out = layers_[0].out;
    for (int64_t d = 0; d < dims; ++d) {
      for (int64_t o = 0; o < out; ++o) center_weight_.push_back(at(0, o, d) + at(0, o, dims + d));
    }
    mlp_.center_weight = center_weight_.data();
    if (dims == 3) {
      for (int64_t d = 0; d <= dims; ++d) {
        for (int64_t o = 0; o < out; ++o) {
          from_center_.push_back(at(0, o, 2 * dims + d) - (d < dims ? at(0, o, dims + d) : T(0)));
          from_neighbor_.push_back(at(0, o, 2 * dims + d) + (d < dims ? at(0, o, d) : T(0)));
        }
      }
      if (depth_ <= 2) mlp_.from_center = from_center_.data();
      if (depth_ == 1) mlp_.from_neighbor = from_neighbor_.data();
    }
  }
  PositionWeights(const PositionWeights&) = delete;
  PositionWeights& operator=(const PositionWeights&) = delete;

  const PositionMlp<T>& mlp() const { return mlp_; }
  // What gradients want: the layers' transposed weights and mlp().to_neighbor.
  void add_transposed() {
    if (depth_ == 0) return;
    const int64_t dims = mlp_.dims;
    for (int64_t l = 0; l < depth_; ++l) {
      transposed_.push_back(layout_.pack(layers_[l].out, layers_[l].in, [&](int64_t o, int64_t i) {
        if (l > 0) return at(l, o, i);
        return i < dims ? at(0, o, i) + at(0, o, 2 * dims + i) : i == dims ? at(0, o, 3 * dims) : T(0);
      }));
      layers_[l].transposed = transposed_.back().get();
    }
    to_neighbor_ = layout_.pack(layers_[0].out, mlp_.dims_padded, [&](int64_t o, int64_t d) {
      return d < dims ? at(0, o, dims + d) - at(0, o, 2 * dims + d) : T(0);
    });
    mlp_.to_neighbor = to_neighbor_.get();
  }
  // What kernels want that do not make it themselves: mlp().center_part.
  void add_center_part() {
    if (depth_ == 0 || center_part_) return;
    const int64_t out = layers_[0].out;
    const auto packed =
        layout_.pack(mlp_.dims, out, [&](int64_t d, int64_t o) { return center_weight_[d * out + o]; });
    center_part_ = layout_.project(points_, out, packed, layers_[0].bias);
    mlp_.center_part = center_part_.get();
  }
  int64_t width() const { return depth_ ? weights_.back().size(0) : 3 * mlp_.dims + 1; }
  // Numbers in a block of this network's weight gradients.
  int64_t gradient_size() const { return gradient_size_; }

  // The gradients of weights, then of biases, from a block.
  std::vector<Tensor> gradients(const T* block) const {
    std::vector<Tensor> result;
    for (int64_t l = 0; l < depth_; ++l) {
      Tensor gradient = torch::stable::new_empty(weights_[l], {weights_[l].size(0), weights_[l].size(1)});
      const int64_t dims = mlp_.dims, in = weights_[l].size(1);
      T* target = mutable_data<T>(gradient);
      for (int64_t o = 0; o < weights_[l].size(0); ++o) {
        const T* direct = block + layers_[l].gradient + o * layers_[l].in;
        if (l > 0) {
          std::copy_n(direct, in, target + o * in);
          continue;
        }
        // p_i = p_j + (p_i - p_j), hence the centre's gradient is the neighbour's and the difference's.
        const T* neighbor = block + mlp_.neighbor_gradient + o * mlp_.dims_padded;
        for (int64_t d = 0; d < dims; ++d) target[o * in + d] = neighbor[d] + direct[d];
        std::copy_n(neighbor, dims, target + o * in + dims);
        std::copy_n(direct, dims + 1, target + o * in + 2 * dims);
      }
      result.push_back(gradient);
    }
    for (int64_t l = 0; l < depth_; ++l) {
      Tensor gradient = torch::stable::new_empty(biases_[l], {biases_[l].size(0)});
      std::copy_n(block + layers_[l].bias_gradient, biases_[l].size(0), mutable_data<T>(gradient));
      result.push_back(gradient);
    }
    return result;
  }

 private:
  // A layer's weight, not padded.
  struct Given {
    const T* weight;
    int64_t rows, columns;
  };

  T at(int64_t l, int64_t row, int64_t column) const {
    const Given& given = given_[l];
    return row < given.rows && column < given.columns ? given.weight[row * given.columns + column] : T(0);
  }

  void add_layer(int64_t l) {
    const int64_t dims = mlp_.dims, true_out = weights_[l].size(0), out = layout_.padded(true_out);
    const int64_t in = l == 0 ? mlp_.code_padded : layers_[l - 1].out;
    if (l == 0) {
      packed_.push_back(layout_.pack(dims + 1, out, [&](int64_t d, int64_t o) {
        return at(0, o, 2 * dims + d) - (d < dims ? at(0, o, dims + d) : T(0));
      }));
    } else {
      packed_.push_back(layout_.pack(in, out, [&](int64_t i, int64_t o) { return at(l, o, i); }));
    }
    packed_.push_back(buffer<T>(out));
    T* bias = packed_.back().get();
    std::fill(std::copy_n(const_data<T>(biases_[l]), true_out, bias), bias + out, T(0));
    PositionLayer<T> layer{in, out, nullptr, nullptr, nullptr, 0, 0};
    layer.weight = packed_[2 * l].get();
    layer.bias = packed_[2 * l + 1].get();
    layer.gradient = reserve(out * in);
    layer.bias_gradient = reserve(out);
    if (l == 0) mlp_.neighbor_gradient = reserve(out * mlp_.dims_padded);
    layers_.push_back(layer);
    mlp_.hidden_sum += out;
    mlp_.widest = std::max(mlp_.widest, out);
  }

  // (rows, 3) with a zero after each point, so that one load takes it whole.
  static Buffer<T> widen(const Tensor& points) {
    Buffer<T> wide = buffer<T>(4 * points.size(0));
    const T* from = const_data<T>(points);
    T* to = wide.get();
    torch::stable::parallel_for(0, points.size(0), 1 << 14, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        std::copy_n(from + 3 * row, 3, to + 4 * row);
        to[4 * row + 3] = T(0);
      }
    });
    return wide;
  }

  int64_t reserve(int64_t count) { return std::exchange(gradient_size_, gradient_size_ + count); }

  const TileLayout<T> layout_;
  PositionMlp<T> mlp_{};
  Tensor points_;
  int64_t depth_, gradient_size_ = 0;
  std::vector<Tensor> weights_, biases_;
  std::vector<Given> given_;
  std::vector<PositionLayer<T>> layers_;
  std::vector<Buffer<T>> packed_, transposed_;
  std::vector<T> center_weight_, from_center_, from_neighbor_;
  Buffer<T> to_neighbor_, center_part_, widened_points_;
};

// Walks the edges of neighbors (batch, rows, k) by the point they lead to, in rounds whose working memory is
// bounded by `numbers_per_point` numbers a point, and sums weight gradients in blocks of points that do not
// depend on the number of threads. body(incoming, begin, end, weights) handles points [begin, end). Returns
// the weight gradients. grad_points (rows of all clouds, dims) is added to, where given.
template <typename T, typename Body>
std::vector<T> backward_by_points(const Tensor& neighbors, int64_t gradient_size, int64_t dims,
                                  int64_t numbers_per_point, T* grad_points, const Body& body) {
  constexpr int64_t kMostBlocks = 64, kLeastPoints = 96, kLeastRows = 4096;
  const int64_t batch = neighbors.size(0), cloud = neighbors.size(1), k = neighbors.size(2);
  const int64_t per_row = std::max<int64_t>(1, k * (dims + 2));
  const int64_t most_rows =
      std::max(kLeastRows, batch * cloud * std::max<int64_t>(1, 4 * numbers_per_point / per_row));
  const int64_t clouds_a_round = std::max<int64_t>(1, most_rows / std::max<int64_t>(1, cloud));
  const int64_t rows_a_round = std::min(cloud, most_rows);
  const int64_t round_points = std::min(batch, clouds_a_round) * cloud;
  const int64_t affordable =
      batch * cloud * std::max<int64_t>(1, numbers_per_point) / std::max<int64_t>(1, gradient_size);
  const int64_t blocks =
      std::clamp<int64_t>(std::min(affordable, round_points / kLeastPoints), 1, kMostBlocks);
  std::vector<T> weights(blocks * gradient_size, T(0));
  const std::unique_ptr<T[]> edge_gradient(
      grad_points ? new T[std::min(batch, clouds_a_round) * rows_a_round * k * dims] : nullptr);
  if (k > 0) {
    for (int64_t b = 0; b < batch; b += clouds_a_round) {
      const int64_t clouds = std::min(clouds_a_round, batch - b), points = clouds * cloud;
      for (int64_t row = 0; row < cloud; row += rows_a_round) {
        const int64_t rows = std::min(rows_a_round, cloud - row), first_row = b * cloud + row;
        const int64_t* edges = const_data<int64_t>(neighbors) + first_row * k;
        const ReverseAdjacency reverse = reverse_adjacency(edges, clouds, rows, k, cloud);
        const IncomingEdges<T> incoming{reverse.offsets.data(),
                                        reverse.edges.data(),
                                        static_cast<int64_t>(reverse.edges.size()),
                                        first_row,
                                        b * cloud,
                                        k,
                                        edge_gradient.get(),
                                        grad_points};
        const int64_t size = (points + blocks - 1) / blocks;
        parallel_tasks(blocks, [&](int64_t block) {
          const int64_t begin = std::min(block * size, points), end = std::min(begin + size, points);
          body(incoming, b * cloud + begin, b * cloud + end, weights.data() + block * gradient_size);
        });
        if (!grad_points) continue;
        torch::stable::parallel_for(0, clouds * rows, 1024, [&](int64_t begin, int64_t end) {
          for (int64_t r = begin; r < end; ++r) {
            for (int64_t e = r * k; e < (r + 1) * k; ++e) {
              if (edges[e] < 0) continue;
              for (int64_t d = 0; d < dims; ++d) {
                grad_points[(first_row + r) * dims + d] += edge_gradient[e * dims + d];
              }
            }
          }
        });
      }
    }
  }
  torch::stable::parallel_for(0, gradient_size, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t block = 1; block < blocks; ++block) {
      for (int64_t i = begin; i < end; ++i) weights[i] += weights[block * gradient_size + i];
    }
  });
  weights.resize(gradient_size);
  return weights;
}

}  // namespace avatar
