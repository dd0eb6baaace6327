#include "common/tile_layout.h"
#include "linear_act/linear_act_simd.h"

namespace avatar {
namespace {

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
  FirstBad bad;
  for (int64_t row = 0; places && row < rows; ++row) {
    const int64_t place = const_data<int64_t>(*places)[row];
    if (place < 0 || place >= rest_rows) bad.report(row);
  }
  if (bad.found()) {
    throw std::out_of_range("linear_act: places[" + std::to_string(bad.position()) +
                            "] = " + std::to_string(const_data<int64_t>(*places)[bad.position()]) +
                            "; expected an index in [0, " + std::to_string(rest_rows) + ")");
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
                                    places ? const_data<int64_t>(*places) : nullptr,
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
