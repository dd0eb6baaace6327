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

#include "common/position_tile.h"
#include "local_attention_pool/local_attention_pool_edges.h"
#include "local_attention_pool/local_attention_pool_simd.h"

namespace avatar {
namespace AVATAR_ISA {
namespace {

// Bit l: whether lane l has its sign bit set.
template <typename T>
inline uint32_t sign_bits(typename Vectors<T>::Bits value) {
  if constexpr (sizeof(T) == 4) {
    return _mm512_mask_cmpgt_epi32_mask(0xffff, (__m512i)(value ^ value), (__m512i)value);
  }
  uint32_t bits = 0;
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) bits |= uint32_t{value[lane] < 0} << lane;
  return bits;
}

// The lanes of the mask, moved together.
inline Vector<float> compress(uint32_t mask, Vector<float> value) {
  return _mm512_maskz_compress_ps(mask, (__m512)value);
}
inline Vector<double> compress(uint32_t mask, Vector<double> value) {
  return _mm512_maskz_compress_pd(mask, (__m512d)value);
}
// Reads and writes 16 numbers.
inline void compress(uint32_t mask, const int32_t* source, int32_t* target) {
  _mm512_storeu_si512(target, _mm512_maskz_compress_epi32(mask, _mm512_loadu_si512(source)));
}

// For position networks of one or two layers in three dimensions.
template <typename T>
class TileScores {
 public:
  static constexpr int kEdgeRows = 8;
  // At most kEdgeRows edges of one segment, and how many channels with an excess are listed for them.
  struct Block {
    int64_t begin, end, segment, terms;
  };

  TileScores(const PoolArgs<T>& args, PositionTile<T>& tile)
      : args_(args),
        mlp_(args.position),
        tile_(tile),
        capacity_(tile.capacity()),
        widest_(args.position.widest),
        most_terms_(2 * widest_),
        most_rows_(2 * capacity_ + 2 * most_terms_),
        code_stride_(capacity_ + kLanes<T>),
        value_stride_(most_terms_ + kLanes<T>),
        has_majority_(mlp_.slope >= T(1e-3)),
        blocks_(capacity_),
        signs_(2 * (capacity_ + 1) * vectors(widest_)),
        places_(widest_ + kNumbers),
        terms_(capacity_ * (most_terms_ + kNumbers)),
        codes_(kCode * code_stride_),
        values_((capacity_ + kEdgeRows) * value_stride_),
        factors_(3 * widest_),
        members_(most_rows_),
        inputs_((capacity_ + kRest) * widest_),
        second_((most_rows_ + kRest) * widest_),
        matrix_((most_rows_ + kRest) * kPanel) {
    std::fill_n(inputs_.get(), (capacity_ + kRest) * widest_, T(0));
    std::fill_n(codes_.get(), kCode * code_stride_, T(0));
    for (int64_t lane = 0; lane < kLanes<T>; ++lane) lane_bits_[lane] = 1 << lane;
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

  // Whether edges share their scores' products, which prepare(column) makes.
  bool shared() const { return shared_; }

  // What the edges of the tile share in one panel of columns.
  void prepare(int64_t column) const {
    make_matrix(mlp_.out_padded, column, args_.hidden, args_.position_weight, matrix_.get(), kPanel);
  }

  // One panel of columns of init + S r for the edges of segments [begin, end); their rows from 0 on, and at
  // most kRowBlock - 1 more.
  template <typename Init>
  void scores(int64_t begin, int64_t end, int64_t column, const Init& init, T* panel) const {
    const int64_t width = mlp_.out_padded, columns = args_.hidden, first = tile_.segment_begin(begin);
    const int64_t count = tile_.segment_end(end - 1) - first;
    if (!shared_) {
      return product_columns(
          round_up(count, kRowBlock), width, column, columns, tile_.output() + first * width, width,
          args_.position_weight, [=](int64_t row, int64_t c) { return init(first + row, c); },
          [=](int64_t row, int64_t c, Vector<T> sum) { store(panel + row * kPanel + c - column, sum); });
    }
    T* target = panel - first * kPanel - column;
    edge_sums<false>({column, columns, matrix_.get(), kPanel}, first, first + count, init,
                     each([=](int64_t row, int64_t c, Vector<T> sum) { store(target + row * kPanel + c, sum); }));
  }

  // The same of all segments, whose edges share their products, for a whole panel: take(block, column, sums),
  // the blocks one after the other.
  template <typename Init, typename Take>
  void take_scores(int64_t column, const Init& init, const Take& take) const {
    panel_sums<false, kPanelVectors>({column, args_.hidden, matrix_.get(), kPanel}, 0, tile_.count(), init,
                                     take);
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
  // By vectors of channels: whether any and whether all edges of a block have a negative sign.
  uint32_t* any(int64_t block) const { return signs_.row(2 * block * vectors(widest_)); }
  uint32_t* all(int64_t block) const { return any(block) + vectors(widest_); }
  // Whether the tile's factor is that of negative numbers, and whether it is zero.
  uint32_t* negative() const { return any(capacity_); }
  uint32_t* none() const { return all(capacity_); }
  // Of channels: the tile's factor, and what turns numbers above and below zero into their excess.
  T* factor() const { return factors_.get(); }
  T* excess_above() const { return factors_.row(widest_); }
  T* excess_below() const { return factors_.row(2 * widest_); }
  // Rows of the matrix that a block lists, and for each of its edges the values that go with them.
  int32_t* terms(int64_t block) const { return terms_.row(block * (most_terms_ + kNumbers)); }
  T* values(int64_t row) const { return values_.row(row * value_stride_); }

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
        blocks_.get()[block_count_++] = {row, std::min<int64_t>(row + kEdgeRows, end), s, 0};
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
  void first_layer() const {
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
  __attribute__((noinline)) void first_panel(int64_t column) const {
    const PositionLayer<T>& layer = mlp_.layers[0];
    const int64_t width = layer.out, stride = code_stride_;
    const T* weight = mlp_.from_center + column;
    const T slope = mlp_.slope;
    T* output = tile_.hidden(0) + column;
    for (int64_t b = 0; b < block_count_; ++b) {
      const Block block = blocks_.get()[b];
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
      find_signs<kEdgeRows, kVectors>(b, column, sums, block.end - block.begin);
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

  // Notes the signs of the first `rows` rows.
  template <int kRows, int kVectors>
  __attribute__((always_inline)) inline void find_signs(int64_t block, int64_t column,
                                                        const Vector<T> (&sums)[kRows][kVectors],
                                                        int64_t rows) const {
    using Bits = typename Vectors<T>::Bits;
    uint32_t *any_sign = any(block) + vectors(column), *all_signs = all(block) + vectors(column);
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      Bits somewhere{}, everywhere = ~Bits{};
      if (rows == kRows) {
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          somewhere |= (Bits)sums[r][v];
          everywhere &= (Bits)sums[r][v];
        }
      } else {
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const Bits counts = Bits{} - (r < rows);
          somewhere |= (Bits)sums[r][v] & counts;
          everywhere &= (Bits)sums[r][v] | ~counts;
        }
      }
      any_sign[v] = mlp_.slope == T(1) ? 0 : sign_bits<T>(somewhere);
      all_signs[v] = mlp_.slope == T(1) ? 0 : sign_bits<T>(everywhere);
    }
  }

  // Channels of a vector with an excess in a block.
  uint32_t listed(int64_t block, int64_t vector) const {
    const uint32_t other = negative()[vector];
    return (any(block)[vector] & ~other) | (~all(block)[vector] & other) | none()[vector];
  }

  // The channels of a vector that have a negative sign in more than half of the blocks, where blocks with both
  // signs count half.
  uint32_t mostly_negative(int64_t v) const {
    using Bits = typename Vectors<T>::Bits;
    using Lane = decltype(Bits{}[0] + 0);
    const Bits lanes = (Bits)load(reinterpret_cast<const T*>(lane_bits_));
    Bits balance{};
    for (int64_t b = 0; b < block_count_; ++b) {
      balance += (lanes & (Bits{} + static_cast<Lane>(any(b)[v]))) != 0;
      balance += (lanes & (Bits{} + static_cast<Lane>(all(b)[v]))) != 0;
    }
    // Each sign counted -1.
    return sign_bits<T>(balance + static_cast<Lane>(block_count_));
  }

  // Chooses the factors that list the fewest; how many edges and channels they leave with an excess. Does not
  // look closely where that is almost everywhere.
  int64_t choose(int64_t width) const {
    int64_t all_mixed = 0, excess = 0;
    for (int64_t v = 0; v < vectors(width); ++v) {
      uint32_t any_sign = 0, all_signs = ~uint32_t{0};
      for (int64_t b = 0; b < block_count_; ++b) {
        any_sign |= any(b)[v];
        all_signs &= all(b)[v];
      }
      negative()[v] = any_sign & all_signs;
      none()[v] = any_sign & ~all_signs;
      all_mixed += __builtin_popcount(none()[v]);
    }
    if (4 * all_mixed > 3 * width) return tile_.count() * width;
    for (int64_t v = 0; v < vectors(width); ++v) {
      const uint32_t mixed = none()[v];
      uint32_t chosen = negative()[v];
      if (has_majority_ && mixed) chosen |= mixed & mostly_negative(v);
      negative()[v] = chosen;
      none()[v] = has_majority_ ? 0 : mixed;
      for (int64_t b = 0; mixed && b < block_count_; ++b) {
        const Block& block = blocks_.get()[b];
        excess += (block.end - block.begin) * __builtin_popcount(listed(b, v));
      }
    }
    return excess;
  }

  // Adds to the blocks' terms the excess in what a layer gave, whose channels become rows of the matrix from
  // `mapped_` on. As good as without branches, since what is listed is hard to foretell.
  void add_excess(int64_t layer, int64_t width) {
    const T* output = tile_.hidden(layer);
    copied_ = 0;
    for (int64_t v = 0; v < vectors(width); ++v) {
      uint32_t channels = 0;
      for (int64_t b = 0; b < block_count_; ++b) channels |= listed(b, v);
      for (; channels; channels &= channels - 1) {
        const int64_t channel = v * kLanes<T> + __builtin_ctz(channels);
        places_.get()[channel] = static_cast<int32_t>(mapped_ + copied_);
        members_.get()[copied_++] = static_cast<int32_t>(channel);
      }
    }
    for (int64_t b = 0; b < block_count_; ++b) {
      Block& block = blocks_.get()[b];
      for (int64_t v = 0; v < vectors(width); ++v) {
        const uint32_t channels = listed(b, v);
        if (!channels) continue;
        const int64_t p = v * kLanes<T>, rows = block.end - block.begin, stride = value_stride_;
        const Vector<T> above = load(excess_above() + p), below = load(excess_below() + p);
        const T* source = output + block.begin * width + p;
        T* target = values(block.begin) + block.terms;
        const auto add = [=](int64_t r) {
          const Vector<T> value = load(source + r * width);
          store(target + r * stride, compress(channels, value * (value > T(0) ? above : below)));
        };
        if (rows == kEdgeRows) {
#pragma GCC unroll 8
          for (int r = 0; r < kEdgeRows; ++r) add(r);
        } else {
          for (int64_t r = 0; r < rows; ++r) add(r);
        }
        compress(channels, places_.row(p), terms(b) + block.terms);
        block.terms += __builtin_popcount(channels);
      }
    }
  }

  // After the first layer; whether it pays that edges share products.
  bool shares_first() {
    const int64_t width = mlp_.layers[0].out, segments = tile_.segments(), count = tile_.count();
    const int64_t cost = kFinding + (kCode + segments) * width + kCode * count;
    if (!is_cheaper(cost, count * width) || !is_near()) return false;
    excess_ = choose(width);
    if (!is_cheaper(cost + excess_, count * width)) return false;
    mapped_ = kCode + segments;
    fill_inputs(width, [=](int64_t row, int64_t p) {
      return row < kCode ? load(mlp_.from_center + row * width + p)
                         : own_part(tile_.segment_point(row - kCode), p);
    });
    add_excess(0, width);
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

  // What becomes the first rows of the matrix: source(row, p), which gives vectors of channels from p on,
  // times the factors.
  template <typename Source>
  void fill_inputs(int64_t width, const Source& source) const {
    using Bits = typename Vectors<T>::Bits;
    const Bits lanes = (Bits)load(reinterpret_cast<const T*>(lane_bits_));
    const Vector<T> zero{}, one = splat(T(1)), slope = splat(mlp_.slope);
    for (int64_t p = 0; p < width; p += kLanes<T>) {
      const auto has = [&](uint32_t bits) {
        return (lanes & (Bits{} + static_cast<decltype(lanes[0] + 0)>(bits))) != 0;
      };
      const Bits is_none = has(none()[p / kLanes<T>]), is_negative = has(negative()[p / kLanes<T>]);
      const Vector<T> factor = is_none ? zero : is_negative ? slope : one;
      // What an edge of the other sign has above the factor times its number.
      store(excess_above() + p, is_none ? one : is_negative ? one - slope : zero);
      store(excess_below() + p, is_none ? one : is_negative ? zero : one - one / slope);
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
  void second_layer() const {
    const PositionLayer<T>& layer = mlp_.layers[1];
    const int64_t width = layer.out;
    for (int64_t column = 0; column < width; column += kPanel) {
      T* matrix = second_.get() + column;
      make_matrix(layer.in, column, width, layer.weight, matrix, width);
      edge_sums<true>(
          {column, width, matrix, width}, 0, tile_.count(),
          [bias = layer.bias](int64_t, int64_t c) { return load(bias + c); },
          each([=, out = tile_.hidden(1), slope = mlp_.slope](int64_t row, int64_t c, Vector<T> sum) {
            store(out + row * width + c, leaky_relu(sum, slope));
          }));
    }
  }

  // After the second layer; whether it pays that edges share products.
  bool shares_last() {
    const PositionLayer<T>& layer = mlp_.layers[1];
    const int64_t width = layer.out, count = tile_.count(), centers = mapped_;
    const int64_t rows = mapped_ + copied_;
    const int64_t cost = kFinding + rows * width + kCode * count + excess_;
    if (rows > capacity_ || !is_cheaper(cost + choose(width), count * width)) return false;
    mapped_ = rows;
    fill_inputs(width, [=](int64_t row, int64_t p) {
      if (row >= centers) return packed_row(layer, members_.get()[row - centers], p);
      const Vector<T> value = load(second_.row(row * width + p));
      return row < kCode ? value : value + load(layer.bias + p);
    });
    add_excess(1, width);
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

  // take(block, column, init + ...) of the blocks of edges [first, last) of whole segments, one panel of
  // columns; with kSigns, notes the signs of the sums.
  template <bool kSigns, typename Init, typename Take>
  void edge_sums(const Map& map, int64_t first, int64_t last, const Init& init, const Take& take) const {
    if (map.columns - map.column >= kPanel) {
      panel_sums<kSigns, kPanelVectors>(map, first, last, init, take);
    } else {
      panel_sums<kSigns, 1>(map, first, last, init, take);
    }
  }

  template <bool kSigns, int kVectors, typename Init, typename Take>
  void panel_sums(const Map& map, int64_t first, int64_t last, const Init& init, const Take& take) const {
    for (int64_t b = block_of(first); b < block_count_ && blocks_.get()[b].begin < last; ++b) {
      block_sums<kSigns, kVectors>(map, b, init, take);
    }
  }

  // The block that starts at a row, or the next one.
  int64_t block_of(int64_t row) const {
    const Block* blocks = blocks_.get();
    return std::lower_bound(blocks, blocks + block_count_, row,
                            [](const Block& block, int64_t row) { return block.begin < row; }) -
           blocks;
  }

  // Rows of a block that is not whole come out as well, and are overwritten by the next one.
  template <bool kSigns, int kVectors, typename Init, typename Take>
  __attribute__((noinline)) void block_sums(const Map& map, int64_t b, Init init, Take take) const {
    const Block& block = blocks_.get()[b];
    const int64_t begin = block.begin, column = map.column, pitch = map.pitch;
    const int64_t code_stride = code_stride_, value_stride = value_stride_, count = block.terms;
    const T *matrix = map.matrix, *codes = codes_.row(begin), *numbers = values(begin);
    const int32_t* listed_rows = terms(b);
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
    for (int64_t m = 0; m < count; ++m) add(matrix + listed_rows[m] * pitch, numbers + m, value_stride);
    if constexpr (kSigns) find_signs<kEdgeRows, kVectors>(b, column, sums, block.end - begin);
    take(block, column, sums);
  }

  const PoolArgs<T>& args_;
  const PositionMlp<T>& mlp_;
  PositionTile<T>& tile_;
  const int64_t capacity_, widest_, most_terms_, most_rows_, code_stride_, value_stride_;
  // Whether an excess can be told from what LeakyReLU gave: a slope of next to 0 hides it.
  const bool has_majority_;
  int64_t block_count_ = 0;
  // Rows of the matrix: those mapped, and then those copied, of channels in members_.
  int64_t mapped_ = 0, copied_ = 0;
  // Edges and channels with an excess after the first layer.
  int64_t excess_ = 0;
  bool shared_ = false;
  Scratch<Block> blocks_;
  Scratch<uint32_t> signs_;
  Scratch<int32_t> places_, terms_;
  Scratch<T> codes_, values_, factors_;
  Scratch<int32_t> members_;
  Scratch<T> inputs_, second_, matrix_;
  std::conditional_t<sizeof(T) == 4, int32_t, int64_t> lane_bits_[kLanes<T>];
};

}  // namespace
}  // namespace AVATAR_ISA
}  // namespace avatar
