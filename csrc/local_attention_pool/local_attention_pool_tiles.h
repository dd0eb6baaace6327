// Scores of position codes by tiles of edges over which most channels keep their sign. For *_simd.cpp with
// AVX-512 only: shorter vectors gain less than the lists cost.
//
// Before LeakyReLU channel p of edge (i, j) is u_p = o_ip + w_p c with c = [p_i - p_j ; |p_i - p_j|]. With a
// factor s_p for all edges of a tile, LeakyReLU gives s_p u_p and, to edges of the other sign, an excess. A
// linear map S of that is S diag(s) (o_i + w c), four columns for the tile and one for each of its centres i
// in place of a product for each edge, and S times the excess, whose few channels are listed for blocks of
// edges. It is linear in c, o_i and the excess, so that a second layer goes the same way. Centres and
// neighbours that are near each other leave little excess.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "common/position_tile.h"
#include "local_attention_pool/local_attention_pool_edges.h"
#include "local_attention_pool/local_attention_pool_factors.h"
#include "local_attention_pool/local_attention_pool_simd.h"

namespace avatar {
namespace AVATAR_ISA {
namespace {

// For position networks of one or two layers in three dimensions.
template <typename T>
class TileScores {
 public:
  static constexpr int kEdgeRows = 8;
  // At most kEdgeRows edges of one segment.
  struct Block {
    int64_t begin, end, segment;
  };

  TileScores(const PoolArgs<T>& args, PositionTile<T>& tile)
      : args_(args),
        mlp_(args.position),
        tile_(tile),
        capacity_(tile.capacity()),
        widest_(args.position.widest),
        most_rows_(2 * capacity_ + 4 * widest_),
        code_stride_(capacity_ + kLanes<T>),
        value_stride_(2 * widest_ + kLanes<T>),
        blocks_(capacity_),
        factors_{{mlp_.slope, widest_, capacity_}, {mlp_.slope, widest_, capacity_}},
        codes_(kCode * code_stride_),
        inputs_((capacity_ + kRest) * widest_),
        second_((most_rows_ + kRest) * widest_),
        matrix_((most_rows_ + kRest) * round_up(args.hidden, kPanel)),
        values_(kEdgeRows * value_stride_),
        places_(2 * widest_ + kNumbers),
        channels_(2 * widest_ + kNumbers),
        term_rows_(2 * widest_ + kNumbers),
        term_values_(2 * widest_ + kNumbers),
        members_(most_rows_) {
    std::fill_n(inputs_.get(), (capacity_ + kRest) * widest_, T(0));
    std::fill_n(codes_.get(), kCode * code_stride_, T(0));
    std::iota(channels_.get(), channels_.row(2 * widest_), 0);
  }

  // The position code of the tile, and the way its scores will be made.
  void forward() {
    shared_ = false;
    if (tile_.count() == 0) return;
    tile_.fill_up();
    find_edges();
    first_layer();
    shared_ = shares_first();
    if (mlp_.depth == 1) return;
    if (shared_) {
      second_layer();
      shared_ = shares_last();
    } else {
      tile_.layer(1);
    }
  }

  // Whether edges share their scores' products, which prepare() makes.
  bool shared() const { return shared_; }
  void prepare() const {
    for (int64_t column = 0; column < args_.hidden; column += kPanel) {
      make_matrix(mlp_.out_padded, column, args_.hidden, args_.position_weight, panel_of(column), kPanel);
    }
  }

  // One panel of columns of init + S r for the edges of segments [begin, end); their rows from 0 on, and at
  // most kRowBlock - 1 more.
  template <typename Init>
  void scores(int64_t begin, int64_t end, int64_t column, const Init& init, T* panel) {
    const int64_t width = mlp_.out_padded, columns = args_.hidden, first = tile_.segment_begin(begin);
    const int64_t count = tile_.segment_end(end - 1) - first;
    if (!shared_) {
      return product_columns(
          round_up(count, kRowBlock), width, column, columns, tile_.output() + first * width, width,
          args_.position_weight, [=](int64_t row, int64_t c) { return init(first + row, c); },
          [=](int64_t row, int64_t c, Vector<T> sum) { store(panel + row * kPanel + c - column, sum); });
    }
    T* target = panel - first * kPanel - column;
    const auto take =
        each([=](int64_t row, int64_t c, Vector<T> sum) { store(target + row * kPanel + c, sum); });
    for (int64_t b = block_of(first); b < block_count_ && block(b).begin < first + count; ++b) {
      list_excess(b, mlp_.depth);
      block_sums<false>({column, columns, panel_of(column), kPanel}, b, init, take);
    }
  }

  // The same for all edges, which share their products, and whole panels that begin with a column for which
  // `wants` holds: take(block, column, sums), the panels of a block and the blocks one after the other.
  template <typename Wants, typename Init, typename Take>
  void take_scores(const Wants& wants, const Init& init, const Take& take) {
    for (int64_t b = 0; b < block_count_; ++b) {
      list_excess(b, mlp_.depth);
      for (int64_t column = 0; column + kPanel <= args_.hidden; column += kPanel) {
        if (!wants(column)) continue;
        panel_sums<false, kPanelVectors>({column, args_.hidden, panel_of(column), kPanel}, b, init, take);
      }
    }
  }

 private:
  static constexpr int64_t kPanel = kPanelVectors * kLanes<T>;
  // Columns of c.
  static constexpr int64_t kCode = 4;
  // What finding channels costs, in products of one edge and one channel.
  static constexpr int64_t kFinding = 100;
  // Numbers of channels that are read and written at once.
  static constexpr int kNumbers = 16;
  // Rows of a product beyond whole ones of kRowBlock.
  static constexpr int kRest = 4;

  // One panel of columns of a linear map: the first one, all columns, and the matrix in rows `pitch` apart.
  struct Map {
    int64_t column, columns;
    const T* matrix;
    int64_t pitch;
  };

  static int64_t vectors(int64_t width) { return width / kLanes<T>; }
  const Block& block(int64_t b) const { return blocks_.get()[b]; }
  T* panel_of(int64_t column) const { return matrix_.row(column * (mapped_ + copied_)); }

  // Hence the matrix has fewer rows from centres than there are edges.
  static bool is_cheaper(int64_t cost, int64_t than) { return 4 * cost < 3 * than; }

  // c number by number, and the blocks.
  void find_edges() {
    block_count_ = 0;
    for (int64_t s = 0; s < tile_.segments(); ++s) {
      const int64_t begin = tile_.segment_begin(s), end = tile_.segment_end(s);
      edge_codes(mlp_.points, tile_.segment_point(s), tile_.neighbors() + begin, end - begin, code_stride_,
                 codes_.row(begin));
      for (int64_t row = begin; row < end; row += kEdgeRows) {
        blocks_.get()[block_count_++] = {row, std::min<int64_t>(row + kEdgeRows, end), s};
      }
    }
  }

  // o of a vector of channels from p on.
  Vector<T> own_part(int64_t point, int64_t p) const {
    Vector<T> sum = load(mlp_.layers[0].bias + p);
    for (int64_t d = 0; d < 3; ++d) {
      sum += splat(mlp_.points[4 * point + d]) * load(mlp_.center_weight + d * mlp_.layers[0].out + p);
    }
    return sum;
  }

  // What the first layer gives, and its signs.
  void first_layer() {
    const int64_t width = mlp_.layers[0].out;
    for (int64_t column = 0; column < width; column += kPanel) {
      if (width - column >= kPanel) {
        first_panel<kPanelVectors>(column);
      } else {
        first_panel<1>(column);
      }
    }
  }

  template <int kVectors>
  __attribute__((noinline)) void first_panel(int64_t column) {
    const PositionLayer<T>& layer = mlp_.layers[0];
    const int64_t width = layer.out, stride = code_stride_;
    const T* weight = mlp_.from_center + column;
    const T slope = mlp_.slope;
    T* output = tile_.hidden(0) + column;
    for (int64_t b = 0; b < block_count_; ++b) {
      const Block block = this->block(b);
      const T* codes = codes_.row(block.begin);
      Vector<T> sums[kEdgeRows][kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const Vector<T> own = own_part(tile_.segment_point(block.segment), column + v * kLanes<T>);
#pragma GCC unroll 8
        for (int r = 0; r < kEdgeRows; ++r) sums[r][v] = own;
      }
#pragma GCC unroll 4
      for (int d = 0; d < kCode; ++d) {
        Vector<T> right[kVectors];
        for (int v = 0; v < kVectors; ++v) right[v] = load(weight + d * width + v * kLanes<T>);
#pragma GCC unroll 8
        for (int r = 0; r < kEdgeRows; ++r) {
          const Vector<T> left = splat(codes[d * stride + r]);
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) sums[r][v] += left * right[v];
        }
      }
      factors_[0].find_signs(b, vectors(column), sums, block.end - block.begin);
      T* target = output + block.begin * width;
#pragma GCC unroll 8
      for (int r = 0; r < kEdgeRows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          store(target + r * width + v * kLanes<T>, leaky_relu(sums[r][v], slope));
        }
      }
    }
  }

  // How many edges and channels of a layer have an excess above the factors chosen for it.
  int64_t choose(int64_t layer) {
    return factors_[layer].choose(vectors(mlp_.layers[layer].out), block_count_, tile_.count(),
                                  [this](int64_t b) { return block(b).end - block(b).begin; });
  }

  // The rows of the matrix, from `mapped_` on, for channels of a layer that any block lists.
  void place_excess(int64_t layer) {
    copied_ = 0;
    for (int64_t v = 0; v < vectors(mlp_.layers[layer].out); ++v) {
      uint32_t channels = 0;
      for (int64_t b = 0; b < block_count_; ++b) channels |= factors_[layer].listed(b, v);
      for (; channels; channels &= channels - 1) {
        const int64_t channel = v * kLanes<T> + __builtin_ctz(channels);
        places_.get()[layer * widest_ + channel] = static_cast<int32_t>(mapped_ + copied_);
        members_.get()[copied_++] = static_cast<int32_t>(channel);
      }
    }
  }

  // Lists the excess of a block in the first layers: rows of the matrix, and what goes with them. As good as
  // without branches, since what is listed is hard to foretell.
  void list_excess(int64_t b, int64_t layers) {
    terms_ = 0;
    for (int64_t layer = 0; layer < layers; ++layer) {
      const TileFactors<T>& factors = factors_[layer];
      const int64_t width = mlp_.layers[layer].out;
      const T* output = tile_.hidden(layer) + block(b).begin * width;
      for (int64_t v = 0; v < vectors(width); ++v) {
        const uint32_t channels = factors.listed(b, v);
        if (!channels) continue;
        const int64_t p = v * kLanes<T>, place = layer * widest_ + p, stride = value_stride_;
        const Vector<T> above = factors.above(v), below = factors.below(v);
        T* target = values_.row(place);
#pragma GCC unroll 8
        for (int r = 0; r < kEdgeRows; ++r) {
          const Vector<T> value = load(output + r * width + p);
          store(target + r * stride, value * (value > T(0) ? above : below));
        }
        compress(channels, places_.row(place), term_rows_.row(terms_));
        compress(channels, channels_.row(place), term_values_.row(terms_));
        terms_ += __builtin_popcount(channels);
      }
    }
  }

  // After the first layer; whether it pays that edges share products.
  bool shares_first() {
    const int64_t width = mlp_.layers[0].out, segments = tile_.segments(), count = tile_.count();
    const int64_t cost = kFinding + (kCode + segments) * width + kCode * count;
    if (!is_cheaper(cost, count * width) || !is_near()) return false;
    excess_ = choose(0);
    if (!is_cheaper(cost + excess_, count * width)) return false;
    mapped_ = kCode + segments;
    fill_inputs(0, [=](int64_t row, int64_t p) {
      return row < kCode ? load(mlp_.from_center + row * width + p)
                         : own_part(tile_.segment_point(row - kCode), p);
    });
    place_excess(0);
    return true;
  }

  // Whether the tile's centres are not much farther from each other than its edges are long, and finite: an
  // infinite difference times a sum of weights is not the sum of its products with them.
  bool is_near() const {
    const T* points = mlp_.points;
    const T* first = points + 4 * tile_.segment_point(0);
    const T* distances = codes_.row((kCode - 1) * code_stride_);
    Vector<T> lengths{}, sums{};
    int64_t row = 0;
    for (; row + kLanes<T> <= tile_.count(); row += kLanes<T>) {
      lengths = larger<T>(load(distances + row), lengths);
      sums += load(distances + row);
    }
    T longest = 0, farthest = 0, sum = 0;
    const auto add = [&](T length, T addend) {
      longest = std::max(longest, length);
      sum += addend;
    };
    for (int64_t lane = 0; lane < kLanes<T>; ++lane) add(lengths[lane], sums[lane]);
    for (; row < tile_.count(); ++row) add(distances[row], distances[row]);
    for (int64_t s = 1; s < tile_.segments(); ++s) {
      const T* point = points + 4 * tile_.segment_point(s);
      const T x = point[0] - first[0], y = point[1] - first[1], z = point[2] - first[2];
      farthest = std::max(farthest, x * x + y * y + z * z);
    }
    return sum - sum == T(0) && farthest <= 64 * longest * longest;
  }

  // What becomes the first rows of the matrix: source(row, p), which gives vectors of a layer's channels from
  // p on, times the factors.
  template <typename Source>
  void fill_inputs(int64_t layer, const Source& source) {
    const int64_t width = mlp_.layers[layer].out;
    for (int64_t p = 0; p < width; p += kLanes<T>) {
      const Vector<T> factor = factors_[layer].factor(p / kLanes<T>);
      for (int64_t row = 0; row < mapped_; ++row)
        store(inputs_.row(row * width + p), factor * source(row, p));
    }
  }

  // One panel of the matrix: inputs times packed weights (depth, columns), and the rows of those for an
  // excess.
  void make_matrix(int64_t depth, int64_t column, int64_t columns, const T* packed, T* matrix,
                   int64_t pitch) const {
    const T* inputs = inputs_.get();
    const auto start = [](int64_t, int64_t) { return Vector<T>{}; };
    const auto done_from = [=](T* target) {
      return [=](int64_t row, int64_t c, Vector<T> sum) { store(target + row * pitch + c - column, sum); };
    };
    const int64_t whole = mapped_ / kRowBlock * kRowBlock;
    product_columns(whole, depth, column, columns, inputs, depth, packed, start, done_from(matrix));
    product_columns<kRest>(round_up(mapped_ - whole, kRest), depth, column, columns, inputs + whole * depth,
                           depth, packed, start, done_from(matrix + whole * pitch));
    const int64_t panel = columns - column >= kPanel ? kPanel : kLanes<T>;
    for (int64_t m = 0; m < copied_; ++m) {
      std::copy_n(packed + depth * column + members_.get()[m] * panel, panel, matrix + (mapped_ + m) * pitch);
    }
  }

  // A vector of row d of a layer's weights from channel p on.
  static Vector<T> packed_row(const PositionLayer<T>& layer, int64_t d, int64_t p) {
    const int64_t first = p / kPanel * kPanel, panel = std::min(kPanel, layer.out - first);
    return load(layer.weight + layer.in * first + d * panel + p - first);
  }

  // The second layer of the code.
  void second_layer() {
    const PositionLayer<T>& layer = mlp_.layers[1];
    const int64_t width = layer.out;
    for (int64_t column = 0; column < width; column += kPanel) {
      make_matrix(layer.in, column, width, layer.weight, second_.row(column), width);
    }
    const auto init = [bias = layer.bias](int64_t, int64_t c) { return load(bias + c); };
    const auto take =
        each([=, out = tile_.hidden(1), slope = mlp_.slope](int64_t row, int64_t c, Vector<T> sum) {
          store(out + row * width + c, leaky_relu(sum, slope));
        });
    for (int64_t b = 0; b < block_count_; ++b) {
      list_excess(b, 1);
      for (int64_t column = 0; column < width; column += kPanel) {
        block_sums<true>({column, width, second_.row(column), width}, b, init, take);
      }
    }
  }

  // After the second layer; whether it pays that edges share products.
  bool shares_last() {
    const PositionLayer<T>& layer = mlp_.layers[1];
    const int64_t width = layer.out, count = tile_.count(), centers = mapped_;
    const int64_t rows = mapped_ + copied_;
    const int64_t cost = kFinding + rows * width + kCode * count + excess_;
    if (rows > capacity_ || !is_cheaper(cost + choose(1), count * width)) return false;
    mapped_ = rows;
    fill_inputs(1, [=](int64_t row, int64_t p) {
      if (row >= centers) return packed_row(layer, members_.get()[row - centers], p);
      const Vector<T> value = load(second_.row(row * width + p));
      return row < kCode ? value : value + load(layer.bias + p);
    });
    place_excess(1);
    return true;
  }

  // Takes the sums of a block one vector after the other.
  template <typename Done>
  static auto each(const Done& done) {
    return [=](const Block& block, int64_t column, const auto& sums) __attribute__((always_inline)) {
      constexpr int kVectors = sizeof sums[0] / sizeof sums[0][0];
#pragma GCC unroll 8
      for (int r = 0; r < kEdgeRows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) done(block.begin + r, column + v * kLanes<T>, sums[r][v]);
      }
    };
  }

  // take(block, column, init + ...) of a block whose excess is listed, one panel of columns; with kSigns,
  // notes the signs of the sums as the second layer's. Rows of a block that is not whole come out as well,
  // and are overwritten by the next one.
  template <bool kSigns, typename Init, typename Take>
  void block_sums(const Map& map, int64_t b, const Init& init, const Take& take) {
    if (map.columns - map.column >= kPanel) {
      panel_sums<kSigns, kPanelVectors>(map, b, init, take);
    } else {
      panel_sums<kSigns, 1>(map, b, init, take);
    }
  }

  // The block that starts at a row, or the next one.
  int64_t block_of(int64_t row) const {
    const Block* blocks = blocks_.get();
    return std::lower_bound(blocks, blocks + block_count_, row,
                            [](const Block& block, int64_t row) { return block.begin < row; }) -
           blocks;
  }

  template <bool kSigns, int kVectors, typename Init, typename Take>
  __attribute__((noinline)) void panel_sums(const Map& map, int64_t b, Init init, Take take) {
    const Block& block = this->block(b);
    const int64_t begin = block.begin, column = map.column, pitch = map.pitch, count = terms_;
    const int64_t code_stride = code_stride_, value_stride = value_stride_;
    const T *matrix = map.matrix, *codes = codes_.row(begin), *values = values_.get();
    const int32_t *rows = term_rows_.get(), *places = term_values_.get();
    Vector<T> sums[kEdgeRows][kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const Vector<T> center = load(matrix + (kCode + block.segment) * pitch + v * kLanes<T>);
#pragma GCC unroll 8
      for (int r = 0; r < kEdgeRows; ++r) sums[r][v] = init(begin + r, column + v * kLanes<T>) + center;
    }
    const auto add = [&](const T* row, const T* left, int64_t stride) __attribute__((always_inline)) {
      Vector<T> right[kVectors];
      for (int v = 0; v < kVectors; ++v) right[v] = load(row + v * kLanes<T>);
#pragma GCC unroll 8
      for (int r = 0; r < kEdgeRows; ++r) {
        const Vector<T> factor = splat(left[r * stride]);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sums[r][v] += factor * right[v];
      }
    };
#pragma GCC unroll 4
    for (int d = 0; d < kCode; ++d) add(matrix + d * pitch, codes + d * code_stride, 1);
    for (int64_t m = 0; m < count; ++m) add(matrix + rows[m] * pitch, values + places[m], value_stride);
    if constexpr (kSigns) factors_[1].find_signs(b, vectors(column), sums, block.end - begin);
    take(block, column, sums);
  }

  const PoolArgs<T>& args_;
  const PositionMlp<T>& mlp_;
  PositionTile<T>& tile_;
  const int64_t capacity_, widest_, most_rows_, code_stride_, value_stride_;
  int64_t block_count_ = 0;
  // Rows of the matrix: those mapped, and then those copied, of channels in members_.
  int64_t mapped_ = 0, copied_ = 0;
  // Edges and channels with an excess after the first layer.
  int64_t excess_ = 0;
  bool shared_ = false;
  Scratch<Block> blocks_;
  TileFactors<T> factors_[2];
  Scratch<T> codes_, inputs_, second_, matrix_;
  // What a block lists: of its edges, the excess of the first layer's channels and, after them, of the
  // second's; where a channel has its row of the matrix; the rows, and the places among an edge's values.
  int64_t terms_ = 0;
  Scratch<T> values_;
  Scratch<int32_t> places_, channels_, term_rows_, term_values_;
  Scratch<int32_t> members_;
};

}  // namespace
}  // namespace AVATAR_ISA
}  // namespace avatar
