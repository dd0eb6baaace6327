#include "linear_act/linear_act_simd.h"

#include "common/tile_product.h"

namespace avatar {
namespace AVATAR_ISA {
namespace {

// Rows whose numbers stay in the second-level cache while all panels of columns go over them.
constexpr int64_t kChunk = 192;

template <typename T>
void rows_of_chunk(const LinearActArgs<T>& args, const T* x, int64_t begin, int64_t rows, int64_t valid) {
  const int64_t columns = args.columns;
  const auto start = [=, bias = args.bias, rest = args.rest, places = args.places](int64_t row,
                                                                                   int64_t column) {
    Vector<T> sum = load(bias + column);
    if (!rest) return sum;
    row = begin + std::min(row, valid - 1);
    const T* added = rest + (places ? places[row] : row) * columns + column;
    if (column + kLanes<T> <= columns) return sum + load(added);
    T lanes[kLanes<T>] = {};
    std::copy_n(added, columns - column, lanes);
    return sum + load(lanes);
  };
  const auto done = [=, y = args.y, slope = args.negative_slope](int64_t row, int64_t column, Vector<T> sum) {
    if (row >= valid) return;
    store_some(y + (begin + row) * columns + column, leaky_relu(sum, slope), columns - column);
  };
  product(rows, args.depth, args.columns_padded, x, args.depth, args.weight, start, done);
}

template <typename T>
void linear_act(const LinearActArgs<T>& args, int64_t begin, int64_t end) {
  const int64_t own = args.own_depth, other = args.depth - own;
  Scratch<T> copy((args.beside ? kChunk : kRowBlock) * args.depth);
  // Rows from `begin` on, the last one as often as it takes to fill up.
  const auto copied = [&](int64_t rows) {
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t from = std::min(begin + row, end - 1);
      T* target = std::copy_n(args.x + from * own, own, copy.row(row * args.depth));
      if (args.beside) std::copy_n(args.beside + from * other, other, target);
    }
    return copy.get();
  };
  for (; end - begin >= kRowBlock;) {
    const int64_t rows = std::min(kChunk, (end - begin) / kRowBlock * kRowBlock);
    rows_of_chunk(args, args.beside ? copied(rows) : args.x + begin * own, begin, rows, rows);
    begin += rows;
  }
  if (begin < end) rows_of_chunk(args, copied(kRowBlock), begin, kRowBlock, end - begin);
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
