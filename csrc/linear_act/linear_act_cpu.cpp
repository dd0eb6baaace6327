#include <algorithm>

#include "common/tile_layout.h"
#include "linear_act/linear_act_simd.h"

namespace avatar {
namespace {

// The first of `count` numbers outside [0, end), or -1.
int64_t first_outside(const int64_t* numbers, int64_t count, int64_t end) {
  constexpr int64_t kBlock = 1024;
  const auto is_outside = [=](int64_t number) {
    return static_cast<uint64_t>(number) >= static_cast<uint64_t>(end);
  };
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t last = std::min(first + kBlock, count);
    uint64_t any = 0;
    for (int64_t i = first; i < last; ++i) any |= is_outside(numbers[i]);
    if (any) return std::find_if(numbers + first, numbers + last, is_outside) - numbers;
  }
  return -1;
}

// x (B, N, C), beside (B, N, D), weight (O, C + D), bias (O,), rest (B, M, O), places (N,) int64 -> (B, N,
// O).
Tensor linear_act_cpu(const Tensor& x_in, const std::optional<Tensor>& beside_in, const Tensor& weight_in,
                      const std::optional<Tensor>& bias_in, const std::optional<Tensor>& rest_in,
                      const std::optional<Tensor>& places_in, double negative_slope) {
  const Tensor x = to_compute(x_in), weight = to_compute(weight_in);
  std::optional<Tensor> beside, bias, rest, places;
  if (beside_in) beside = to_compute(*beside_in);
  if (bias_in) bias = to_compute(*bias_in);
  if (rest_in) rest = to_compute(*rest_in);
  if (places_in) places = torch::stable::contiguous(*places_in);
  const int64_t rows = x.size(1), own = x.size(2), columns = weight.size(0), depth = weight.size(1);
  const int64_t rest_rows = rest ? rest->size(1) : 0;
  const int64_t* place = places ? const_data<int64_t>(*places) : nullptr;
  const int64_t bad = place ? first_outside(place, rows, rest_rows) : -1;
  if (bad >= 0) {
    throw std::out_of_range("linear_act: places[" + std::to_string(bad) + "] = " +
                            std::to_string(place[bad]) + "; expected an index in [0, " +
                            std::to_string(rest_rows) + ")");
  }
  Tensor y = new_result(x, {x.size(0), rows, columns});
  if (y.numel() == 0) return to_type(y, x_in.scalar_type());
  dispatch_compute(x.scalar_type(), "linear_act", [&](auto zero) {
    using T = decltype(zero);
    const TileLayout<T> layout = TileLayout<T>::of({columns});
    const int64_t columns_padded = layout.padded(columns);
    const T* numbers = const_data<T>(weight);
    const Buffer<T> packed = layout.pack(depth, columns_padded, [&](int64_t c, int64_t o) {
      return o < columns ? numbers[o * depth + c] : T(0);
    });
    std::vector<T> padded_bias(columns_padded, T(0));
    if (bias) std::copy_n(const_data<T>(*bias), columns, padded_bias.begin());
    const int64_t grain = std::max<int64_t>(48, (1 << 18) / std::max<int64_t>(1, depth * columns));
    torch::stable::parallel_for(0, x.size(0) * rows, grain, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t b = begin / rows, stop = std::min(end, (b + 1) * rows);
        const LinearActArgs<T> args{const_data<T>(x) + b * rows * own,
                                    beside ? const_data<T>(*beside) + b * rows * (depth - own) : nullptr,
                                    packed.get(),
                                    padded_bias.data(),
                                    rest ? const_data<T>(*rest) + b * rest_rows * columns : nullptr,
                                    place,
                                    mutable_data<T>(y) + b * rows * columns,
                                    depth,
                                    own,
                                    columns,
                                    columns_padded,
                                    static_cast<T>(negative_slope)};
        AVATAR_ISA_CALL_OF(layout.isa, linear_act_rows, args, begin - b * rows, stop - b * rows);
        begin = stop;
      }
    });
  });
  return to_type(y, x_in.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avatar_ops, CPU, m) {
  m.impl("linear_act", TORCH_BOX(&linear_act_cpu));
}

}  // namespace avatar
