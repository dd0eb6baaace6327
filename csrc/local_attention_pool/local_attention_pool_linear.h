// Channels of a one-layer position code that are linear over a segment of edges. For *_simd.cpp only.
//
// Before LeakyReLU channel p of edge (i, j) is u_p = o_p + w_p c with c = [p_i - p_j ; |p_i - p_j|] and o
// that of the segment's point. Where u_p has one sign on all edges of the segment, LeakyReLU is a factor s_p
// there, and the sum over such channels of S_qp s_p u_p is M_q [1 ; c] with M = S diag(s) [o, w]: five
// products for a segment in place of one for each edge. Neighbours that are near each other leave few
// channels of mixed sign.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/position_tile.h"

namespace avatar {
namespace AVATAR_ISA {
namespace {

template <typename T>
inline T sum_lanes(Vector<T> value) {
  T lanes[kLanes<T>];
  store(lanes, value);
  for (int64_t half = kLanes<T> / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

template <typename T>
class LinearChannels {
 public:
  // 1, three coordinates and the distance.
  static constexpr int kTerms = 5;
  static constexpr int64_t kPanel = kPanelVectors * kLanes<T>;

  // `edge_weight` (4, out): w, relative to the points that segments are of; null where the code has another
  // form.
  LinearChannels(const PositionMlp<T>& mlp, const T* edge_weight, const PositionTile<T>& tile)
      : mlp_(mlp),
        edge_weight_(edge_weight),
        width_(mlp.out_padded),
        capacity_(tile.capacity()),
        most_(capacity_ / kTerms),
        segments_(edge_weight ? 2 * capacity_ : 0),
        mixed_(edge_weight ? capacity_ * width_ : 0),
        factors_(edge_weight ? most_ * width_ : 0),
        terms_(edge_weight ? kTerms * most_ * width_ : 0),
        matrices_(edge_weight ? kTerms * most_ * kPanel : 0) {}

  // Decides for each segment on its own whether it is cheaper by linear channels; whether any is.
  bool find_each(const PositionTile<T>& tile) {
    if (!edge_weight_) return false;
    count_ = 0;
    for (int64_t s = 0; s < tile.segments(); ++s) {
      linear()[s] = -1;
      if (pays(tile, s, 0) && pays(tile, s, find(tile, s, tile.segment_point(s)))) linear()[s] = count_++;
    }
    if (count_ == 0) return false;
    for (int64_t s = 0; s < tile.segments(); ++s) {
      if (linear()[s] >= 0) continue;
      mixed_count()[s] = width_;
      for (int64_t p = 0; p < width_; ++p) mixed(s)[p] = static_cast<int32_t>(p);
    }
    return true;
  }

  // The same for all segments together; points are counted from `first`.
  bool find_all(const PositionTile<T>& tile, int64_t first) {
    if (!edge_weight_ || tile.segments() > most_) return false;
    const int64_t by_edges = tile.count() * width_;
    int64_t cost = tile.segments() * (kFinding + kTerms * width_) + kTerms * tile.count();
    count_ = 0;
    for (int64_t s = 0; s < tile.segments() && 4 * cost < 3 * by_edges; ++s) {
      cost += find(tile, s, first + tile.segment_point(s)) * edges(tile, s);
      linear()[s] = count_++;
    }
    return 4 * cost < 3 * by_edges;
  }

  // One panel of columns of init + S r for the edges of the tile; S is packed (out, columns).
  template <typename Init>
  void scores(const PositionTile<T>& tile, const T* packed, int64_t column, int64_t columns, const Init& init,
              T* panel) const {
    product_columns<kTerms>(
        kTerms * count_, width_, column, columns, terms_.get(), width_, packed,
        [](int64_t, int64_t) { return Vector<T>{}; },
        [=, matrices = matrices_.get()](int64_t row, int64_t c, Vector<T> sum) {
          store(matrices + row * kPanel + c - column, sum);
        });
    const T* weights = packed + width_ * column;
    if (columns - column >= kPanel) {
      edge_scores<kPanelVectors>(tile, weights, column, init, panel);
    } else {
      edge_scores<1>(tile, weights, column, init, panel);
    }
  }

  // Sums over each segment of rows `a` (edges, columns) times [1 ; c]: (kTerms for each segment, columns).
  void sum_terms(const PositionTile<T>& tile, const T* a, int64_t stride, int64_t columns, T* sums) const {
    for (int64_t s = 0; s < tile.segments(); ++s, sums += kTerms * columns) {
      int64_t c = 0;
      for (; c + kPanel <= columns; c += kPanel)
        sum_panel<kPanelVectors>(tile, s, a + c, stride, columns, sums + c);
      for (; c < columns; c += kLanes<T>) sum_panel<1>(tile, s, a + c, stride, columns, sums + c);
    }
  }

  // outer (out, columns), as add_outer_packed keeps it, += the sum over edges of r and their rows of `a`, of
  // which `sums` are the sum_terms.
  void add_outer(const PositionTile<T>& tile, const T* a, int64_t stride, int64_t columns, const T* sums,
                 T* outer) const {
    add_outer_packed(kTerms * count_, terms_.get(), width_, width_, sums, columns, columns, outer);
    for (int64_t s = 0; s < tile.segments(); ++s) {
      for (int64_t m = 0; m < mixed_count()[s]; ++m) {
        const int64_t p = mixed(s)[m], block = p / kOuterBlock<T> * kOuterBlock<T>;
        T* rows = outer + block * columns;
        int64_t c = 0;
        for (; c + kPanel <= columns; c += kPanel) {
          add_outer_row<kPanelVectors>(tile, s, p, a + c, stride,
                                       rows + kOuterBlock<T> * c + (p - block) * kPanel);
        }
        for (; c < columns; c += kLanes<T>) {
          add_outer_row<1>(tile, s, p, a + c, stride, rows + kOuterBlock<T> * c + (p - block) * kLanes<T>);
        }
      }
    }
  }

  // Adds the gradients of the code's o to point_sums (points, out) and of w to weight_sums (4, out). Those of
  // r are direct + a S: `direct` (edges, out), `direct_sums` its sum_terms with those of `a` times S added;
  // S^T is packed (out, columns).
  void add_gradients(const PositionTile<T>& tile, const T* direct, const T* direct_sums, const T* a,
                     int64_t stride, int64_t columns, const T* packed, T* point_sums, T* weight_sums) const {
    for (int64_t s = 0; s < tile.segments(); ++s, direct_sums += kTerms * width_) {
      T* point_sum = point_sums + tile.segment_point(s) * width_;
      for (int64_t p = 0; p < width_; p += kLanes<T>) {
        const Vector<T> factor = load(factors_.row(s * width_ + p));
        for (int term = 0; term < kTerms; ++term) {
          T* target = term == 0 ? point_sum + p : weight_sums + (term - 1) * width_ + p;
          store(target, load(target) + factor * load(direct_sums + term * width_ + p));
        }
      }
      for (int64_t m = 0; m < mixed_count()[s]; ++m) {
        const int64_t p = mixed(s)[m];
        const int64_t end = tile.segment_end(s);
        int64_t row = tile.segment_begin(s);
        for (; row < end; row += kDots) {
          T gradients[kDots];
          if (row + kDots <= end) {
            packed_dots<kDots>(a + row * stride, stride, columns, packed, p, gradients);
          } else {
            for (int64_t r = row; r < end; ++r)
              packed_dots<1>(a + r * stride, stride, columns, packed, p, gradients + r - row);
          }
          for (int64_t r = row; r < std::min(row + kDots, end); ++r) {
            const T gradient = direct[r * width_ + p] + gradients[r - row];
            const T linear = tile.output()[r * width_ + p] > T(0) ? gradient : gradient * mlp_.slope;
            point_sum[p] += linear;
            for (int term = 1; term < kTerms; ++term) {
              weight_sums[(term - 1) * width_ + p] += linear * tile.code(r)[term - 1];
            }
          }
        }
      }
    }
  }

 private:
  // What finding a segment's channels costs, in products of one edge and one channel.
  static constexpr int64_t kFinding = 40;
  static constexpr int64_t kDots = 4;
  static constexpr int kEdgeRows = kVectorBytes == 64 ? 8 : 4;

  int64_t* linear() const { return segments_.get(); }
  int64_t* mixed_count() const { return segments_.row(capacity_); }
  int32_t* mixed(int64_t s) const { return mixed_.row(s * width_); }
  static int64_t edges(const PositionTile<T>& tile, int64_t s) {
    return tile.segment_end(s) - tile.segment_begin(s);
  }
  bool pays(const PositionTile<T>& tile, int64_t s, int64_t mixed) const {
    const int64_t n = edges(tile, s);
    return 4 * (kFinding + kTerms * (width_ + n) + n * mixed) < 3 * n * width_;
  }

  // The factors and terms of segment s as linear segment count_, and its channels of mixed sign; how many.
  int64_t find(const PositionTile<T>& tile, int64_t s, int64_t point) {
    using Bits = typename Vectors<T>::Bits;
    // An infinite difference times a sum of weights is not the sum of its products with them.
    T distances = 0;
    for (int64_t row = tile.segment_begin(s); row < tile.segment_end(s); ++row)
      distances += tile.code(row)[kTerms - 2];
    if (!(distances - distances == T(0))) return width_;
    const T* output = tile.output();
    const T* own = mlp_.center_part + point * width_;
    T* terms = terms_.row(kTerms * count_ * width_);
    int64_t found = 0;
    for (int64_t p = 0; p < width_; p += kLanes<T>) {
      Bits all = ~Bits{}, any{};
      for (int64_t row = tile.segment_begin(s); row < tile.segment_end(s); ++row) {
        const Bits bits = (Bits)load(output + row * width_ + p);
        all &= bits;
        any |= bits;
      }
      if (mlp_.slope == T(1)) all = any = Bits{};
      const Bits both = any & ~all;
      const Vector<T> factor = all < 0 ? splat(mlp_.slope) : both < 0 ? Vector<T>{} : splat(T(1));
      store(factors_.row(count_ * width_ + p), factor);
      store(terms + p, factor * load(own + p));
      for (int term = 1; term < kTerms; ++term) {
        store(terms + term * width_ + p, factor * load(edge_weight_ + (term - 1) * width_ + p));
      }
      for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
        mixed(s)[found] = static_cast<int32_t>(p + lane);
        found += both[lane] < 0;
      }
    }
    mixed_count()[s] = found;
    return found;
  }

  template <int kVectors, typename Init>
  void edge_scores(const PositionTile<T>& tile, const T* weights, int64_t column, const Init& init,
                   T* panel) const {
    for (int64_t s = 0; s < tile.segments(); ++s) {
      int64_t row = tile.segment_begin(s);
      const int64_t end = tile.segment_end(s);
      for (; row + kEdgeRows <= end; row += kEdgeRows) {
        score_rows<kEdgeRows, kVectors>(tile, s, row, weights, column, init, panel);
      }
      for (; row + 2 <= end; row += 2) score_rows<2, kVectors>(tile, s, row, weights, column, init, panel);
      if (row < end) score_rows<1, kVectors>(tile, s, row, weights, column, init, panel);
    }
  }

  // Here and below loops are unrolled early, so that the sums are registers throughout.
  template <int kRows, int kVectors, typename Init>
  void score_rows(const PositionTile<T>& tile, int64_t s, int64_t row, const T* weights, int64_t column,
                  const Init& init, T* panel) const {
    Vector<T> sums[kRows][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[r][v] = init(row + r, column + v * kLanes<T>);
    }
    const int64_t place = linear()[s];
    if (place >= 0) {
      const T* matrix = matrices_.row(kTerms * place * kPanel);
      for (int term = 0; term < kTerms; ++term, matrix += kPanel) {
        Vector<T> right[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) right[v] = load(matrix + v * kLanes<T>);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const Vector<T> left = splat(term == 0 ? T(1) : tile.code(row + r)[term - 1]);
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) sums[r][v] += left * right[v];
        }
      }
    }
    const T* output = tile.output() + row * width_;
    const int32_t* channels = mixed(s);
    const int64_t count = mixed_count()[s];
    for (int64_t m = 0; m < count; ++m) {
      const int64_t p = channels[m];
      Vector<T> right[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) right[v] = load(weights + (p * kVectors + v) * kLanes<T>);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Vector<T> left = splat(output[r * width_ + p]);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sums[r][v] += left * right[v];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) store(panel + (row + r) * kPanel + v * kLanes<T>, sums[r][v]);
    }
  }

  template <int kVectors>
  void sum_panel(const PositionTile<T>& tile, int64_t s, const T* a, int64_t stride, int64_t columns,
                 T* sums) const {
    Vector<T> sum[kTerms][kVectors] = {};
    for (int64_t row = tile.segment_begin(s); row < tile.segment_end(s); ++row) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const Vector<T> value = load(a + row * stride + v * kLanes<T>);
        sum[0][v] += value;
#pragma GCC unroll 5
        for (int term = 1; term < kTerms; ++term) sum[term][v] += splat(tile.code(row)[term - 1]) * value;
      }
    }
    for (int term = 0; term < kTerms; ++term) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) store(sums + term * columns + v * kLanes<T>, sum[term][v]);
    }
  }

  template <int kVectors>
  void add_outer_row(const PositionTile<T>& tile, int64_t s, int64_t p, const T* a, int64_t stride,
                     T* target) const {
    Vector<T> sum[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[v] = load(target + v * kLanes<T>);
    for (int64_t row = tile.segment_begin(s); row < tile.segment_end(s); ++row) {
      const Vector<T> left = splat(tile.output()[row * width_ + p]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[v] += left * load(a + row * stride + v * kLanes<T>);
    }
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(target + v * kLanes<T>, sum[v]);
  }

  // Row p of a packed matrix times kRows rows of a.
  template <int kRows>
  void packed_dots(const T* a, int64_t stride, int64_t columns, const T* packed, int64_t p, T* dots) const {
    Vector<T> sums[kRows] = {};
    for (int64_t c = 0; c < columns;) {
      const int64_t panel = columns - c >= kPanel ? kPanel : kLanes<T>;
      const T* row = packed + width_ * c + p * panel;
      for (const int64_t end = c + panel; c < end; c += kLanes<T>, row += kLanes<T>) {
        const Vector<T> left = load(row);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) sums[r] += left * load(a + r * stride + c);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) dots[r] = sum_lanes<T>(sums[r]);
  }

  const PositionMlp<T>& mlp_;
  const T* const edge_weight_;
  const int64_t width_, capacity_, most_;
  int64_t count_ = 0;
  Scratch<int64_t> segments_;
  Scratch<int32_t> mixed_;
  Scratch<T> factors_, terms_, matrices_;
};

}  // namespace
}  // namespace AVATAR_ISA
}  // namespace avatar
