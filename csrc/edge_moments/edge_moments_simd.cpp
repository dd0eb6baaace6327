#include "edge_moments/edge_moments_simd.h"

#include <algorithm>

#include "common/position_tile.h"

namespace avatar {
namespace AVATAR_ISA {
namespace {

// Tiles whose deviations from one centre are summed in the compute dtype before they go into float64.
constexpr int64_t kTilesPerMerge = 8;

// Chan, Golub and LeVeque, Algorithms for computing the sample variance, 1983.
void merge(const EdgeMoments& part, int64_t width, EdgeMoments& total) {
  if (part.count == 0) return;
  const double count = total.count + part.count;
  const double share = part.count / count, factor = total.count * share;
  Scratch<double> shift(width);
  for (int64_t i = 0; i < width; ++i) shift.get()[i] = part.mean[i] - total.mean[i];
  for (int64_t i = 0; i < width; ++i) {
    const double scaled = shift.get()[i] * factor;
    for (int64_t j = 0; j < width; ++j) {
      total.scatter[i * width + j] += part.scatter[i * width + j] + scaled * shift.get()[j];
    }
    total.mean[i] += shift.get()[i] * share;
  }
  total.count = count;
}

// Sums over a few tiles, about a centre close to their mean.
template <typename T>
class Deviations {
 public:
  explicit Deviations(int64_t width)
      : width_(width),
        center_(width),
        sum_(width),
        outer_(width * width),
        mean_(width),
        scatter_(width * width) {
    clear();
  }

  // `rows` are overwritten by their deviations.
  void add(T* rows, int64_t count) {
    if (count_ == 0) {
      std::fill_n(center_.get(), width_, T(0));
      add_rows(count, rows, width_, width_, center_.get());
      for (int64_t i = 0; i < width_; ++i) center_.get()[i] /= static_cast<T>(count);
    }
    for (int64_t e = 0; e < count; ++e) {
      for (int64_t i = 0; i < width_; ++i) rows[e * width_ + i] -= center_.get()[i];
    }
    add_rows(count, rows, width_, width_, sum_.get());
    add_outer(count, rows, width_, width_, rows, width_, width_, outer_.get(), width_);
    count_ += count;
    ++tiles_;
  }
  bool full() const { return tiles_ == kTilesPerMerge; }

  void flush(EdgeMoments& total) {
    if (count_ == 0) return;
    const double count = static_cast<double>(count_);
    for (int64_t i = 0; i < width_; ++i) {
      const double own = sum_.get()[i];
      mean_.get()[i] = center_.get()[i] + own / count;
      for (int64_t j = 0; j < width_; ++j) {
        scatter_.get()[i * width_ + j] = outer_.get()[i * width_ + j] - own * sum_.get()[j] / count;
      }
    }
    merge({count, mean_.get(), scatter_.get()}, width_, total);
    clear();
  }

 private:
  void clear() {
    count_ = tiles_ = 0;
    std::fill_n(sum_.get(), width_, T(0));
    std::fill_n(outer_.get(), width_ * width_, T(0));
  }

  const int64_t width_;
  int64_t count_ = 0, tiles_ = 0;
  Scratch<T> center_, sum_, outer_;
  Scratch<double> mean_, scatter_;
};

template <typename T>
int64_t moments_rows(const EdgeMomentsArgs<T>& args, int64_t begin, int64_t end, EdgeMoments& moments) {
  PositionTile<T> tile(args.position, args.k);
  Deviations<T> deviations(args.position.out_padded);
  const auto ahead = neighbors_ahead(args.neighbors, args.k, args.cloud, [&args](int64_t point) {
    fetch(args.position.points + point * args.position.point_stride, args.position.point_stride);
  });
  const int64_t bad =
      walk_rows(tile, args.neighbors, args.k, args.cloud, nullptr, begin, end, tile.capacity(), ahead, [&] {
        if (tile.count() == 0) return;
        tile.forward();
        deviations.add(tile.output(), tile.count());
        if (deviations.full()) deviations.flush(moments);
      });
  deviations.flush(moments);
  return bad;
}

template <typename T>
void moments_backward_points(const EdgeMomentsBackwardArgs<T>& args, int64_t begin, int64_t end, T* weights) {
  const PositionMlp<T>& mlp = args.position;
  const int64_t width = mlp.out_padded;
  PositionTile<T> tile(mlp, 0);
  PointBlock<T> block(mlp);
  Scratch<T> gradient(tile.capacity() * mlp.widest), other(tile.capacity() * mlp.widest);
  for (int64_t first = begin; first < end; first += kPointBlock) {
    const int64_t count = std::min(kPointBlock, end - first);
    block.begin();
    walk_incoming(tile, args.incoming, first, count, [&] {
      tile.forward();
      const T* out = tile.output();
      for (int64_t row = 0; row < tile.rows(); ++row) {
        for (int64_t i = 0; i < width; ++i)
          other.get()[row * width + i] = out[row * width + i] - args.mean[i];
      }
      product(
          tile.rows(), width, width, other.get(), width, args.slope,
          [&](int64_t, int64_t c) { return load(args.constant + c); },
          [&](int64_t row, int64_t c, Vector<T> sum) { store(gradient.get() + row * width + c, sum); });
      tile.backward(gradient.get(), other.get(), weights, block.sums(), block.gradients(),
                    args.incoming.edge_gradient);
    });
    block.finish(args.incoming, first, count, weights);
  }
}

}  // namespace

void merge_edge_moments(const EdgeMoments& part, int64_t width, EdgeMoments& total) {
  merge(part, width, total);
}
#define AVATAR_DEFINE(T)                                                                                \
  int64_t edge_moments_rows(const EdgeMomentsArgs<T>& args, int64_t begin, int64_t end,                 \
                            EdgeMoments& moments) {                                                     \
    return moments_rows(args, begin, end, moments);                                                     \
  }                                                                                                     \
  void edge_moments_backward_points(const EdgeMomentsBackwardArgs<T>& args, int64_t begin, int64_t end, \
                                    T* weights) {                                                       \
    moments_backward_points(args, begin, end, weights);                                                 \
  }
AVATAR_DEFINE(float)
AVATAR_DEFINE(double)
#undef AVATAR_DEFINE

}  // namespace AVATAR_ISA
}  // namespace avatar
