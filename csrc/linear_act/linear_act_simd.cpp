#include "linear_act/linear_act_simd.h"

#include "common/tile_product.h"

namespace avatar {
namespace AVATAR_ISA {
namespace {

// Rows whose numbers stay in the second-level cache while all panels of columns go over them.
constexpr int64_t kChunk = 192;

// Rows of the left side: of x and of what is beside it.
template <typename T>
struct Rows {
  const T* x;
  int64_t depth;
  Beside<T> beside;
};

// Rows [begin, begin + rows), where columns fill whole vectors.
template <typename T>
void whole_rows(const LinearActArgs<T>& args, const Rows<T>& left, int64_t begin, int64_t rows) {
  const int64_t columns = args.columns;
  const auto run = [=](const auto& start) {
    const auto done = [=, y = args.y + begin * columns, slope = args.negative_slope](
                          int64_t row, int64_t column, Vector<T> sum) {
      store(y + row * columns + column, leaky_relu(sum, slope));
    };
    product<kRowBlock, true>(rows, left.depth, columns, left.x, left.depth, args.weight, start, done,
                             left.beside);
  };
  const T *bias = args.bias, *rest = args.rest;
  if (!rest) return run([=](int64_t, int64_t column) { return load(bias + column); });
  if (args.places) {
    return run([=, places = args.places + begin](int64_t row, int64_t column) {
      return load(bias + column) + load(rest + places[row] * columns + column);
    });
  }
  run([=, rest = rest + begin * columns](int64_t row, int64_t column) {
    return load(bias + column) + load(rest + row * columns + column);
  });
}

// The same for any columns and targets, and the first `valid` rows, by way of a tile (rows, columns_padded).
template <typename T>
void some_rows(const LinearActArgs<T>& args, const Rows<T>& left, int64_t begin, int64_t rows, int64_t valid,
               T* tile) {
  const int64_t columns = args.columns, width = args.columns_padded;
  const auto target = [=, y = args.y, targets = args.targets](int64_t row) {
    return y + (targets ? targets[begin + row] : begin + row) * columns;
  };
  if (!args.rest) {
    return product(
        rows, left.depth, width, left.x, left.depth, args.weight,
        [bias = args.bias](int64_t, int64_t column) { return load(bias + column); },
        [=, slope = args.negative_slope](int64_t row, int64_t column, Vector<T> sum) {
          if (row < valid) store_some(target(row) + column, leaky_relu(sum, slope), columns - column);
        },
        left.beside);
  }
  for (int64_t row = 0; row < rows; ++row) {
    std::copy_n(args.bias, width, tile + row * width);
    if (row >= valid) continue;
    const T* added = args.rest + (args.places ? args.places[begin + row] : begin + row) * columns;
    for (int64_t column = 0; column < columns; ++column) tile[row * width + column] += added[column];
  }
  product(
      rows, left.depth, width, left.x, left.depth, args.weight,
      [=](int64_t row, int64_t column) { return load(tile + row * width + column); },
      [=, slope = args.negative_slope](int64_t row, int64_t column, Vector<T> sum) {
        store(tile + row * width + column, leaky_relu(sum, slope));
      },
      left.beside);
  for (int64_t row = 0; row < valid; ++row) std::copy_n(tile + row * width, columns, target(row));
}

template <typename T>
void linear_act(const LinearActArgs<T>& args, int64_t begin, int64_t end) {
  const int64_t own = args.own_depth, other = args.depth - own;
  const bool is_whole = args.columns == args.columns_padded && !args.targets;
  Scratch<T> tile((is_whole ? kRowBlock : kChunk) * args.columns_padded);
  for (; end - begin >= kRowBlock;) {
    const int64_t rows = std::min(kChunk, (end - begin) / kRowBlock * kRowBlock);
    Rows<T> left{args.x + begin * own, own, {}};
    if (args.beside) left.beside = {args.beside + begin * other, other, other};
    if (is_whole) {
      whole_rows(args, left, begin, rows);
    } else {
      some_rows(args, left, begin, rows, rows, tile.get());
    }
    begin += rows;
  }
  if (begin == end) return;
  // The last row as often as it takes to fill a block.
  Scratch<T> copy(kRowBlock * args.depth);
  T* beside = copy.row(kRowBlock * own);
  for (int64_t row = 0; row < kRowBlock; ++row) {
    const int64_t from = std::min(begin + row, end - 1);
    std::copy_n(args.x + from * own, own, copy.row(row * own));
    if (args.beside) std::copy_n(args.beside + from * other, other, beside + row * other);
  }
  some_rows(args, {copy.get(), own, {beside, other, other}}, begin, kRowBlock, end - begin, tile.get());
}

}  // namespace

void linear_act_rows(const LinearActArgs<float>& args, int64_t begin, int64_t end) {
  linear_act(args, begin, end);
}
void linear_act_rows(const LinearActArgs<double>& args, int64_t begin, int64_t end) {
  linear_act(args, begin, end);
}

}  // namespace AVATAR_ISA
}  // namespace avatar
