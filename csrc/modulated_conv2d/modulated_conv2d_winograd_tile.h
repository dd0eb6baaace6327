// What the files of the Winograd form share: transforms, tiles, products. For *_simd.cpp only; everything
// here is local to the including file.
#pragma once

#include <algorithm>
#include <utility>

#include "common/vector.h"
#include "modulated_conv2d/modulated_conv2d_winograd_simd.h"

namespace avatar {
namespace AVATAR_ISA {
namespace {

using Floats = Vector<float>;

constexpr int64_t kLanes = Lanes<float>::kCount;
constexpr int64_t kTile = kWinogradTile, kSide = kWinogradSide;
// Accumulators of a product: 8 x 3 of 32 registers, or 4 x 3 of 16.
constexpr int64_t kRows = kVectorBytes == 64 ? 8 : 4;
constexpr int64_t kPanelVectors = 3, kPanel = kPanelVectors * kLanes;

// The points are 0, +-a, +-b and infinity, with a b = 1.
constexpr float a = 2. / 3, a2 = 4. / 9, a3 = 8. / 27, b = 3. / 2, b2 = 9. / 4, b3 = 27. / 8;
constexpr float a2b2 = 97. / 36;  // a^2 + b^2
// Reciprocals of the products of differences of the points.
constexpr float at_a = -81. / 130, at_b = 8. / 65;

// With stride 2 the outer taps are those of a filter (0, g0, g2), and the middle one takes the place of the
// point 0, where that filter is 0.
template <bool kStrided>
inline void transform_weight(const Floats* g, int64_t step, Floats* w, int64_t w_step) {
  const Floats g0 = g[0], g1 = g[step], g2 = g[2 * step];
  Floats even_a = g2 * (at_a * a2), even_b = g2 * (at_b * b2);
  if (!kStrided) {
    even_a += g0 * at_a;
    even_b += g0 * at_b;
  }
  const Floats odd = kStrided ? g0 : g1;
  const Floats odd_a = odd * (at_a * a), odd_b = odd * (at_b * b);
  w[0] = kStrided ? g1 : g0;
  w[w_step] = even_a + odd_a;
  w[2 * w_step] = even_a - odd_a;
  w[3 * w_step] = even_b + odd_b;
  w[4 * w_step] = even_b - odd_b;
  w[5 * w_step] = g2;
}

// Its transpose, for gradients.
template <bool kStrided>
inline void transform_weight_gradient(const Floats* w, int64_t step, Floats* g, int64_t g_step) {
  const Floats sum_a = (w[step] + w[2 * step]) * at_a, difference_a = (w[step] - w[2 * step]) * at_a;
  const Floats sum_b = (w[3 * step] + w[4 * step]) * at_b, difference_b = (w[3 * step] - w[4 * step]) * at_b;
  const Floats odd = difference_a * a + difference_b * b;
  g[0] = kStrided ? odd : w[0] + sum_a + sum_b;
  g[g_step] = kStrided ? w[0] : odd;
  g[2 * g_step] = sum_a * a2 + sum_b * b2 + w[5 * step];
}

template <typename Store>
inline void transform_input(Floats d0, Floats d1, Floats d2, Floats d3, Floats d4, Floats d5,
                            const Store& store_part) {
  const Floats even_a = d4 - d2 * b2, odd_a = d3 * a - d1 * b;
  const Floats even_b = d4 - d2 * a2, odd_b = d3 * b - d1 * a;
  store_part(0, d0 + d4 - d2 * a2b2);
  store_part(1, even_a + odd_a);
  store_part(2, even_a - odd_a);
  store_part(3, even_b + odd_b);
  store_part(4, even_b - odd_b);
  store_part(5, d1 + d5 - d3 * a2b2);
}

template <typename Load, typename Store>
inline void transform_output(const Load& product, const Store& store_pixel) {
  const Floats sum_a = product(1) + product(2), difference_a = product(1) - product(2);
  const Floats sum_b = product(3) + product(4), difference_b = product(3) - product(4);
  store_pixel(0, product(0) + sum_a + sum_b);
  store_pixel(1, difference_a * a + difference_b * b);
  store_pixel(2, sum_a * a2 + sum_b * b2);
  store_pixel(3, difference_a * a3 + difference_b * b3 + product(5));
}

// Its transpose.
template <typename Store>
inline void transform_gradient(Floats y0, Floats y1, Floats y2, Floats y3, const Store& store_part) {
  const Floats even_a = y0 + y2 * a2, odd_a = y1 * a + y3 * a3;
  const Floats even_b = y0 + y2 * b2, odd_b = y1 * b + y3 * b3;
  store_part(0, y0);
  store_part(1, even_a + odd_a);
  store_part(2, even_a - odd_a);
  store_part(3, even_b + odd_b);
  store_part(4, even_b - odd_b);
  store_part(5, y3);
}

// How the pixels of a tile in one direction become its parts: kLines pixels, tiles kStep pixels apart.
struct PlainInput {
  static constexpr int64_t kLines = 6, kStep = 4, kParts = 6;
  template <typename Load, typename Store>
  static void transform(const Load& line, const Store& store_part) {
    transform_input(line(0), line(1), line(2), line(3), line(4), line(5), store_part);
  }
};

struct PlainGradient {
  static constexpr int64_t kLines = 4, kStep = 4, kParts = 6;
  template <typename Load, typename Store>
  static void transform(const Load& line, const Store& store_part) {
    transform_gradient(line(0), line(1), line(2), line(3), store_part);
  }
};

// Of the smaller image of a stride of 2.
struct SmallTile {
  static constexpr int64_t kLines = 4, kStep = 4, kParts = 8;
  template <typename Load, typename Store>
  static void transform(const Load& line, const Store& store_part) {
    const Floats y1 = line(1), y2 = line(2);
    transform_gradient(line(0), y1, y2, line(3), store_part);
    store_part(6, y1);
    store_part(7, y2);
  }
};

// Of the larger image.
struct LargeTile {
  static constexpr int64_t kLines = 9, kStep = 8, kParts = 9;
  template <typename Load, typename Store>
  static void transform(const Load& line, const Store& store_part) {
    const Floats odd[4] = {line(1), line(3), line(5), line(7)};
    // The point 0 of the even pixels has no weight, and its place is that of an odd one.
    transform_input(Floats{}, line(0), line(2), line(4), line(6), line(8), [&](int k, Floats value) {
      if (k > 0) store_part(k, value);
    });
    store_part(0, odd[0]);
    store_part(6, odd[1]);
    store_part(7, odd[2]);
    store_part(8, odd[3]);
  }
};

// How products in one direction become pixels: kProducts of them, kLines pixels, tiles kStep pixels apart.
struct PlainOutput {
  static constexpr int64_t kProducts = 6, kLines = 4, kStep = 4;
  template <typename Load, typename Store>
  static void transform(const Load& product, const Store& store_pixel) {
    transform_output(product, store_pixel);
  }
};

struct SmallOutput {
  static constexpr int64_t kProducts = 9, kLines = 4, kStep = 4;
  template <typename Load, typename Store>
  static void transform(const Load& product, const Store& store_pixel) {
    transform_output(product,
                     [&](int i, Floats value) { store_pixel(i, i > 0 ? value + product(5 + i) : value); });
  }
};

// The transpose of LargeTile. The last pixel is to be added to the first of the next tile.
struct LargeOutput {
  static constexpr int64_t kProducts = 9, kLines = 9, kStep = 8;
  template <typename Load, typename Store>
  static void transform(const Load& product, const Store& store_pixel) {
    const Floats sum_a = product(1) + product(2), difference_a = product(1) - product(2);
    const Floats sum_b = product(3) + product(4), difference_b = product(3) - product(4);
    const Floats last = product(5);
    store_pixel(0, last - difference_a * b - difference_b * a);
    store_pixel(1, product(0));
    store_pixel(2, -sum_a * b2 - sum_b * a2);
    store_pixel(3, product(6));
    store_pixel(4, difference_a * a + difference_b * b - last * a2b2);
    store_pixel(5, product(7));
    store_pixel(6, sum_a + sum_b);
    store_pixel(7, product(8));
    store_pixel(8, last);
  }
};

template <size_t... kLane>
inline Floats zip_low(Floats a, Floats b, std::index_sequence<kLane...>) {
  return __builtin_shufflevector(a, b, (kLane / 2 + kLane % 2 * kLanes)...);
}

template <size_t... kLane>
inline Floats zip_high(Floats a, Floats b, std::index_sequence<kLane...>) {
  return __builtin_shufflevector(a, b, ((kLanes + kLane) / 2 + kLane % 2 * kLanes)...);
}

template <size_t... kLane>
inline Floats even_lanes(Floats a, Floats b, std::index_sequence<kLane...>) {
  return __builtin_shufflevector(a, b, (2 * kLane)...);
}

template <size_t... kLane>
inline Floats odd_lanes(Floats a, Floats b, std::index_sequence<kLane...>) {
  return __builtin_shufflevector(a, b, (2 * kLane + 1)...);
}

// Of all lanes of kCount vectors in a row, numbered in binary, the highest bit of the numbers becomes the
// lowest.
template <int64_t kCount>
inline void rotate_lanes(Floats (&vectors)[kCount]) {
  Floats rotated[kCount];
  for (int64_t i = 0; i < kCount / 2; ++i) {
    rotated[2 * i] = zip_low(vectors[i], vectors[i + kCount / 2], std::make_index_sequence<kLanes>());
    rotated[2 * i + 1] = zip_high(vectors[i], vectors[i + kCount / 2], std::make_index_sequence<kLanes>());
  }
  for (int64_t i = 0; i < kCount; ++i) vectors[i] = rotated[i];
}

// The first lanes of all vectors, then the second ones, and so on.
template <int64_t kCount>
inline void interleave(Floats (&vectors)[kCount]) {
#pragma GCC unroll 4
  for (int64_t count = kCount; count > 1; count /= 2) rotate_lanes(vectors);
}

// The reverse.
template <int64_t kCount>
inline void deinterleave(Floats (&vectors)[kCount]) {
#pragma GCC unroll 4
  for (int64_t count = kCount; count > 1; count /= 2) {
    Floats rotated[kCount];
    for (int64_t i = 0; i < kCount / 2; ++i) {
      const Floats a = vectors[2 * i], b = vectors[2 * i + 1];
      rotated[i] = even_lanes(a, b, std::make_index_sequence<kLanes>());
      rotated[i + kCount / 2] = odd_lanes(a, b, std::make_index_sequence<kLanes>());
    }
    for (int64_t i = 0; i < kCount; ++i) vectors[i] = rotated[i];
  }
}

// What the next products read, left and right, of the same depth: fetched ahead, the right one in as many
// pieces as there are blocks of rows.
struct NextFactors {
  const float* left;
  const float* right;
};

// target (kRows, kVectors), rows target_row apart, (+)= left (depth, kRows) transposed times right (depth,
// kPanel).
template <int kVectors, bool kAccumulate>
inline void product(int64_t depth, const float* left, const float* right, const NextFactors& next,
                    float* target, int64_t target_row) {
  Floats sums[kRows][kVectors] = {};
  for (int64_t d = 0; d < depth; ++d) {
    __builtin_prefetch(next.left + d * kRows);
    __builtin_prefetch(next.right + d * (kPanel * kRows / kWinogradOutputs));
    Floats values[kVectors];
    for (int v = 0; v < kVectors; ++v) values[v] = load(right + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const float factor = left[r];
      for (int v = 0; v < kVectors; ++v) sums[r][v] += factor * values[v];
    }
    left += kRows;
    right += kPanel;
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      float* element = target + r * target_row + v * kLanes;
      store(element, kAccumulate ? load(element) + sums[r][v] : sums[r][v]);
    }
  }
}

// Tiles beside each other in one row of one sample.
struct Segment {
  int64_t sample, row, column;  // of its first tile
  int64_t begin, count;         // within the panel
};

// Those of the panel from `tile` on, before `end`.
inline int64_t find_segments(const WinogradConv2d& args, int64_t tile, int64_t end, Segment* segments) {
  const int64_t per_sample = args.tile_rows * args.tile_columns;
  end = std::min(tile + kPanel, end);
  int64_t found = 0;
  for (int64_t t = tile; t < end; ++found) {
    const int64_t column = t % args.tile_columns;
    const int64_t count = std::min(args.tile_columns - column, end - t);
    segments[found] = {t / per_sample, t % per_sample / args.tile_columns, column, t - tile, count};
    t += count;
  }
  return found;
}

inline int64_t count_tiles(const WinogradConv2d& args) {
  return args.batch * args.tile_rows * args.tile_columns;
}

}  // namespace
}  // namespace AVATAR_ISA
}  // namespace avatar
