#include "edge_mlp/edge_mlp_simd.h"

#include <algorithm>

#include "common/matrix_simd.h"
#include "common/vector.h"

namespace avatar {
namespace AVATAR_ISA {
namespace {

template <typename T>
Vector<T> splat(T value) {
  return value - Vector<T>{};
}

// The edges of a few rows with all their layers.
template <typename T>
class Tile {
 public:
  Tile(const EdgeMlpArgs<T>& args, int64_t begin, int64_t end, const EdgeMlpScratch<T>& scratch)
      : args_(args), begin_(begin), end_(end), scratch_(scratch) {
    const EdgeMlpLayer<T>& first = args.layers[0];
    for (int64_t row = begin; row < end; ++row) {
      const T* p = args.p + row * first.width;
      for (int64_t slot = 0; slot < args.k; ++slot) {
        const int64_t point = args.points[row * args.k + slot];
        if (point < 0) continue;
        scratch.rows[edges_] = row - begin;
        scratch.slots[edges_] = static_cast<int32_t>(slot);
        const T* q = args.q + point * first.width;
        T* linear = scratch.linears[0] + edges_++ * first.stride;
        int64_t c = 0;
        for (; c + kLanes <= first.width; c += kLanes) store(linear + c, load(p + c) - load(q + c));
        for (; c < first.stride; ++c) linear[c] = c < first.width ? p[c] - q[c] : T(0);
      }
    }
  }

  int64_t edges() const { return edges_; }

  void activate(int64_t l) const {
    const EdgeMlpLayer<T>& layer = args_.layers[l];
    const Vector<T> slope = splat(args_.negative_slope);
    for (int64_t e = 0; e < edges_; ++e) {
      const T* linear = scratch_.linears[l] + e * layer.stride;
      T* activation = scratch_.activations[l] + e * layer.stride;
      for (int64_t c = 0; c < layer.stride; c += kLanes) {
        const Vector<T> value = load(linear + c) * load(layer.scale + c) + load(layer.shift + c);
        store(activation + c, value > T(0) ? value : value * slope);
      }
    }
  }

  void multiply(int64_t l) const {
    const EdgeMlpLayer<T>& layer = args_.layers[l];
    const int64_t inner = args_.layers[l - 1].stride;
    matrix_product(MatrixProduct<T>{scratch_.activations[l - 1], inner, 1, layer.transposed, layer.stride,
                                    scratch_.linears[l], layer.stride, edges_, args_.layers[l - 1].width,
                                    layer.stride, false});
  }

  // All layers up to linear layer `last`.
  void run(int64_t last) const {
    for (int64_t l = 0; l < last; ++l) {
      activate(l);
      multiply(l + 1);
    }
  }

  void maximum(T* output, int32_t* slots) const {
    const int64_t last = args_.count - 1, width = args_.layers[last].width,
                  stride = args_.layers[last].stride;
    int64_t e = 0;
    for (int64_t row = begin_; row < end_; ++row) {
      T* values = output + row * width;
      int32_t* places = slots == nullptr ? nullptr : slots + row * width;
      if (e == edges_ || scratch_.rows[e] != row - begin_) {
        std::fill_n(values, width, T(0));
        if (places) std::fill_n(places, width, -1);
        continue;
      }
      const int64_t first = e;
      while (e < edges_ && scratch_.rows[e] == row - begin_) ++e;
      for (int64_t c = 0; c < stride; c += kLanes) {
        const T* column = scratch_.activations[last] + c;
        Vector<T> best = load(column + first * stride);
        Index<T> place = scratch_.slots[first] - Index<T>{};
        for (int64_t i = first + 1; i < e; ++i) {
          const Vector<T> value = load(column + i * stride);
          const Index<T> better = (value > best) | ((value != value) & (best == best));
          best = better ? value : best;
          place = better ? scratch_.slots[i] - Index<T>{} : place;
        }
        store_some(values + c, best, width - c);
        for (int64_t lane = 0; places && lane < std::min<int64_t>(kLanes, width - c); ++lane) {
          places[c + lane] = static_cast<int32_t>(place[lane]);
        }
      }
    }
  }

  void moments(T* mean, T* squares) const {
    const int64_t last = args_.count - 1, stride = args_.layers[last].stride;
    const Vector<T> edges = splat(static_cast<T>(std::max<int64_t>(edges_, 1)));
    for (int64_t c = 0; c < stride; c += kColumnPad) {
      const T* columns = scratch_.linears[last] + c;
      Vector<T> centers[kPanel] = {}, sums[kPanel] = {};
      for (int64_t e = 0; e < edges_; ++e) {
        for (int v = 0; v < kPanel; ++v) centers[v] += load(columns + e * stride + v * kLanes);
      }
      for (int v = 0; v < kPanel; ++v) centers[v] /= edges;
      for (int64_t e = 0; e < edges_; ++e) {
        for (int v = 0; v < kPanel; ++v) {
          const Vector<T> deviation = load(columns + e * stride + v * kLanes) - centers[v];
          sums[v] += deviation * deviation;
        }
      }
      for (int v = 0; v < kPanel; ++v) {
        store(mean + c + v * kLanes, centers[v]);
        store(squares + c + v * kLanes, sums[v]);
      }
    }
  }

  // Turns the gradient of layer l's activation into that of the linear layer.
  void through_activation(int64_t l, T* grad, const EdgeMlpGradients<T>& gradients) const {
    const EdgeMlpLayer<T>& layer = args_.layers[l];
    const Vector<T> slope = splat(args_.negative_slope);
    for (int64_t c = 0; c < layer.stride; c += kColumnPad) {
      Vector<T> of_scale[kPanel] = {}, of_shift[kPanel] = {}, scale[kPanel];
      for (int v = 0; v < kPanel; ++v) scale[v] = load(layer.scale + c + v * kLanes);
      for (int64_t e = 0; e < edges_; ++e) {
        for (int v = 0; v < kPanel; ++v) {
          const int64_t at = e * layer.stride + c + v * kLanes;
          const Vector<T> value = load(grad + at);
          const Vector<T> through = load(scratch_.activations[l] + at) > T(0) ? value : value * slope;
          of_scale[v] += through * load(scratch_.linears[l] + at);
          of_shift[v] += through;
          store(grad + at, through * scale[v]);
        }
      }
      for (int v = 0; v < kPanel; ++v) {
        T* scales = gradients.scales[l] + c + v * kLanes;
        T* shifts = gradients.shifts[l] + c + v * kLanes;
        store(scales, load(scales) + of_scale[v]);
        store(shifts, load(shifts) + of_shift[v]);
      }
    }
  }

  // From the gradient of linear layer l, its weight's and that of the activation before.
  void through_product(int64_t l, const T* grad, T* before, const EdgeMlpGradients<T>& gradients) const {
    const EdgeMlpLayer<T>& layer = args_.layers[l];
    const int64_t inner = args_.layers[l - 1].stride;
    matrix_product(MatrixProduct<T>{grad, 1, layer.stride, scratch_.activations[l - 1], inner,
                                    gradients.weights[l], inner, layer.width, edges_, inner, true});
    matrix_product(MatrixProduct<T>{grad, layer.stride, 1, layer.weight, inner, before, inner, edges_,
                                    layer.width, inner, false});
  }

  // Dense gradients of the last linear layer.
  void seed_statistics(const EdgeMlpSeed<T>& seed, T* grad) const {
    const int64_t last = args_.count - 1, stride = args_.layers[last].stride;
    for (int64_t e = 0; e < edges_; ++e) {
      const T* linear = scratch_.linears[last] + e * stride;
      for (int64_t c = 0; c < stride; c += kLanes) {
        store(grad + e * stride + c, load(seed.constant + c) + load(seed.factor + c) * load(linear + c));
      }
    }
  }

  // The gradient of a maximum concerns one edge per row and channel. Calls take(edge, channel, gradient of
  // the activation) for each.
  template <typename Take>
  void each_maximum(const EdgeMlpSeed<T>& seed, const Take& take) const {
    const int64_t width = args_.layers[args_.count - 1].width;
    for (int64_t e = 0; e < edges_;) {
      const int64_t first = e, row = begin_ + scratch_.rows[e];
      while (e < edges_ && begin_ + scratch_.rows[e] == row) ++e;
      const bool complete = e - first == args_.k;
      for (int64_t c = 0; c < width; ++c) {
        const int32_t slot = seed.slots[row * width + c];
        if (slot < 0) continue;
        int64_t edge = first + slot;
        if (!complete)
          edge = std::lower_bound(scratch_.slots + first, scratch_.slots + e, slot) - scratch_.slots;
        if (edge < e) take(edge, c, seed.grad[row * width + c]);
      }
    }
  }

  // Gradient of the first linear layer where it is the only one.
  void seed_single(const EdgeMlpSeed<T>& seed, T* grad, const EdgeMlpGradients<T>& gradients) const {
    const EdgeMlpLayer<T>& layer = args_.layers[0];
    std::fill_n(grad, edges_ * layer.stride, T(0));
    each_maximum(seed, [&](int64_t edge, int64_t c, T value) {
      const T linear = scratch_.linears[0][edge * layer.stride + c];
      grad[edge * layer.stride + c] = through(layer, 0, c, linear, value, gradients);
    });
  }

  // The same through the last product, of which it needs only what the maxima were.
  void seed_product(const EdgeMlpSeed<T>& seed, T* before, const EdgeMlpGradients<T>& gradients) const {
    const int64_t last = args_.count - 1, inner = args_.layers[last - 1].stride;
    const EdgeMlpLayer<T>& layer = args_.layers[last];
    std::fill_n(before, edges_ * inner, T(0));
    each_maximum(seed, [&](int64_t edge, int64_t c, T value) {
      const T* input = scratch_.activations[last - 1] + edge * inner;
      const T* weight = layer.weight + c * inner;
      Vector<T> sums{};
      for (int64_t i = 0; i < inner; i += kLanes) sums += load(input + i) * load(weight + i);
      T linear = 0;
      for (int64_t lane = 0; lane < kLanes; ++lane) linear += sums[lane];
      const Vector<T> factor = splat(through(layer, last, c, linear, value, gradients));
      T* of_weight = gradients.weights[last] + c * inner;
      T* of_input = before + edge * inner;
      for (int64_t i = 0; i < inner; i += kLanes) {
        store(of_weight + i, load(of_weight + i) + factor * load(input + i));
        store(of_input + i, load(of_input + i) + factor * load(weight + i));
      }
    });
  }

  void sum_rows(const T* grad, T* edges, T* grad_p) const {
    const EdgeMlpLayer<T>& layer = args_.layers[0];
    std::copy_n(grad, edges_ * layer.stride, edges);
    std::fill_n(grad_p + begin_ * layer.width, (end_ - begin_) * layer.width, T(0));
    for (int64_t e = 0; e < edges_; ++e) {
      T* target = grad_p + (begin_ + scratch_.rows[e]) * layer.width;
      for (int64_t c = 0; c < layer.width; ++c) target[c] += grad[e * layer.stride + c];
    }
  }

 private:
  static constexpr int64_t kLanes = Lanes<T>::kCount;
  // Vectors of the columns that are worked on together.
  static constexpr int kPanel = kColumnPad / kLanes;

  T through(const EdgeMlpLayer<T>& layer, int64_t l, int64_t c, T linear, T grad,
            const EdgeMlpGradients<T>& gradients) const {
    const T value = linear * layer.scale[c] + layer.shift[c] > 0 ? grad : grad * args_.negative_slope;
    gradients.scales[l][c] += value * linear;
    gradients.shifts[l][c] += value;
    return value * layer.scale[c];
  }

  const EdgeMlpArgs<T>& args_;
  const int64_t begin_, end_;
  const EdgeMlpScratch<T>& scratch_;
  int64_t edges_ = 0;
};

template <typename T>
int64_t backward(const EdgeMlpArgs<T>& args, int64_t begin, int64_t end, const EdgeMlpScratch<T>& scratch,
                 const EdgeMlpSeed<T>& seed, const EdgeMlpGradients<T>& gradients, T* edges, T* grad_p) {
  const Tile<T> tile(args, begin, end, scratch);
  const int64_t last = args.count - 1;
  T* grad = scratch.gradients[0];
  T* other = scratch.gradients[1];
  // The layer whose activation's gradient is next.
  int64_t l = last - 1;
  if (seed.slots == nullptr) {
    tile.run(last);
    tile.seed_statistics(seed, grad);
    if (last > 0) {
      tile.through_product(last, grad, other, gradients);
      std::swap(grad, other);
    }
  } else if (last == 0) {
    tile.seed_single(seed, grad, gradients);
  } else {
    tile.run(last - 1);
    tile.activate(last - 1);
    tile.seed_product(seed, grad, gradients);
  }
  for (; l >= 0; --l) {
    tile.through_activation(l, grad, gradients);
    if (l == 0) break;
    tile.through_product(l, grad, other, gradients);
    std::swap(grad, other);
  }
  tile.sum_rows(grad, edges, grad_p);
  return tile.edges();
}

template <typename T>
void forward(const EdgeMlpArgs<T>& args, int64_t begin, int64_t end, const EdgeMlpScratch<T>& scratch,
             T* output, int32_t* slots) {
  const Tile<T> tile(args, begin, end, scratch);
  tile.run(args.count - 1);
  tile.activate(args.count - 1);
  tile.maximum(output, slots);
}

template <typename T>
int64_t statistics(const EdgeMlpArgs<T>& args, int64_t begin, int64_t end, const EdgeMlpScratch<T>& scratch,
                   T* mean, T* squares) {
  const Tile<T> tile(args, begin, end, scratch);
  tile.run(args.count - 1);
  tile.moments(mean, squares);
  return tile.edges();
}

}  // namespace

#define AVATAR_DEFINE(T)                                                                  \
  void edge_mlp_forward(const EdgeMlpArgs<T>& args, int64_t begin, int64_t end,           \
                        const EdgeMlpScratch<T>& scratch, T* output, int32_t* slots) {    \
    forward(args, begin, end, scratch, output, slots);                                    \
  }                                                                                       \
  int64_t edge_mlp_statistics(const EdgeMlpArgs<T>& args, int64_t begin, int64_t end,     \
                              const EdgeMlpScratch<T>& scratch, T* mean, T* squares) {    \
    return statistics(args, begin, end, scratch, mean, squares);                          \
  }                                                                                       \
  int64_t edge_mlp_backward(const EdgeMlpArgs<T>& args, int64_t begin, int64_t end,       \
                            const EdgeMlpScratch<T>& scratch, const EdgeMlpSeed<T>& seed, \
                            const EdgeMlpGradients<T>& gradients, T* edges, T* grad_p) {  \
    return backward(args, begin, end, scratch, seed, gradients, edges, grad_p);           \
  }
AVATAR_DEFINE(float)
AVATAR_DEFINE(double)
#undef AVATAR_DEFINE

}  // namespace AVATAR_ISA
}  // namespace avatar
