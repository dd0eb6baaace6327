// Scores of position codes by groups of edges over which most channels keep their sign. For *_simd.cpp only.
//
// Before LeakyReLU channel p of edge (i, j) is u_p = o_ip + w_p c with c = [p_i - p_j ; |p_i - p_j|]. With a
// factor s_p for all edges of a group, LeakyReLU gives s_p u_p and, to edges of the other sign, an excess. A
// linear map S of that is S diag(s) (o_i + w c), four columns for the group and one for each of its centres i
// in place of a product for each edge, and S times the excess, whose few channels are listed for blocks of
// edges. It is linear in c, o_i and the excess, so that a second layer goes the same way. Neighbours that are
// near each other leave little excess. A group is a tile, where its centres are near each other, too, or else
// one centre.
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
        has_majority_(mlp_.slope >= T(1e-3)),
        groups_(capacity_ + 1),
        blocks_(capacity_ + 1),
        signs_(4 * (capacity_ + 1) * (widest_ / kLanes<T>)),
        lists_{List(capacity_, widest_), List(capacity_, widest_)},
        union_(2 * capacity_ * widest_),
        terms_((capacity_ + kRest) * widest_),
        second_((capacity_ + kRest) * widest_),
        matrices_((capacity_ + kRest) * kPanel) {
    std::fill_n(terms_.get(), (capacity_ + kRest) * widest_, T(0));
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
    multiply(width, column, columns, args_.position_weight, matrices_.get(), kPanel, column);
    const Map map{args_.position_weight + width * column, matrices_.get(), kPanel, mlp_.depth == 2};
    if (columns - column >= kPanel) {
      edge_sums<kPanelVectors>(map, column, init, done);
    } else {
      edge_sums<1>(map, column, init, done);
    }
  }

 private:
  static constexpr int64_t kPanel = kPanelVectors * kLanes<T>;
  // Columns of c.
  static constexpr int64_t kCode = 4;
  // What finding a group's channels costs, in products of one edge and one channel.
  static constexpr int64_t kFinding = 24;
  static constexpr int kEdgeRows = kVectorBytes == 64 ? 8 : 4;
  // Rows of a product beyond whole ones of kRowBlock.
  static constexpr int kRest = 4;

  // At most kEdgeRows edges of one segment.
  struct Block {
    int64_t begin, end;
  };
  // Segments [begin, end) and their blocks. Where `linear`, rows of terms from `row` on: those of c, of the
  // centres and of the first layer's excess, `others` of them, where the second one is meant.
  struct Group {
    int64_t begin, end, first_block, last_block, row, others;
    bool linear;
  };
  // The channels of each block that have an excess after a layer, and it: channel by channel the block's edges.
  struct List {
    List(int64_t capacity, int64_t width)
        : width(width), counts(capacity + 1), channels((capacity + 1) * width), excess(capacity * width) {}
    int64_t width;
    Scratch<int64_t> counts;
    Scratch<int32_t> channels;
    Scratch<T> excess;
  };
  // A linear map of what LeakyReLU gave, one panel of columns: packed weights (depth, panel), and the groups'
  // matrices in rows `pitch` apart; whether it follows the second layer.
  struct Map {
    const T* weights;
    const T* matrices;
    int64_t pitch;
    bool second;
  };

  int64_t edges(const Group& group) const {
    return tile_.segment_end(group.end - 1) - tile_.segment_begin(group.begin);
  }
  int64_t vectors(int64_t width) const { return width / kLanes<T>; }
  // By vectors of channels: whether any and whether all edges of a block have a negative sign.
  uint32_t* any(int64_t block) const { return signs_.row(2 * block * vectors(widest_)); }
  uint32_t* all(int64_t block) const { return any(block) + vectors(widest_); }
  // Of a group: whether its factor is that of negative numbers, and whether it is zero.
  uint32_t* negative(int64_t group) const { return any(capacity_ + 1 + group); }
  uint32_t* none(int64_t group) const { return negative(group) + vectors(widest_); }
  // The places of a group's channels among those with an excess.
  int32_t* places(int64_t group) const { return union_.row(2 * group * widest_); }
  int32_t* members(int64_t group) const { return places(group) + widest_; }

  // Hence the terms of all groups are fewer than edges.
  static bool is_cheaper(int64_t cost, int64_t than) { return 4 * cost < 3 * than; }

  void find_signs(const T* output, int64_t width) const {
    using Bits = typename Vectors<T>::Bits;
    for (int64_t b = 0; b < block_count_; ++b) {
      const Block block = blocks_.get()[b];
      uint32_t *any_sign = any(b), *all_signs = all(b);
      for (int64_t p = 0; p < width; p += kLanes<T>) {
        Bits everywhere = ~Bits{}, somewhere{};
        for (int64_t row = block.begin; row < block.end; ++row) {
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

  // Channels of a vector with an excess in a block of a group.
  uint32_t listed(int64_t group, int64_t block, int64_t vector) const {
    const uint32_t other = negative(group)[vector];
    return (any(block)[vector] & ~other) | (~all(block)[vector] & other) | none(group)[vector];
  }

  // The factors of a group, those that list the fewest; how many edges and channels they leave with an excess.
  int64_t choose(int64_t g, int64_t width) const {
    const Group& group = groups_.get()[g];
    int64_t excess = 0;
    for (int64_t v = 0; v < vectors(width); ++v) {
      uint32_t any_sign = 0, all_signs = ~uint32_t{0};
      for (int64_t b = group.first_block; b < group.last_block; ++b) {
        any_sign |= any(b)[v];
        all_signs &= all(b)[v];
      }
      const uint32_t mixed = any_sign & ~all_signs;
      uint32_t chosen = any_sign & all_signs;
      for (uint32_t bits = has_majority_ ? mixed : 0; bits; bits &= bits - 1) {
        const int lane = __builtin_ctz(bits);
        int64_t balance = 0;
        for (int64_t b = group.first_block; b < group.last_block; ++b)
          balance += (any(b)[v] >> lane & 1) + (all(b)[v] >> lane & 1);
        if (balance > group.last_block - group.first_block) chosen |= uint32_t{1} << lane;
      }
      negative(g)[v] = chosen;
      none(g)[v] = has_majority_ ? 0 : mixed;
      for (int64_t b = group.first_block; mixed && b < group.last_block; ++b) {
        const Block block = blocks_.get()[b];
        excess += (block.end - block.begin) * __builtin_popcount(listed(g, b, v));
      }
    }
    return excess;
  }

  // Lists the excess of a group's blocks in what a layer gave; without factors, all of it.
  void list(int64_t g, const T* output, int64_t width, const List& list) const {
    const Group& group = groups_.get()[g];
    // What an edge of the other sign has above the factor times its number.
    const T above = T(1) - mlp_.slope, below = T(1) - T(1) / mlp_.slope;
    for (int64_t b = group.first_block; b < group.last_block; ++b) {
      const Block block = blocks_.get()[b];
      int32_t* channels = list.channels.row(b * list.width);
      T* excess = list.excess.row(block.begin * list.width);
      int64_t count = 0;
      const auto add = [&](int64_t p, auto value) {
        channels[count++] = static_cast<int32_t>(p);
        for (int64_t row = block.begin; row < block.end; ++row) *excess++ = value(output[row * width + p]);
      };
      for (int64_t p = 0; !group.linear && p < width; ++p) add(p, [](T r) { return r; });
      for (int64_t v = 0; group.linear && v < vectors(width); ++v) {
        for (uint32_t bits = listed(g, b, v); bits; bits &= bits - 1) {
          const int lane = __builtin_ctz(bits);
          const int64_t p = v * kLanes<T> + lane;
          if (none(g)[v] >> lane & 1) {
            add(p, [](T r) { return r; });
          } else if (negative(g)[v] >> lane & 1) {
            add(p, [=](T r) { return r > T(0) ? above * r : T(0); });
          } else {
            add(p, [=](T r) { return r < T(0) ? below * r : T(0); });
          }
        }
      }
      list.counts.get()[b] = count;
    }
  }

  // Groups of the first layer, one for the tile or one for each segment; whether any pays.
  bool find_groups() {
    const int64_t width = mlp_.layers[0].out, segments = tile_.segments();
    const int64_t by_edges = tile_.count() * width;
    // Not even without an excess?
    if (!is_cheaper(kFinding + (kCode + segments) * width + kCode * tile_.count(), by_edges)) return false;
    block_count_ = 0;
    bool finite = true;
    for (int64_t s = 0; s < segments; ++s) {
      for (int64_t row = tile_.segment_begin(s); row < tile_.segment_end(s); row += kEdgeRows)
        blocks_.get()[block_count_++] = {row, std::min<int64_t>(row + kEdgeRows, tile_.segment_end(s))};
      finite = finite && is_finite(s);
    }
    find_signs(tile_.hidden(0), width);
    count_ = 1;
    groups_.get()[0] = {0, segments, 0, block_count_, 0, 0, finite};
    int64_t cost = kFinding + (kCode + segments) * width + kCode * tile_.count();
    if (finite) cost += choose(0, width);
    if (!finite || !is_cheaper(cost, by_edges)) {
      if (!find_single_groups(width)) return false;
    }
    rows_ = 0;
    for (int64_t g = 0; g < count_; ++g) {
      Group& group = groups_.get()[g];
      list(g, tile_.hidden(0), width, lists_[0]);
      if (!group.linear) continue;
      group.row = rows_;
      rows_ += kCode + group.end - group.begin;
      fill_terms(g, width, [&](int64_t term, int64_t p) {
        return load(p + (term < kCode
                             ? mlp_.from_center + term * width
                             : mlp_.center_part + tile_.segment_point(group.begin + term - kCode) * width));
      });
    }
    return true;
  }

  // An infinite difference times a sum of weights is not the sum of its products with them.
  bool is_finite(int64_t segment) const {
    T distances = 0;
    for (int64_t row = tile_.segment_begin(segment); row < tile_.segment_end(segment); ++row)
      distances += tile_.code(row)[kCode - 1];
    return distances - distances == T(0);
  }

  bool find_single_groups(int64_t width) {
    bool any_linear = false;
    count_ = tile_.segments();
    for (int64_t s = 0, block = 0; s < count_; ++s) {
      Group& group = groups_.get()[s] = {s, s + 1, block, block, 0, 0, false};
      const int64_t n = edges(group);
      group.last_block = block += (n + kEdgeRows - 1) / kEdgeRows;
      if (n == 0 || !is_finite(s)) continue;
      const int64_t cost = kFinding + (kCode + 1) * width + kCode * n + choose(s, width);
      group.linear = is_cheaper(cost, n * width);
      any_linear = any_linear || group.linear;
    }
    return any_linear;
  }

  // Terms of a group times the channels' factors; source(term, p) gives a vector of channels from p on.
  template <typename Source>
  void fill_terms(int64_t g, int64_t width, const Source& source) const {
    using Bits = typename Vectors<T>::Bits;
    const Group& group = groups_.get()[g];
    const Bits lanes = (Bits)load(reinterpret_cast<const T*>(lane_bits_));
    const int64_t terms = kCode + group.end - group.begin + group.others;
    for (int64_t p = 0; p < width; p += kLanes<T>) {
      const auto has = [&](uint32_t bits) {
        return (lanes & (Bits{} + static_cast<decltype(lanes[0] + 0)>(bits))) != 0;
      };
      const Vector<T> factor = has(none(g)[p / kLanes<T>])       ? Vector<T>{}
                               : has(negative(g)[p / kLanes<T>]) ? splat(mlp_.slope)
                                                                 : splat(T(1));
      for (int64_t term = 0; term < terms; ++term) {
        store(terms_.row((group.row + term) * width + p), factor * source(term, p));
      }
    }
  }

  // The groups' terms (rows_, depth) times one panel of packed weights.
  void multiply(int64_t depth, int64_t column, int64_t columns, const T* packed, T* result, int64_t pitch,
                int64_t origin) const {
    const auto start = [](int64_t, int64_t) { return Vector<T>{}; };
    const auto done_from = [=](int64_t first) {
      return [=](int64_t row, int64_t c, Vector<T> sum) {
        store(result + (first + row) * pitch + c - origin, sum);
      };
    };
    const int64_t whole = rows_ / kRowBlock * kRowBlock;
    const T* terms = terms_.get();
    product_columns(whole, depth, column, columns, terms, depth, packed, start, done_from(0));
    product_columns<kRest>(round_up(rows_ - whole, kRest), depth, column, columns, terms + whole * depth,
                           depth, packed, start, done_from(whole));
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
    const auto start = [bias = layer.bias](int64_t, int64_t c) { return load(bias + c); };
    const auto done = [=, out = tile_.hidden(1), slope = mlp_.slope](int64_t row, int64_t c, Vector<T> sum) {
      store(out + row * width + c, leaky_relu(sum, slope));
    };
    for (int64_t column = 0; column < width; column += kPanel) {
      multiply(layer.in, column, width, layer.weight, second_.get(), width, 0);
      const Map map{layer.weight + layer.in * column, second_.get() + column, width, false};
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
    rows_ = 0;
    for (int64_t g = 0; g < count_; ++g) {
      Group& group = groups_.get()[g];
      const int64_t from = group.row, centers = kCode + group.end - group.begin;
      if (group.linear) {
        const int64_t before = join(g, layer.in);
        const int64_t cost = kFinding + (centers + group.others) * width + kCode * edges(group) + before;
        group.linear = is_cheaper(cost + choose(g, width), edges(group) * width);
      }
      list(g, tile_.hidden(1), width, lists_[1]);
      if (!group.linear) continue;
      any_linear = true;
      group.row = rows_;
      rows_ += centers + group.others;
      fill_terms(g, width, [&](int64_t term, int64_t p) {
        if (term >= centers) return packed_row(layer, members(g)[term - centers], p);
        const Vector<T> value = load(second_.row((from + term) * width + p));
        return term < kCode ? value : value + load(layer.bias + p);
      });
    }
    return any_linear;
  }

  // The first layer's channels that any block of a group lists; how many edges and channels they list.
  int64_t join(int64_t g, int64_t width) const {
    Group& group = groups_.get()[g];
    std::fill_n(places(g), width, int32_t{-1});
    int64_t excess = 0;
    group.others = 0;
    for (int64_t b = group.first_block; b < group.last_block; ++b) {
      const int64_t count = lists_[0].counts.get()[b];
      const int32_t* channels = lists_[0].channels.row(b * widest_);
      excess += count * (blocks_.get()[b].end - blocks_.get()[b].begin);
      for (int64_t m = 0; m < count; ++m) {
        int32_t& place = places(g)[channels[m]];
        if (place >= 0) continue;
        place = static_cast<int32_t>(group.others);
        members(g)[group.others++] = channels[m];
      }
    }
    return excess;
  }

  // done(init + ...) of all edges, one panel of columns.
  template <int kVectors, typename Init, typename Done>
  void edge_sums(const Map& map, int64_t column, const Init& init, const Done& done) const {
    for (int64_t g = 0; g < count_; ++g) {
      const Group& group = groups_.get()[g];
      int64_t segment = group.begin;
      for (int64_t b = group.first_block; b < group.last_block; ++b) {
        const Block block = blocks_.get()[b];
        while (block.begin >= tile_.segment_end(segment)) ++segment;
        const T* center = map.matrices + (group.row + kCode + segment - group.begin) * map.pitch;
        int64_t row = block.begin;
        if (row + kEdgeRows == block.end) {
          block_sums<kEdgeRows, kVectors>(map, g, b, center, row, column, init, done);
          continue;
        }
        for (; row < block.end; ++row) block_sums<1, kVectors>(map, g, b, center, row, column, init, done);
      }
    }
  }

  template <int kRows, int kVectors, typename Init, typename Done>
  void block_sums(const Map& map, int64_t g, int64_t b, const T* center, int64_t row, int64_t column,
                  const Init& init, const Done& done) const {
    const Group& group = groups_.get()[g];
    const Block block = blocks_.get()[b];
    // Rows in the lists.
    const int64_t rows = kRows == kEdgeRows ? kEdgeRows : block.end - block.begin;
    Vector<T> sums[kRows][kVectors];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) sums[r][v] = init(row + r, column + v * kLanes<T>);
    }
    const auto add = [&](const T* weights, const T* values, int64_t stride) {
      Vector<T> right[kVectors];
      for (int v = 0; v < kVectors; ++v) right[v] = load(weights + v * kLanes<T>);
      for (int r = 0; r < kRows; ++r) {
        const Vector<T> left = splat(values[r * stride]);
        for (int v = 0; v < kVectors; ++v) sums[r][v] += left * right[v];
      }
    };
    if (group.linear) {
      for (int v = 0; v < kVectors; ++v) {
        const Vector<T> right = load(center + v * kLanes<T>);
        for (int r = 0; r < kRows; ++r) sums[r][v] += right;
      }
      const T* matrix = map.matrices + group.row * map.pitch;
      for (int64_t d = 0; d < kCode; ++d) add(matrix + d * map.pitch, tile_.code(row) + d, mlp_.code_padded);
    }
    const auto offset = [&](const List& list) {
      return list.excess.row(block.begin * list.width) + row - block.begin;
    };
    if (group.linear && map.second) {
      const T* values = offset(lists_[0]);
      const T* matrix = map.matrices + (group.row + kCode + group.end - group.begin) * map.pitch;
      const int32_t* channels = lists_[0].channels.row(b * widest_);
      const int64_t count = lists_[0].counts.get()[b];
      for (int64_t m = 0; m < count; ++m, values += rows)
        add(matrix + places(g)[channels[m]] * map.pitch, values, 1);
    }
    const List& list = lists_[map.second];
    const T* values = offset(list);
    const int32_t* channels = list.channels.row(b * widest_);
    const int64_t count = list.counts.get()[b];
    for (int64_t m = 0; m < count; ++m, values += rows)
      add(map.weights + channels[m] * kVectors * kLanes<T>, values, 1);
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) done(row + r, column + v * kLanes<T>, sums[r][v]);
    }
  }

  const PoolArgs<T>& args_;
  const PositionMlp<T>& mlp_;
  PositionTile<T>& tile_;
  const int64_t capacity_, widest_;
  // Whether an excess can be told from what LeakyReLU gave, a slope of next to 0 hides it.
  const bool has_majority_;
  int64_t count_ = 0, block_count_ = 0, rows_ = 0;
  bool grouped_ = false;
  Scratch<Group> groups_;
  Scratch<Block> blocks_;
  Scratch<uint32_t> signs_;
  const List lists_[2];
  Scratch<int32_t> union_;
  Scratch<T> terms_, second_, matrices_;
  std::conditional_t<sizeof(T) == 4, int32_t, int64_t> lane_bits_[kLanes<T>];
};

}  // namespace
}  // namespace AVATAR_ISA
}  // namespace avatar
