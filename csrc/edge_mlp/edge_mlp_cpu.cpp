#include <algorithm>

#include "common/matrix_simd.h"
#include "common/radix_sort.h"
#include "common/tensor.h"
#include "edge_mlp/edge_mlp_simd.h"

namespace avatar {
namespace {

// Edges that a tile aims at: its layers should stay in the second-level cache.
constexpr int64_t kTileEdges = 128;
// Tiles whose edges' gradients are kept before they are added to the points they lead to, and the parts that
// these tiles are divided into, each with sums of its own. Neither depends on the number of threads.
constexpr int64_t kRoundTiles = 64, kParts = 16;

template <typename T>
std::vector<T> padded_rows(const Tensor& tensor_in, int64_t stride) {
  const Tensor tensor = as_contiguous(tensor_in);
  const int64_t columns = tensor.size(tensor.dim() - 1), rows = columns ? tensor.numel() / columns : 0;
  std::vector<T> result(std::max<int64_t>(rows, 1) * stride, 0);
  for (int64_t row = 0; row < rows; ++row) {
    std::copy_n(const_data<T>(tensor) + row * columns, columns, result.data() + row * stride);
  }
  return result;
}

// The layers with their parameters padded.
template <typename T>
class EdgeMlp {
 public:
  // `weights` are those after the first.
  EdgeMlp(const Tensor& p, const Tensor& q, const Tensor& points, const std::vector<Tensor>& weights,
          const std::vector<Tensor>& scales, const std::vector<Tensor>& shifts, double negative_slope)
      : rows_(p.size(0)),
        k_(points.size(1)),
        tile_rows_(std::max<int64_t>(1, kTileEdges / std::max<int64_t>(k_, 1))) {
    const size_t count = weights.size() + 1;
    parameters_.reserve(4 * count);
    for (size_t l = 0; l < count; ++l) {
      EdgeMlpLayer<T> layer{l ? weights[l - 1].size(0) : p.size(1), 0, nullptr, nullptr, nullptr, nullptr};
      layer.stride = pad_columns(layer.width);
      if (l) {
        const int64_t inner = layers_[l - 1].stride;
        layer.weight = keep(padded_rows<T>(weights[l - 1], inner));
        std::vector<T> transposed(inner * layer.stride, 0);
        for (int64_t o = 0; o < layer.width; ++o) {
          for (int64_t i = 0; i < inner; ++i) transposed[i * layer.stride + o] = layer.weight[o * inner + i];
        }
        layer.transposed = keep(std::move(transposed));
      }
      if (l < scales.size()) {
        layer.scale = keep(padded_rows<T>(scales[l], layer.stride));
        layer.shift = keep(padded_rows<T>(shifts[l], layer.stride));
      }
      layers_.push_back(layer);
    }
    args_ = {const_data<T>(p),
             const_data<T>(q),
             const_data<int64_t>(points),
             k_,
             layers_.data(),
             static_cast<int64_t>(count),
             T(negative_slope)};
  }

  const EdgeMlpArgs<T>& args() const { return args_; }
  const EdgeMlpLayer<T>& last() const { return layers_.back(); }
  int64_t tiles() const { return k_ ? (rows_ + tile_rows_ - 1) / tile_rows_ : 0; }
  int64_t tile_edges() const { return tile_rows_ * k_; }
  int64_t begin(int64_t tile) const { return tile * tile_rows_; }
  int64_t end(int64_t tile) const { return std::min(rows_, (tile + 1) * tile_rows_); }
  // Elements of the gradients of all weights, scales and shifts.
  int64_t gradient_size() const {
    int64_t size = 0;
    for (int64_t l = 0; l < args_.count; ++l) size += weight_size(l) + 2 * layers_[l].stride;
    return size;
  }
  int64_t weight_size(int64_t l) const { return l ? layers_[l].width * layers_[l - 1].stride : 0; }

 private:
  const T* keep(std::vector<T> values) {
    parameters_.push_back(std::move(values));
    return parameters_.back().data();
  }

  const int64_t rows_, k_, tile_rows_;
  std::vector<EdgeMlpLayer<T>> layers_;
  std::vector<std::vector<T>> parameters_;
  EdgeMlpArgs<T> args_;
};

// Working memory of a thread.
template <typename T>
class TileMemory {
 public:
  TileMemory(const EdgeMlp<T>& mlp, bool backward)
      : rows_(mlp.tile_edges()),
        slots_(mlp.tile_edges()),
        linears_(mlp.args().count),
        activations_(mlp.args().count) {
    const int64_t edges = mlp.tile_edges();
    int64_t size = 0, widest = 0;
    for (int64_t l = 0; l < mlp.args().count; ++l) {
      size += 2 * edges * mlp.args().layers[l].stride;
      widest = std::max(widest, mlp.args().layers[l].stride);
    }
    values_ = buffer<T>(size + (backward ? 2 * edges * widest : 0));
    T* next = values_.get();
    for (int64_t l = 0; l < mlp.args().count; ++l) {
      linears_[l] = std::exchange(next, next + edges * mlp.args().layers[l].stride);
      activations_[l] = std::exchange(next, next + edges * mlp.args().layers[l].stride);
    }
    scratch_ = {edges, rows_.data(), slots_.data(), linears_.data(), activations_.data(), {nullptr, nullptr}};
    for (T*& gradient : scratch_.gradients)
      gradient = backward ? std::exchange(next, next + edges * widest) : nullptr;
  }
  const EdgeMlpScratch<T>& scratch() const { return scratch_; }

 private:
  std::vector<int64_t> rows_;
  std::vector<int32_t> slots_;
  std::vector<T*> linears_, activations_;
  Buffer<T> values_;
  EdgeMlpScratch<T> scratch_;
};

// Calls body(tile, scratch) for all tiles, in parallel.
template <typename T, typename Body>
void for_each_tile(const EdgeMlp<T>& mlp, const Body& body) {
  torch::stable::parallel_for(0, mlp.tiles(), 4, [&](int64_t begin, int64_t end) {
    const TileMemory<T> memory(mlp, false);
    for (int64_t tile = begin; tile < end; ++tile) body(tile, memory.scratch());
  });
}

// p, q (R, width) in a compute dtype, points (R, K) rows of q or -1 -> the maximum over the edges (R, O), and
// its place (R, O), of zero size unless kept.
std::tuple<Tensor, Tensor> edge_layers_cpu(const Tensor& p, const Tensor& q, const Tensor& points,
                                           const std::vector<Tensor>& weights,
                                           const std::vector<Tensor>& scales,
                                           const std::vector<Tensor>& shifts, double negative_slope,
                                           bool keep_slots) {
  const int64_t rows = p.size(0), channels = weights.empty() ? p.size(1) : weights.back().size(0);
  Tensor output = torch::stable::new_zeros(p, {rows, channels});
  Tensor slots = torch::stable::new_empty(p, {keep_slots ? rows : 0, channels}, ScalarType::Int);
  torch::stable::fill_(slots, -1);
  dispatch_compute(p.scalar_type(), "edge_mlp", [&](auto zero) {
    using T = decltype(zero);
    const EdgeMlp<T> mlp(p, q, points, weights, scales, shifts, negative_slope);
    for_each_tile(mlp, [&](int64_t tile, const EdgeMlpScratch<T>& scratch) {
      AVATAR_ISA_CALL(edge_mlp_forward, mlp.args(), mlp.begin(tile), mlp.end(tile), scratch,
                      mutable_data<T>(output), keep_slots ? mutable_data<int32_t>(slots) : nullptr);
    });
  });
  return {output, slots};
}

// Mean and biased variance of the last linear layer over all edges, and their number.
std::tuple<Tensor, Tensor, Tensor> edge_layers_statistics_cpu(
    const Tensor& p, const Tensor& q, const Tensor& points, const std::vector<Tensor>& weights,
    const std::vector<Tensor>& scales, const std::vector<Tensor>& shifts, double negative_slope) {
  const int64_t channels = weights.empty() ? p.size(1) : weights.back().size(0);
  Tensor mean = torch::stable::new_empty(p, {channels}), variance = torch::stable::new_empty(p, {channels});
  Tensor count = torch::stable::new_empty(p, {}, ScalarType::Long);
  dispatch_compute(p.scalar_type(), "edge_mlp_statistics", [&](auto zero) {
    using T = decltype(zero);
    const EdgeMlp<T> mlp(p, q, points, weights, scales, shifts, negative_slope);
    const int64_t stride = mlp.last().stride;
    std::vector<T> means(mlp.tiles() * stride), squares(mlp.tiles() * stride);
    std::vector<int64_t> counts(mlp.tiles());
    for_each_tile(mlp, [&](int64_t tile, const EdgeMlpScratch<T>& scratch) {
      counts[tile] = AVATAR_ISA_CALL(edge_mlp_statistics, mlp.args(), mlp.begin(tile), mlp.end(tile), scratch,
                                     means.data() + tile * stride, squares.data() + tile * stride);
    });
    // Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances,
    // 1979.
    std::vector<double> means_so_far(channels, 0), squares_so_far(channels, 0);
    int64_t edges = 0;
    for (int64_t tile = 0; tile < mlp.tiles(); ++tile) {
      if (counts[tile] == 0) continue;
      const double share = double(counts[tile]) / double(edges + counts[tile]);
      for (int64_t c = 0; c < channels; ++c) {
        const double step = means[tile * stride + c] - means_so_far[c];
        means_so_far[c] += step * share;
        squares_so_far[c] += squares[tile * stride + c] + step * step * (double(edges) * share);
      }
      edges += counts[tile];
    }
    for (int64_t c = 0; c < channels; ++c) {
      mutable_data<T>(mean)[c] = static_cast<T>(means_so_far[c]);
      mutable_data<T>(variance)[c] = static_cast<T>(squares_so_far[c] / double(std::max<int64_t>(edges, 1)));
    }
    *mutable_data<int64_t>(count) = edges;
  });
  return {mean, variance, count};
}

// Adds minus the gradients of the edges of rows [begin, end) to the points that they lead to.
template <typename T>
void scatter(const EdgeMlpArgs<T>& args, int64_t begin, int64_t end, const T* edges, int64_t points,
             T* grad_q) {
  const int64_t width = args.layers[0].width, stride = args.layers[0].stride;
  const int64_t threads = torch::stable::get_num_threads();
  // Whoever owns a range of points takes their edges in order.
  parallel_tasks(threads, [&](int64_t task) {
    const int64_t low = points * task / threads, high = points * (task + 1) / threads;
    const T* grad = edges;
    for (int64_t i = begin * args.k; i < end * args.k; ++i) {
      const int64_t point = args.points[i];
      if (point < 0) continue;
      if (point >= low && point < high) {
        T* target = grad_q + point * width;
        for (int64_t c = 0; c < width; ++c) target[c] -= grad[c];
      }
      grad += stride;
    }
  });
}

// Gradients in p and q, and, laid out one after the other for each layer, in its weight (none for the first),
// scale and shift (none where it is left linear). The gradient of the last layer is that of its activation's
// maximum with `grad` and `slots`, else `constant` + `factor` times the layer on every edge.
std::tuple<Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>>
edge_layers_backward_cpu(const std::optional<Tensor>& grad, const std::optional<Tensor>& slots,
                         const std::optional<Tensor>& constant, const std::optional<Tensor>& factor,
                         const Tensor& p, const Tensor& q, const Tensor& points,
                         const std::vector<Tensor>& weights, const std::vector<Tensor>& scales,
                         const std::vector<Tensor>& shifts, double negative_slope) {
  Tensor grad_p = torch::stable::new_zeros(p, {p.size(0), p.size(1)});
  Tensor grad_q = torch::stable::new_zeros(q, {q.size(0), q.size(1)});
  std::vector<Tensor> grad_weights, grad_scales, grad_shifts;
  dispatch_compute(p.scalar_type(), "edge_mlp_backward", [&](auto zero) {
    using T = decltype(zero);
    const EdgeMlp<T> mlp(p, q, points, weights, scales, shifts, negative_slope);
    const EdgeMlpArgs<T>& args = mlp.args();
    std::vector<T> constants, factors;
    EdgeMlpSeed<T> seed{nullptr, nullptr, nullptr, nullptr};
    if (slots) {
      seed.grad = const_data<T>(*grad);
      seed.slots = const_data<int32_t>(*slots);
    } else {
      constants = padded_rows<T>(*constant, mlp.last().stride);
      factors = padded_rows<T>(*factor, mlp.last().stride);
      seed.constant = constants.data();
      seed.factor = factors.data();
    }
    const int64_t size = mlp.gradient_size(), tile_size = mlp.tile_edges() * args.layers[0].stride;
    // Together they take no more memory than p and q.
    const int64_t parts =
        std::clamp<int64_t>((p.numel() + q.numel()) / std::max<int64_t>(size, 1), 1, kParts);
    std::vector<T> sums(parts * size, 0);
    const int64_t round_tiles = std::min(kRoundTiles, mlp.tiles());
    Buffer<T> round = buffer<T>(round_tiles * tile_size);
    std::vector<int64_t> counts(round_tiles);
    for (int64_t first = 0; first < mlp.tiles(); first += kRoundTiles) {
      const int64_t tiles = std::min(kRoundTiles, mlp.tiles() - first);
      parallel_tasks(parts, [&](int64_t part) {
        const int64_t from = tiles * part / parts, to = tiles * (part + 1) / parts;
        if (from == to) return;
        const TileMemory<T> memory(mlp, true);
        std::vector<T*> of_weights(args.count), of_scales(args.count), of_shifts(args.count);
        T* next = sums.data() + part * size;
        for (int64_t l = 0; l < args.count; ++l) {
          of_weights[l] = std::exchange(next, next + mlp.weight_size(l));
          of_scales[l] = std::exchange(next, next + args.layers[l].stride);
          of_shifts[l] = std::exchange(next, next + args.layers[l].stride);
        }
        const EdgeMlpGradients<T> gradients{of_weights.data(), of_scales.data(), of_shifts.data()};
        for (int64_t tile = from; tile < to; ++tile) {
          counts[tile] = AVATAR_ISA_CALL(edge_mlp_backward, args, mlp.begin(first + tile),
                                         mlp.end(first + tile), memory.scratch(), seed, gradients,
                                         round.get() + tile * tile_size, mutable_data<T>(grad_p));
        }
      });
      // The edges of all tiles, without gaps.
      int64_t place = counts[0] * args.layers[0].stride;
      for (int64_t tile = 1; tile < tiles; ++tile) {
        const int64_t length = counts[tile] * args.layers[0].stride;
        if (place != tile * tile_size) {
          std::copy_n(round.get() + tile * tile_size, length, round.get() + place);
        }
        place += length;
      }
      scatter(args, mlp.begin(first), mlp.end(first + tiles - 1), round.get(), q.size(0),
              mutable_data<T>(grad_q));
    }
    std::vector<double> totals(size, 0);
    for (int64_t part = 0; part < parts; ++part) {
      for (int64_t i = 0; i < size; ++i) totals[i] += sums[part * size + i];
    }
    const double* next = totals.data();
    const auto take = [&](int64_t rows, int64_t columns, int64_t stride, std::vector<int64_t> shape) {
      Tensor result = torch::stable::new_empty(p, {shape.data(), shape.size()});
      for (int64_t row = 0; row < rows; ++row) {
        std::copy_n(next + row * stride, columns, mutable_data<T>(result) + row * columns);
      }
      next += rows * stride;
      return result;
    };
    for (int64_t l = 0; l < args.count; ++l) {
      const EdgeMlpLayer<T>& layer = args.layers[l];
      if (l) {
        const EdgeMlpLayer<T>& before = args.layers[l - 1];
        grad_weights.push_back(take(layer.width, before.width, before.stride, {layer.width, before.width}));
      }
      const Tensor of_scale = take(1, layer.width, layer.stride, {layer.width});
      const Tensor of_shift = take(1, layer.width, layer.stride, {layer.width});
      if (layer.scale == nullptr) continue;
      grad_scales.push_back(of_scale);
      grad_shifts.push_back(of_shift);
    }
  });
  return {grad_p, grad_q, grad_weights, grad_scales, grad_shifts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avatar_ops, CPU, m) {
  m.impl("edge_layers", TORCH_BOX(&edge_layers_cpu));
  m.impl("edge_layers_statistics", TORCH_BOX(&edge_layers_statistics_cpu));
  m.impl("edge_layers_backward", TORCH_BOX(&edge_layers_backward_cpu));
}

}  // namespace avatar
