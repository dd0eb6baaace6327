#include "linear_act/linear_act_cpu.h"

#include <algorithm>

#include "common/tile_layout.h"
#include "linear_act/linear_act_simd.h"

namespace avatar {
namespace {

// Whether the numbers are 0 ... count - 1 in some order.
bool is_permutation(const int64_t* numbers, int64_t count) {
  if (first_outside(numbers, count, count) >= 0) return false;
  std::vector<uint8_t> is_there(count, 0);
  for (int64_t i = 0; i < count; ++i) is_there[numbers[i]] = 1;
  uint8_t all = 1;
  for (const uint8_t there : is_there) all &= there;
  return all;
}

// Rows that go through all layers together, so that what is between them stays in cache.
constexpr int64_t kChunk = 192;

template <typename T>
struct Layer {
  TileLayout<T> layout;
  int64_t depth, columns, columns_padded;
  Buffer<T> weight;
  std::vector<T> bias;
  T slope;

  Layer(const Tensor& weight_in, const std::optional<Tensor>& bias_in, double negative_slope)
      : layout(TileLayout<T>::of({weight_in.size(0)})),
        depth(weight_in.size(1)),
        columns(weight_in.size(0)),
        columns_padded(layout.padded(columns)),
        bias(columns_padded, T(0)),
        slope(static_cast<T>(negative_slope)) {
    const Tensor given = to_compute(weight_in);
    const T* numbers = const_data<T>(given);
    weight = layout.pack_rows(depth, depth, columns_padded, T(1),
                              [&](int64_t o) { return o < columns ? numbers + o * depth : nullptr; });
    if (bias_in) std::copy_n(const_data<T>(to_compute(*bias_in)), columns, bias.begin());
  }

  void run(LinearActArgs<T> args, int64_t begin, int64_t end) const {
    args.weight = weight.get();
    args.bias = bias.data();
    args.depth = depth;
    args.columns = columns;
    args.columns_padded = columns_padded;
    args.negative_slope = slope;
    AVATAR_ISA_CALL_OF(layout.isa, linear_act_rows, args, begin, end);
  }
};

// x (B, N, C) through layers of weights (O_l, .) and biases (O_l,) or none: (B, N, O). rest (B, M, O_1) with
// places (N,) int64 is added in the first layer, beside (B, N, D) are the last columns of the last one's
// input. Row n of the result is row targets[n] of what is returned.
Tensor through_layers(const char* op, const Tensor& x_in, const std::optional<Tensor>& beside_in,
                      const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& biases,
                      const std::optional<Tensor>& rest_in, const std::optional<Tensor>& places_in,
                      const std::optional<Tensor>& targets_in, const std::vector<double>& negative_slopes) {
  const Tensor x = to_compute(x_in);
  std::optional<Tensor> beside, rest, places, targets;
  if (beside_in) beside = to_compute(*beside_in);
  if (rest_in) rest = to_compute(*rest_in);
  if (places_in) places = as_contiguous(*places_in);
  if (targets_in) targets = as_contiguous(*targets_in);
  const int64_t batch = x.size(0), rows = x.size(1), own = x.size(2);
  const int64_t count = static_cast<int64_t>(weights.size()), columns = weights.back().size(0);
  const int64_t rest_rows = rest ? rest->size(1) : 0, other = beside ? beside->size(2) : 0;
  const int64_t* place = places ? const_data<int64_t>(*places) : nullptr;
  if (place) check_inside(op, "places", place, rows, rest_rows);
  const int64_t* target = targets ? const_data<int64_t>(*targets) : nullptr;
  if (target && !is_permutation(target, rows)) {
    throw std::out_of_range(std::string(op) + ": targets: expected every index in [0, " +
                            std::to_string(rows) + ") once");
  }
  Tensor y = new_result(x, {batch, rows, columns});
  if (y.numel() == 0) return to_type(y, x_in.scalar_type());
  dispatch_compute(x.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    std::vector<Layer<T>> layers;
    int64_t widest = 0, work = 0;
    for (int64_t l = 0; l < count; ++l) {
      layers.emplace_back(weights[l], biases[l], negative_slopes[l]);
      widest = std::max(widest, layers[l].columns);
      work += layers[l].depth * layers[l].columns;
    }
    const T *inputs = const_data<T>(x), *others = beside ? const_data<T>(*beside) : nullptr;
    const T* added = rest ? const_data<T>(*rest) : nullptr;
    T* outputs = mutable_data<T>(y);
    const int64_t grain = (1 << 18) / std::max<int64_t>(1, work);
    parallel_parts(batch * rows, grain, kChunk / 4, [&](int64_t begin, int64_t end) {
      const int64_t size = count > 1 ? kChunk * widest : 0;
      const Buffer<T> between = buffer<T>(2 * size);
      while (begin < end) {
        const int64_t b = begin / rows, first = begin - b * rows;
        int64_t stop = std::min(end, (b + 1) * rows);
        if (count > 1) stop = std::min(stop, begin + kChunk);
        LinearActArgs<T> args{};
        args.x = inputs + begin * own;
        for (int64_t l = 0; l < count; ++l) {
          const bool last = l == count - 1;
          args.own_depth = layers[l].depth - (last ? other : 0);
          args.beside = last && others ? others + begin * other : nullptr;
          args.rest = l > 0 || !added ? nullptr
                      : place         ? added + b * rest_rows * layers[l].columns
                                      : added + begin * layers[l].columns;
          args.places = l == 0 && place ? place + first : nullptr;
          args.targets = last && target ? target + first : nullptr;
          args.y = !last          ? between.get() + l % 2 * size
                   : args.targets ? outputs + b * rows * columns
                                  : outputs + begin * columns;
          layers[l].run(args, 0, stop - begin);
          args.x = args.y;
        }
        begin = stop;
      }
    });
  });
  return to_type(y, x_in.scalar_type());
}

}  // namespace

Tensor linear_act_cpu(const Tensor& x, const std::optional<Tensor>& beside, const Tensor& weight,
                      const std::optional<Tensor>& bias, const std::optional<Tensor>& rest,
                      const std::optional<Tensor>& places, double negative_slope) {
  return through_layers("linear_act", x, beside, {weight}, {bias}, rest, places, std::nullopt,
                        {negative_slope});
}

Tensor linear_act_layers_cpu(const Tensor& x, const std::optional<Tensor>& beside,
                             std::vector<Tensor> weights, std::vector<Tensor> biases,
                             const std::optional<Tensor>& rest, const std::optional<Tensor>& places,
                             const std::optional<Tensor>& targets, std::vector<double> negative_slopes) {
  return through_layers("linear_act_layers", x, beside, weights, {biases.begin(), biases.end()}, rest, places,
                        targets, negative_slopes);
}

STABLE_TORCH_LIBRARY_IMPL(avatar_ops, CPU, m) {
  m.impl("linear_act", TORCH_BOX(&linear_act_cpu));
  m.impl("linear_act_layers", TORCH_BOX(&linear_act_layers_cpu));
}

}  // namespace avatar
