// The position network on a tile of edges, forward and backward. For *_simd.cpp only.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/position_mlp.h"
#include "common/tile_product.h"

namespace avatar {
namespace AVATAR_ISA {
namespace {

// Edges of a tile: a multiple of kRowBlock for every instruction set.
constexpr int64_t kTileRows = 48;
// Points whose incoming edges are gathered before their gradients are finished: likewise.
constexpr int64_t kPointBlock = 24;

// A tile of edges in segments: consecutive edges of one centre (forward) or into one point (backward).
template <typename T>
class PositionTile {
 public:
  PositionTile(const PositionMlp<T>& mlp, int64_t least_rows)
      : mlp_(mlp),
        capacity_(round_up(std::max(kTileRows, least_rows), kRowBlock)),
        room_(capacity_ + std::max<int64_t>(kRowBlock, kLanes<T>)),
        indices_(6 * room_ + 1),
        code_(room_ * (mlp.code_padded + 1)),
        hidden_(room_ * mlp.hidden_sum) {
    std::fill_n(code_.get(), room_ * mlp.code_padded, T(0));
    if (mlp.depth == 0) std::fill_n(hidden_.get(), room_ * mlp.hidden_sum, T(0));
  }

  int64_t capacity() const { return capacity_; }
  int64_t count() const { return count_; }
  int64_t rows() const { return round_up(count_, kRowBlock); }
  int64_t segments() const { return segments_; }
  int64_t segment_begin(int64_t s) const { return starts()[s]; }
  int64_t segment_end(int64_t s) const { return s + 1 < segments_ ? starts()[s + 1] : count_; }
  int64_t segment_point(int64_t s) const { return points()[s]; }
  const int64_t* centers() const { return indices_.get(); }
  const int64_t* neighbors() const { return indices_.get() + room_; }
  int64_t center(int64_t row) const { return centers()[row]; }
  int64_t neighbor(int64_t row) const { return neighbors()[row]; }
  int64_t edge(int64_t row) const { return indices_.get()[2 * room_ + row]; }
  // p_i - p_j and |p_i - p_j|.
  const T* code(int64_t row) const { return code_.row(row * mlp_.code_padded); }
  const int64_t* next_centers() const { return indices_.get() + 5 * room_ + 1; }

  void clear() { count_ = segments_ = 0; }
  void begin_segment(int64_t point) {
    starts()[segments_] = count_;
    points()[segments_++] = point;
  }
  // For the row that is added next.
  void set_next_center(int64_t center) { indices_.get()[5 * room_ + 1 + count_] = center; }
  void add(int64_t center, int64_t neighbor, int64_t edge) {
    indices_.get()[count_] = center;
    indices_.get()[room_ + count_] = neighbor;
    indices_.get()[2 * room_ + count_++] = edge;
  }
  // The edges of one row, all of whose neighbours count from `base`.
  void add_row(int64_t center, int64_t base, const int64_t* neighbors, int64_t k, int64_t edge) {
    int64_t* target = indices_.row(count_);
    for (int64_t slot = 0; slot < k; ++slot) target[slot] = center;
    for (int64_t slot = 0; slot < k; ++slot) target[room_ + slot] = base + neighbors[slot];
    for (int64_t slot = 0; slot < k; ++slot) target[2 * room_ + slot] = edge + slot;
    count_ += k;
  }
  // Repeats the last edge, so that whole blocks of rows and whole vectors of edges are there.
  void fill_up() {
    for (int64_t row = count_; row < count_ + room_ - capacity_; ++row) {
      indices_.get()[row] = center(count_ - 1);
      indices_.get()[room_ + row] = neighbor(count_ - 1);
      indices_.get()[5 * room_ + 1 + row] = center(count_ - 1);
    }
  }

  // What comes out of layer l; without layers, the code itself.
  T* hidden(int64_t layer) const {
    int64_t offset = 0;
    for (int64_t l = 0; l < layer; ++l) offset += mlp_.layers[l].out;
    return hidden_.row(offset * room_);
  }
  T* output() const { return hidden(std::max<int64_t>(mlp_.depth - 1, 0)); }

  // What the edges are from; without layers, output() as well.
  void start() {
    fill_up();
    geometry();
    if (mlp_.depth == 0) whole_code();
  }

  // hidden(l), from start() or from the layer before.
  void layer(int64_t l) {
    const PositionLayer<T>& layer = mlp_.layers[l];
    T* out = hidden(l);
    const int64_t width = layer.out;
    const auto done = [=, slope = mlp_.slope](int64_t row, int64_t column, Vector<T> sum) {
      store(out + row * width + column, leaky_relu(sum, slope));
    };
    if (l == 0) {
      const auto first = [=, part = mlp_.center_part, centers = centers()](int64_t row, int64_t column) {
        return load(part + centers[row] * width + column);
      };
      product(rows(), mlp_.dims + 1, width, code_.get(), mlp_.code_padded, layer.weight, first, done);
    } else {
      const auto first = [bias = layer.bias](int64_t, int64_t column) { return load(bias + column); };
      product(rows(), layer.in, width, hidden(l - 1), layer.in, layer.weight, first, done);
    }
  }

  void forward() {
    start();
    for (int64_t l = 0; l < mlp_.depth; ++l) layer(l);
  }

  // `gradient` (capacity, widest) holds the gradient of output() in rows of out_padded and is overwritten, as
  // is `other`. Adds weight gradients to `weights`, and what the edges of a segment leave behind for the
  // first layer's bias and neighbour half to `point_sums` (kPointBlock, out of the first layer), at the
  // segment's point. With depth 0 and otherwise where the points want gradients, adds to `point_gradients`
  // (kPointBlock, dims_padded) and fills the edge gradients.
  void backward(T* gradient, T* other, T* weights, T* point_sums, T* point_gradients,
                T* edge_gradient) const {
    if (mlp_.depth == 0) return code_backward(gradient, point_gradients, edge_gradient);
    for (int64_t l = mlp_.depth - 1; l >= 0; --l) {
      const PositionLayer<T>& layer = mlp_.layers[l];
      const T* out = hidden(l);
      for (int64_t i = 0; i < rows() * layer.out; i += kLanes<T>) {
        const Vector<T> g = load(gradient + i);
        store(gradient + i, load(out + i) > T(0) ? g : g * mlp_.slope);
      }
      const T* in = l == 0 ? code_.get() : hidden(l - 1);
      add_outer(count_, gradient, layer.out, layer.out, in, layer.in, layer.in, weights + layer.gradient,
                layer.in);
      if (l == 0) {
        for (int64_t s = 0; s < segments_; ++s) {
          add_rows(segment_end(s) - segment_begin(s), gradient + segment_begin(s) * layer.out, layer.out,
                   layer.out, point_sums + segment_point(s) * layer.out);
        }
        if (!edge_gradient) return;
      } else {
        add_rows(count_, gradient, layer.out, layer.out, weights + layer.bias_gradient);
      }
      const int64_t width = layer.in;
      product(
          rows(), layer.out, width, gradient, layer.out, layer.transposed,
          [](int64_t, int64_t) { return Vector<T>{}; },
          [=](int64_t row, int64_t column, Vector<T> sum) { store(other + row * width + column, sum); });
      std::swap(gradient, other);
    }
    const int64_t width = mlp_.code_padded;
    geometry_backward(
        gradient + mlp_.dims, width, point_gradients, edge_gradient,
        [=](int64_t row, int64_t d) { return gradient[row * width + d]; },
        [](int64_t, int64_t) { return T(0); });
  }

 private:
  int64_t* starts() const { return indices_.row(3 * room_); }
  int64_t* points() const { return indices_.row(4 * room_); }

  void geometry() {
    const int64_t dims = mlp_.dims, width = mlp_.code_padded;
    T* squared = code_.row(room_ * width);
    if (dims == 3) {
      typedef T Quad __attribute__((vector_size(4 * sizeof(T)), aligned(sizeof(T)), may_alias));
      for (int64_t row = 0; row < rows(); ++row) {
        const Quad difference = *reinterpret_cast<const Quad*>(mlp_.points + 4 * center(row)) -
                                *reinterpret_cast<const Quad*>(mlp_.points + 4 * neighbor(row));
        *reinterpret_cast<Quad*>(code_.get() + row * width) = difference;
        const Quad squares = difference * difference;
        squared[row] = squares[0] + squares[1] + squares[2];
      }
    }
    for (int64_t row = 0; dims != 3 && row < rows(); ++row) {
      const T* p = mlp_.points + center(row) * mlp_.point_stride;
      const T* q = mlp_.points + neighbor(row) * mlp_.point_stride;
      T sum = 0;
      for (int64_t d = 0; d < dims; ++d) {
        const T difference = p[d] - q[d];
        code_.get()[row * width + d] = difference;
        sum += difference * difference;
      }
      squared[row] = sum;
    }
    for (int64_t row = 0; row < rows(); ++row) squared[row] = std::sqrt(squared[row]);
    for (int64_t row = 0; row < rows(); ++row) code_.get()[row * width + dims] = squared[row];
  }

  void whole_code() {
    const int64_t dims = mlp_.dims, width = mlp_.out_padded;
    for (int64_t row = 0; row < rows(); ++row) {
      T* code = hidden_.row(row * width);
      std::copy_n(mlp_.points + center(row) * mlp_.point_stride, dims, code);
      std::copy_n(mlp_.points + neighbor(row) * mlp_.point_stride, dims, code + dims);
      std::copy_n(code_.row(row * mlp_.code_padded), dims + 1, code + 2 * dims);
    }
  }

  void code_backward(const T* gradient, T* point_gradients, T* edge_gradient) const {
    const int64_t dims = mlp_.dims, width = mlp_.out_padded;
    geometry_backward(
        gradient + 3 * dims, width, point_gradients, edge_gradient,
        [=](int64_t row, int64_t d) {
          return gradient[row * width + d] + gradient[row * width + 2 * dims + d];
        },
        [=](int64_t row, int64_t d) {
          return gradient[row * width + dims + d] - gradient[row * width + 2 * dims + d];
        });
  }

  // `distance` is the gradient of the distance of row 0; its direction adds to `center` and `neighbor`.
  template <typename Center, typename Neighbor>
  void geometry_backward(const T* distance, int64_t stride, T* point_gradients, T* edge_gradient,
                         const Center& to_center, const Neighbor& to_neighbor) const {
    const int64_t dims = mlp_.dims;
    for (int64_t s = 0; s < segments_; ++s) {
      T* sum = point_gradients + segment_point(s) * mlp_.dims_padded;
      for (int64_t row = segment_begin(s); row < segment_end(s); ++row) {
        const T* code = code_.row(row * mlp_.code_padded);
        const T factor = code[dims] > T(0) ? distance[row * stride] / code[dims] : T(0);
        for (int64_t d = 0; d < dims; ++d) {
          edge_gradient[edge(row) * dims + d] = to_center(row, d) + factor * code[d];
          sum[d] += to_neighbor(row, d) - factor * code[d];
        }
      }
    }
  }

  const PositionMlp<T>& mlp_;
  // Tiles may be read in parts whose rows are filled up to kRowBlock.
  const int64_t capacity_, room_;
  int64_t count_ = 0, segments_ = 0;
  Scratch<int64_t> indices_;
  Scratch<T> code_, hidden_;
};

// What walk_rows calls `distance` rows before it comes to a row, to fetch what that will need.
template <typename Row>
struct Ahead {
  int64_t distance;
  Row row;
};

// With point(p) for every neighbour p of the row that is to come.
template <typename Point>
inline auto neighbors_ahead(const int64_t* neighbors, int64_t k, int64_t cloud, const Point& point) {
  const auto row = [=](int64_t row) {
    const int64_t base = row / cloud * cloud;
    for (int64_t edge = row * k; edge < (row + 1) * k; ++edge) {
      if (static_cast<uint64_t>(neighbors[edge]) < static_cast<uint64_t>(cloud))
        point(base + neighbors[edge]);
    }
  };
  return Ahead<decltype(row)>{std::max<int64_t>(1, kTileRows / std::max<int64_t>(k, 1)), row};
}

// Fills tiles with the edges of rows order[begin], ..., order[end - 1] (begin, ... without an order), whole
// rows and at most `most_rows` of them, and calls body() for each. neighbors (rows, k) of clouds of `cloud`
// rows each. Returns the flat position of the first neighbour out of range, or -1.
template <typename T, typename Row, typename Body>
inline int64_t walk_rows(PositionTile<T>& tile, const int64_t* neighbors, int64_t k, int64_t cloud,
                         const int64_t* order, int64_t begin, int64_t end, int64_t most_rows,
                         const Ahead<Row>& ahead, const Body& body) {
  const auto is_inside = [=](int64_t neighbor) {
    return static_cast<uint64_t>(neighbor) < static_cast<uint64_t>(cloud);
  };
  for (int64_t place = begin; place < end;) {
    tile.clear();
    const int64_t first = place;
    for (; place < end && place - first < most_rows && tile.count() + k <= tile.capacity(); ++place) {
      const int64_t row = order ? order[place] : place, base = row / cloud * cloud;
      tile.begin_segment(row);
      if (const int64_t next = place + ahead.distance; next < end) ahead.row(order ? order[next] : next);
      uint64_t outside = 0;
      for (int64_t edge = row * k; edge < (row + 1) * k; ++edge) outside |= !is_inside(neighbors[edge]);
      if (!outside) {
        tile.add_row(row, base, neighbors + row * k, k, row * k);
        continue;
      }
      for (int64_t edge = row * k; edge < (row + 1) * k; ++edge) {
        if (neighbors[edge] == -1) continue;
        if (!is_inside(neighbors[edge])) return edge;
        tile.add(row, base + neighbors[edge], edge);
      }
    }
    body();
  }
  return -1;
}

// Fills tiles with the edges into points [first, first + count), count at most kPointBlock, and calls body()
// for each; segments name points relative to `first`. Meanwhile tile.next_center(row) is the centre of the
// edge that comes a tile later, for `body` to fetch what it will need.
template <typename T, typename Body>
inline void walk_incoming(PositionTile<T>& tile, const IncomingEdges<T>& incoming, int64_t first,
                          int64_t count, const Body& body) {
  // Exact up to 2^50 edges, and cheaper than a division.
  const double share = 1. / static_cast<double>(incoming.k);
  const auto center = [&](int64_t e) {
    const double edge = static_cast<double>(incoming.edges[e]);
    return incoming.first_row + static_cast<int64_t>((edge + 0.5) * share);
  };
  tile.clear();
  for (int64_t p = 0; p < count; ++p) {
    const int64_t* offset = incoming.offsets + first - incoming.first_point + p;
    if (offset[0] == offset[1]) continue;
    if (tile.count() < tile.capacity()) tile.begin_segment(p);
    for (int64_t e = offset[0]; e < offset[1]; ++e) {
      if (tile.count() == tile.capacity()) {
        body();
        tile.clear();
        tile.begin_segment(p);
      }
      tile.set_next_center(center(std::min(e + tile.capacity(), incoming.count - 1)));
      tile.add(center(e), first + p, incoming.edges[e]);
    }
  }
  if (tile.count() > 0) body();
}

// Gradients of one block of points, kept until all edges into them are done.
template <typename T>
class PointBlock {
 public:
  explicit PointBlock(const PositionMlp<T>& mlp)
      : mlp_(mlp),
        width_(mlp.depth ? mlp.layers[0].out : 0),
        sums_(kPointBlock * width_),
        points_(kPointBlock * mlp.dims_padded),
        gradients_(kPointBlock * mlp.dims_padded) {
    std::fill_n(points_.get(), kPointBlock * mlp.dims_padded, T(0));
  }
  T* sums() const { return sums_.get(); }
  T* gradients() const { return gradients_.get(); }

  void begin() {
    std::fill_n(sums_.get(), kPointBlock * width_, T(0));
    std::fill_n(gradients_.get(), kPointBlock * mlp_.dims_padded, T(0));
  }

  // Adds the block's share to the weight gradients and to the points' gradients, where wanted.
  void finish(const IncomingEdges<T>& incoming, int64_t first, int64_t count, T* weights) {
    const int64_t dims = mlp_.dims, dims_padded = mlp_.dims_padded;
    if (mlp_.depth > 0) {
      // Points that no edge leads to stay out, whatever they hold.
      const int64_t* offsets = incoming.offsets + first - incoming.first_point;
      for (int64_t p = 0; p < count; ++p) {
        const bool any = offsets[p] < offsets[p + 1];
        for (int64_t d = 0; d < dims; ++d) {
          points_.get()[p * dims_padded + d] = any ? mlp_.points[(first + p) * mlp_.point_stride + d] : T(0);
        }
      }
      add_rows(count, sums_.get(), width_, width_, weights + mlp_.layers[0].bias_gradient);
      add_outer(count, sums_.get(), width_, width_, points_.get(), dims_padded, dims_padded,
                weights + mlp_.neighbor_gradient, dims_padded);
    }
    if (!incoming.grad_points) return;
    T* gradients = gradients_.get();
    if (mlp_.depth > 0) {
      product(
          round_up(count, kRowBlock), width_, dims_padded, sums_.get(), width_, mlp_.to_neighbor,
          [=](int64_t row, int64_t column) { return load(gradients + row * dims_padded + column); },
          [=](int64_t row, int64_t column, Vector<T> sum) {
            store(gradients + row * dims_padded + column, sum);
          });
    }
    for (int64_t p = 0; p < count; ++p) {
      for (int64_t d = 0; d < dims; ++d) {
        incoming.grad_points[(first + p) * dims + d] += gradients[p * dims_padded + d];
      }
    }
  }

 private:
  const PositionMlp<T>& mlp_;
  const int64_t width_;
  Scratch<T> sums_, points_, gradients_;
};

}  // namespace
}  // namespace AVATAR_ISA
}  // namespace avatar
