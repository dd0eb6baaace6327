// Scores of position codes by groups of edges over which channels keep their sign. For *_simd.cpp only.
//
// Before LeakyReLU channel p of edge (i, j) is u_p = o_ip + w_p c with c = [p_i - p_j ; |p_i - p_j|]. Where u_p
// has one sign on all edges of a group, LeakyReLU is a factor s_p there, and a linear map S of such channels is
// S diag(s) (o_i + w c): four columns for the group and one for each of its centres i, in place of a product
// for each edge. Channels of mixed sign are added edge by edge. What comes out is linear in c, o_i and the
// mixed channels again, so that a second layer goes the same way. Neighbours that are near each other leave few
// channels of mixed sign. A group is a tile, where its centres are near each other, too, or else one centre.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/position_tile.h"
#include "local_attention_pool/local_attention_pool_simd.h"

namespace avatar {
namespace AVATAR_ISA {
namespace {

// Bit l: whether lane l has its sign bit set.
template <typename T>
inline uint32_t sign_bits(typename Vectors<T>::Bits value) {
  if constexpr (sizeof(T) == 4) {
#if defined(__AVX512F__)
    return _mm512_mask_cmpgt_epi32_mask(0xffff, (__m512i)(value ^ value), (__m512i)value);
#elif defined(__AVX2__)
    return static_cast<uint32_t>(_mm256_movemask_ps((__m256)value));
#endif
  }
  uint32_t bits = 0;
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) bits |= uint32_t{value[lane] < 0} << lane;
  return bits;
}

template <typename T>
class GroupedScores {
 public:
  GroupedScores(const PoolArgs<T>& args, PositionTile<T>& tile)
      : args_(args),
        mlp_(args.position),
        tile_(tile),
        capacity_(args.position.from_center ? tile.capacity() : 0),
        widest_(args.position.widest),
        groups_(capacity_ + 1),
        channels_(2 * capacity_ * widest_),
        signs_(2 * capacity_ * (widest_ / kLanes<T>)),
        terms_(capacity_ * widest_),
        second_(capacity_ * widest_),
        matrices_(capacity_ * kPanel) {
    std::fill_n(terms_.get(), capacity_ * widest_, T(0));
    for (int64_t lane = 0; lane < kLanes<T>; ++lane) lane_bits_[lane] = 1 << lane;
  }

  // The position code of the tile, and the way its scores will be made.
  void forward() {
    grouped_ = false;
    if (tile_.count() == 0) return;
    tile_.start();
    if (mlp_.depth > 0) tile_.layer(0);
    grouped_ = capacity_ > 0 && find_groups();
    if (grouped_ && mlp_.depth == 2) {
      second_layer();
      grouped_ = regroup();
    } else {
      for (int64_t l = 1; l < mlp_.depth; ++l) tile_.layer(l);
    }
  }

  // One panel of columns of init + S r for the edges of the tile.
  template <typename Init>
  void scores(int64_t column, const Init& init, T* panel) const {
    const int64_t width = mlp_.out_padded, columns = args_.hidden;
    const auto done = [=](int64_t row, int64_t c, Vector<T> sum) {
      store(panel + row * kPanel + c - column, sum);
    };
    if (!grouped_) {
      return product_columns(tile_.rows(), width, column, columns, tile_.output(), width,
                             args_.position_weight, init, done);
    }
    multiply(rows_, width, column, columns, terms_.get(), args_.position_weight, matrices_.get(), kPanel,
             column);
    const Layer layer{args_.position_weight + width * column, width, matrices_.get(), kPanel,
                      tile_.output(), width};
    if (columns - column >= kPanel) {
      edge_sums<kPanelVectors>(layer, column, init, done);
    } else {
      edge_sums<1>(layer, column, init, done);
    }
  }

 private:
  static constexpr int64_t kPanel = kPanelVectors * kLanes<T>;
  // Columns of c.
  static constexpr int64_t kCode = 4;
  // What finding a group's channels costs, in products of one edge and one channel.
  static constexpr int64_t kFinding = 24;
  static constexpr int kEdgeRows = kVectorBytes == 64 ? 8 : 4;

  // The channels of mixed sign of a layer.
  struct Mixed {
    int32_t* channels;
    int64_t count;
  };
  // Segments [begin, end). Where `linear`, rows of terms from `row` on: those of c, of the centres and of the
  // first layer's mixed channels where the second one is meant.
  struct Group {
    int64_t begin, end, row;
    bool linear;
    Mixed first, mixed;
  };
  // A linear map of what LeakyReLU gave: packed weights of one panel, (depth, panel), and the groups' matrices
  // in rows `pitch` apart; values of edges (edges, width).
  struct Layer {
    const T* weights;
    int64_t depth;
    const T* matrices;
    int64_t pitch;
    const T* values;
    int64_t width;
  };

  int64_t edges(const Group& group) const {
    return tile_.segment_end(group.end - 1) - tile_.segment_begin(group.begin);
  }
  int32_t* channels(int64_t layer, int64_t segment) const {
    return channels_.row((layer * capacity_ + segment) * widest_);
  }
  int64_t vectors(int64_t width) const { return width / kLanes<T>; }
  // Whether any and whether all edges of a segment have a negative sign, by vectors of channels.
  uint32_t* any(int64_t segment) const { return signs_.row(2 * segment * vectors(widest_)); }
  uint32_t* all(int64_t segment) const { return any(segment) + vectors(widest_); }

  // Hence the terms of all groups are fewer than edges.
  static bool is_cheaper(int64_t cost, int64_t than) { return 4 * cost < 3 * than; }

  void find_signs(const T* output, int64_t width) const {
    using Bits = typename Vectors<T>::Bits;
    for (int64_t s = 0; s < tile_.segments(); ++s) {
      uint32_t *any_sign = any(s), *all_signs = all(s);
      for (int64_t p = 0; p < width; p += kLanes<T>) {
        Bits everywhere = ~Bits{}, somewhere{};
        for (int64_t row = tile_.segment_begin(s); row < tile_.segment_end(s); ++row) {
          const Bits bits = (Bits)load(output + row * width + p);
          everywhere &= bits;
          somewhere |= bits;
        }
        if (mlp_.slope == T(1)) everywhere = somewhere = Bits{};
        any_sign[p / kLanes<T>] = sign_bits<T>(somewhere);
        all_signs[p / kLanes<T>] = sign_bits<T>(everywhere);
      }
    }
  }

  void signs_of(const Group& group, int64_t vector, uint32_t& any_sign, uint32_t& all_signs) const {
    any_sign = 0, all_signs = ~uint32_t{0};
    for (int64_t s = group.begin; s < group.end; ++s) {
      if (tile_.segment_begin(s) == tile_.segment_end(s)) continue;
      any_sign |= any(s)[vector];
      all_signs &= all(s)[vector];
    }
  }

  int64_t count_mixed(const Group& group, int64_t width) const {
    int64_t count = 0;
    for (int64_t v = 0; v < vectors(width); ++v) {
      uint32_t any_sign, all_signs;
      signs_of(group, v, any_sign, all_signs);
      count += __builtin_popcount(any_sign & ~all_signs);
    }
    return count;
  }

  Mixed list_mixed(const Group& group, int64_t layer, int64_t width) const {
    Mixed mixed{channels(layer, group.begin), 0};
    for (int64_t v = 0; v < vectors(width); ++v) {
      uint32_t any_sign, all_signs;
      signs_of(group, v, any_sign, all_signs);
      for (uint32_t both = any_sign & ~all_signs; both; both &= both - 1) {
        mixed.channels[mixed.count++] = static_cast<int32_t>(v * kLanes<T> + __builtin_ctz(both));
      }
    }
    return mixed;
  }

  Mixed list_all(const Group& group, int64_t layer, int64_t width) const {
    Mixed mixed{channels(layer, group.begin), width};
    for (int64_t p = 0; p < width; ++p) mixed.channels[p] = static_cast<int32_t>(p);
    return mixed;
  }

  // Groups of the first layer, one for the tile or one for each segment; whether any pays.
  bool find_groups() {
    const int64_t width = mlp_.layers[0].out, segments = tile_.segments();
    if (!is_cheaper(segments * kFinding + (kCode + segments) * width + kCode * tile_.count(),
                    tile_.count() * width)) {
      // Not even without mixed channels.
      return false;
    }
    find_signs(tile_.hidden(0), width);
    int64_t by_segments = 0;
    bool finite = true, any_linear = false;
    count_ = segments;
    for (int64_t s = 0; s < segments; ++s) {
      Group& group = groups_.get()[s] = {s, s + 1, 0, false, {}, {}};
      const int64_t n = edges(group);
      // An infinite difference times a sum of weights is not the sum of its products with them.
      T distances = 0;
      for (int64_t row = tile_.segment_begin(s); row < tile_.segment_end(s); ++row)
        distances += tile_.code(row)[kCode - 1];
      const bool usable = distances - distances == T(0);
      finite = finite && usable;
      const int64_t cost =
          kFinding + (kCode + 1) * width + n * (kCode + (usable ? count_mixed(group, width) : width));
      group.linear = is_cheaper(cost, n * width);
      any_linear = any_linear || group.linear;
      by_segments += group.linear ? cost : n * width;
    }
    const Group whole{0, segments, 0, true, {}, {}};
    const int64_t together = kFinding + (kCode + segments) * width +
                             tile_.count() * (kCode + (finite ? count_mixed(whole, width) : width));
    if (is_cheaper(together, tile_.count() * width) && together <= by_segments) {
      groups_.get()[0] = whole;
      count_ = 1;
      any_linear = true;
    }
    if (!any_linear) return false;
    rows_ = 0;
    for (int64_t g = 0; g < count_; ++g) {
      Group& group = groups_.get()[g];
      group.mixed = group.linear ? list_mixed(group, 0, width) : list_all(group, 0, width);
      if (!group.linear) continue;
      group.row = rows_;
      rows_ += kCode + group.end - group.begin;
      fill_terms(group, width, [&](int64_t term, int64_t p) {
        return load(p + (term < kCode
                             ? mlp_.from_center + term * width
                             : mlp_.center_part + tile_.segment_point(group.begin + term - kCode) * width));
      });
    }
    return true;
  }

  // Terms of a group times the channels' factors; source(term, p) gives a vector of channels from p on.
  template <typename Source>
  void fill_terms(const Group& group, int64_t width, const Source& source) const {
    using Bits = typename Vectors<T>::Bits;
    const Bits lanes = (Bits)load(reinterpret_cast<const T*>(lane_bits_));
    const int64_t terms = kCode + group.end - group.begin + group.first.count;
    for (int64_t p = 0; p < width; p += kLanes<T>) {
      uint32_t any_sign, all_signs;
      signs_of(group, p / kLanes<T>, any_sign, all_signs);
      const auto has = [&](uint32_t bits) {
        return (lanes & (Bits{} + static_cast<decltype(lanes[0] + 0)>(bits))) != 0;
      };
      const Vector<T> factor =
          has(all_signs) ? splat(mlp_.slope) : has(any_sign) ? Vector<T>{} : splat(T(1));
      for (int64_t term = 0; term < terms; ++term) {
        store(terms_.row((group.row + term) * width + p), factor * source(term, p));
      }
    }
  }

  // terms (rows, depth) times one panel of packed weights.
  void multiply(int64_t rows, int64_t depth, int64_t column, int64_t columns, const T* terms,
                const T* packed, T* result, int64_t pitch, int64_t origin) const {
    const auto start = [](int64_t, int64_t) { return Vector<T>{}; };
    const auto done_from = [=](int64_t first) {
      return [=](int64_t row, int64_t c, Vector<T> sum) {
        store(result + (first + row) * pitch + c - origin, sum);
      };
    };
    const int64_t whole = rows / kRowBlock * kRowBlock;
    product_columns(whole, depth, column, columns, terms, depth, packed, start, done_from(0));
    constexpr int kRest = 4;
    product_columns<kRest>(round_up(rows - whole, kRest), depth, column, columns, terms + whole * depth, depth,
                           packed, start, done_from(whole));
  }

  // A vector of row d of a layer's weights from channel p on.
  static Vector<T> packed_row(const PositionLayer<T>& layer, int64_t d, int64_t p) {
    const int64_t first = p / kPanel * kPanel, panel = std::min(kPanel, layer.out - first);
    return load(layer.weight + layer.in * first + d * panel + p - first);
  }

  // The second layer of the code.
  void second_layer() const {
    const PositionLayer<T>& layer = mlp_.layers[1];
    const int64_t width = layer.out;
    T* out = tile_.hidden(1);
    const auto start = [bias = layer.bias](int64_t, int64_t c) { return load(bias + c); };
    const auto done = [=, slope = mlp_.slope](int64_t row, int64_t c, Vector<T> sum) {
      store(out + row * width + c, leaky_relu(sum, slope));
    };
    for (int64_t column = 0; column < width; column += kPanel) {
      multiply(rows_, layer.in, column, width, terms_.get(), layer.weight, second_.get(), width, 0);
      const Layer map{layer.weight + layer.in * column, layer.in, second_.get() + column, width,
                      tile_.hidden(0), layer.in};
      if (width - column >= kPanel) {
        edge_sums<kPanelVectors>(map, column, start, done);
      } else {
        edge_sums<1>(map, column, start, done);
      }
    }
  }

  // The same groups for what the second layer gives; whether any pays.
  bool regroup() {
    const PositionLayer<T>& layer = mlp_.layers[1];
    const int64_t width = layer.out;
    find_signs(tile_.hidden(1), width);
    bool any_linear = false;
    int64_t rows = 0;
    for (int64_t g = 0; g < count_; ++g) {
      Group& group = groups_.get()[g];
      const int64_t n = edges(group), terms = kCode + group.end - group.begin + group.mixed.count;
      const int64_t cost =
          kFinding + terms * width + n * (kCode + group.mixed.count + count_mixed(group, width));
      group.linear = group.linear && is_cheaper(cost, n * width);
    }
    for (int64_t g = 0; g < count_; ++g) {
      Group& group = groups_.get()[g];
      const Mixed before = group.mixed;
      const int64_t from = group.row;
      group.first = {};
      group.mixed = group.linear ? list_mixed(group, 1, width) : list_all(group, 1, width);
      if (!group.linear) continue;
      any_linear = true;
      group.first = before;
      group.row = rows;
      const int64_t centers = kCode + group.end - group.begin;
      fill_terms(group, width, [&](int64_t term, int64_t p) {
        if (term >= centers) return packed_row(layer, before.channels[term - centers], p);
        const Vector<T> value = load(second_.row((from + term) * width + p));
        return term < kCode ? value : value + load(layer.bias + p);
      });
      rows += centers + before.count;
    }
    rows_ = rows;
    return any_linear;
  }

  // done(init + ...) of all edges, one panel of columns.
  template <int kVectors, typename Init, typename Done>
  void edge_sums(const Layer& layer, int64_t column, const Init& init, const Done& done) const {
    for (int64_t g = 0; g < count_; ++g) {
      const Group& group = groups_.get()[g];
      for (int64_t s = group.begin; s < group.end; ++s) {
        int64_t row = tile_.segment_begin(s);
        const int64_t end = tile_.segment_end(s);
        for (; row + kEdgeRows <= end; row += kEdgeRows)
          rows_sums<kEdgeRows, kVectors>(layer, group, s, row, column, init, done);
        for (; row + 2 <= end; row += 2) rows_sums<2, kVectors>(layer, group, s, row, column, init, done);
        if (row < end) rows_sums<1, kVectors>(layer, group, s, row, column, init, done);
      }
    }
  }

  template <int kRows, int kVectors, typename Init, typename Done>
  void rows_sums(const Layer& layer, const Group& group, int64_t s, int64_t row, int64_t column,
                 const Init& init, const Done& done) const {
    Vector<T> sums[kRows][kVectors];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) sums[r][v] = init(row + r, column + v * kLanes<T>);
    }
    const auto add = [&](const T* weights, auto value) {
      Vector<T> right[kVectors];
      for (int v = 0; v < kVectors; ++v) right[v] = load(weights + v * kLanes<T>);
      for (int r = 0; r < kRows; ++r) {
        const Vector<T> left = splat(value(r));
        for (int v = 0; v < kVectors; ++v) sums[r][v] += left * right[v];
      }
    };
    if (group.linear) {
      const T* matrix = layer.matrices + group.row * layer.pitch;
      const T* center = matrix + (kCode + s - group.begin) * layer.pitch;
      for (int v = 0; v < kVectors; ++v) {
        const Vector<T> right = load(center + v * kLanes<T>);
        for (int r = 0; r < kRows; ++r) sums[r][v] += right;
      }
      const int64_t stride = mlp_.code_padded;
      const T* code = tile_.code(row);
      for (int64_t d = 0; d < kCode; ++d) {
        add(matrix + d * layer.pitch, [=](int r) { return code[r * stride + d]; });
      }
      const int64_t width = mlp_.layers[0].out;
      const T* values = tile_.hidden(0) + row * width;
      matrix += (kCode + group.end - group.begin) * layer.pitch;
      for (int64_t m = 0; m < group.first.count; ++m, matrix += layer.pitch) {
        add(matrix, [=, p = group.first.channels[m]](int r) { return values[r * width + p]; });
      }
    }
    const T* values = layer.values + row * layer.width;
    for (int64_t m = 0; m < group.mixed.count; ++m) {
      const int64_t p = group.mixed.channels[m];
      add(layer.weights + p * kVectors * kLanes<T>, [=](int r) { return values[r * layer.width + p]; });
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) done(row + r, column + v * kLanes<T>, sums[r][v]);
    }
  }

  const PoolArgs<T>& args_;
  const PositionMlp<T>& mlp_;
  PositionTile<T>& tile_;
  const int64_t capacity_, widest_;
  int64_t count_ = 0, rows_ = 0;
  bool grouped_ = false;
  Scratch<Group> groups_;
  Scratch<int32_t> channels_;
  Scratch<uint32_t> signs_;
  Scratch<T> terms_, second_, matrices_;
  std::conditional_t<sizeof(T) == 4, int32_t, int64_t> lane_bits_[kLanes<T>];
};

}  // namespace
}  // namespace AVATAR_ISA
}  // namespace avatar
