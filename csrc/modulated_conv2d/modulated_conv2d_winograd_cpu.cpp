#include <algorithm>
#include <atomic>
#include <limits>

#include "common/tensor.h"
#include "modulated_conv2d/modulated_conv2d_winograd_simd.h"

namespace avatar {
namespace {

// Transformed weights, or transformed images, that are held at a time. Larger blocks of memory come fresh
// from the system at every call, and their page faults take longer than the transform.
constexpr int64_t kMostMemory = (int64_t{24} << 20) / sizeof(float);
// Panels that pass over the weights together, where there are enough of them for every thread and their
// transformed input stays this small.
constexpr int64_t kTaskPanels = 2;
constexpr int64_t kMostInput = (int64_t{4} << 20) / sizeof(float);
// Channels whose input one task transforms where all of it is held.
constexpr int64_t kInputChannels = 64;
// Fewest rows of tiles in a stripe that starts within a sample: the row before it is computed once more.
constexpr int64_t kStripeRows = 8;

// Tiles whose products are added up before they reach the sums of the gradient in weight.
constexpr int64_t kSumTiles = 128;

int64_t divide_up(int64_t value, int64_t unit) {
  return (value + unit - 1) / unit;
}

const float* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? const_data<float>(*tensor) : nullptr;
}

int64_t square(int64_t value) {
  return value * value;
}

// What the pointers of a WinogradFilter point to.
struct FilterValues {
  std::vector<float> down, across;
};

// f (n,) or (n, n) in the order of correlation: upfirdn2d convolves, unless `flip` is set.
FilterValues split_filter(const Tensor& f, bool flip, double gain) {
  const int64_t taps = f.size(0);
  std::vector<float> values(const_data<float>(f), const_data<float>(f) + f.numel());
  if (!flip) std::reverse(values.begin(), values.end());
  FilterValues filter;
  if (f.dim() == 1) {
    filter = {values, values};
  } else {
    // Column j of the filter, and then the unit vector j.
    filter.across.resize(taps * taps);
    for (int64_t j = 0; j < taps; ++j) {
      for (int64_t i = 0; i < taps; ++i) filter.down.push_back(values[i * taps + j]);
      filter.across[j * taps + j] = 1;
    }
  }
  for (float& value : filter.down) value *= static_cast<float>(gain);
  return filter;
}

WinogradForm form_of(int64_t up, int64_t down) {
  return up == 2 ? WinogradForm::up : down == 2 ? WinogradForm::down : WinogradForm::plain;
}

// How often the weights are transformed in part, and how their blocks of outputs are spread over tasks.
struct WeightPlan {
  int64_t blocks, round_blocks, splits, split_blocks, weight_size;

  WeightPlan(const WinogradConv2d& args, int64_t items)
      : blocks(divide_up(args.outputs, kWinogradOutputs)),
        weight_size(kWinogradParts * winograd_weight_stride(args.channels)) {
    const int64_t rounds = divide_up(blocks, std::max<int64_t>(1, kMostMemory / weight_size));
    const int64_t threads = torch::stable::get_num_threads();
    round_blocks = divide_up(blocks, rounds);
    splits = std::min(round_blocks, threads == 1 ? 1 : divide_up(2 * threads, items));
    split_blocks = divide_up(round_blocks, splits);
  }
};

// Calls run(item, first block, number of blocks, their weights, memory) for every item and block of outputs;
// no sum depends on how the work is cut.
template <typename Run>
void run_tasks(const WinogradConv2d& args, const WeightPlan& plan, int64_t items, int64_t worker_size,
               const Tensor& memory_like, const Run& run) {
  const int64_t tasks = items * plan.splits;
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), tasks);
  Tensor weights = torch::stable::new_empty(memory_like, {plan.round_blocks * plan.weight_size});
  Tensor scratch = torch::stable::new_empty(memory_like, {workers * worker_size});
  float* transformed = mutable_data<float>(weights);
  for (int64_t first = 0; first < plan.blocks; first += plan.round_blocks) {
    const int64_t count = std::min(plan.round_blocks, plan.blocks - first);
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        AVATAR_ISA_CALL(winograd_weights, args, (first + block) * kWinogradOutputs,
                        transformed + block * plan.weight_size);
      }
    });
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, workers, 1, [&](int64_t worker, int64_t) {
      float* memory = mutable_data<float>(scratch) + worker * worker_size;
      for (int64_t task = next++; task < tasks; task = next++) {
        const int64_t begin = task % plan.splits * plan.split_blocks;
        const int64_t end = std::min(count, begin + plan.split_blocks);
        if (begin >= end) continue;
        run(task / plan.splits, first + begin, end - begin, transformed + begin * plan.weight_size, memory);
      }
    });
  }
}

// Few tiles: all of the transformed input is held, and the weights of a block of outputs are transformed
// where they are used.
void convolve_held(const WinogradConv2d& args, int64_t panels, int64_t input_size, int64_t product_size,
                   const Tensor& memory_like) {
  const int64_t panel = AVATAR_ISA_CALL(winograd_panel);
  const int64_t tiles = args.batch * args.tile_rows * args.tile_columns;
  const int64_t blocks = divide_up(args.outputs, kWinogradOutputs);
  const int64_t weight_size = kWinogradParts * winograd_weight_stride(args.channels);
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), blocks);
  Tensor inputs = torch::stable::new_empty(memory_like, {panels * input_size});
  Tensor scratch = torch::stable::new_empty(memory_like, {workers * (weight_size + product_size)});
  float* transformed = mutable_data<float>(inputs);
  const int64_t pieces = divide_up(args.channels, kInputChannels);
  parallel_tasks(panels * pieces, [&](int64_t task) {
    const int64_t p = task / pieces, channel = task % pieces * kInputChannels;
    AVATAR_ISA_CALL(winograd_input, args, p * panel, tiles, channel,
                    std::min(kInputChannels, args.channels - channel), transformed + p * input_size);
  });
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t worker, int64_t) {
    float* weights = mutable_data<float>(scratch) + worker * (weight_size + product_size);
    for (int64_t block = next++; block < blocks; block = next++) {
      const int64_t output = block * kWinogradOutputs;
      AVATAR_ISA_CALL(winograd_weights, args, output, weights);
      for (int64_t p = 0; p < panels; ++p) {
        AVATAR_ISA_CALL(winograd_output, args, p * panel, output, weights, transformed + p * input_size,
                        weights + weight_size);
      }
    }
  });
}

// Items are groups of panels. Each task transforms the input that it needs.
void convolve(const WinogradConv2d& args, const Tensor& memory_like) {
  const int64_t panel = AVATAR_ISA_CALL(winograd_panel);
  const int64_t tiles = args.batch * args.tile_rows * args.tile_columns, panels = divide_up(tiles, panel);
  const int64_t input_size =
      square(winograd_input_parts(args.form)) * winograd_image_stride(args.channels, panel);
  const int64_t product_size = square(winograd_products(args.form)) * kWinogradOutputs * panel;
  const int64_t blocks = divide_up(args.outputs, kWinogradOutputs);
  const int64_t held = panels * input_size;
  if (held <= kMostMemory && held <= blocks * kWinogradParts * winograd_weight_stride(args.channels) &&
      blocks >= torch::stable::get_num_threads()) {
    return convolve_held(args, panels, input_size, product_size, memory_like);
  }
  const bool plenty = panels >= 2 * kTaskPanels * int64_t{torch::stable::get_num_threads()} &&
                      kTaskPanels * input_size <= kMostInput;
  const int64_t item_panels = plenty ? kTaskPanels : 1;
  const int64_t items = divide_up(panels, item_panels);
  const WeightPlan plan(args, items);
  run_tasks(args, plan, items, item_panels * input_size + product_size, memory_like,
            [&](int64_t item, int64_t first, int64_t count, const float* weights, float* memory) {
              const int64_t begin = item * item_panels, end = std::min(panels, begin + item_panels);
              for (int64_t p = begin; p < end; ++p) {
                AVATAR_ISA_CALL(winograd_input, args, p * panel, tiles, 0, args.channels,
                                memory + (p - begin) * input_size);
              }
              for (int64_t block = 0; block < count; ++block) {
                for (int64_t p = begin; p < end; ++p) {
                  AVATAR_ISA_CALL(winograd_output, args, p * panel, (first + block) * kWinogradOutputs,
                                  weights + block * plan.weight_size, memory + (p - begin) * input_size,
                                  memory + item_panels * input_size);
                }
              }
            });
}

// Items are stripes: rows of tiles in turn, since neighbours share pixels of the larger image and its lines
// are kept until the filter has used them.
void convolve_up(const WinogradConv2d& args, const Tensor& memory_like) {
  const int64_t panel = AVATAR_ISA_CALL(winograd_panel);
  const int64_t rows = args.batch * args.tile_rows, threads = torch::stable::get_num_threads();
  const int64_t wanted = threads == 1 ? 1 : 2 * threads;
  int64_t stripe_rows = divide_up(args.batch, wanted) * args.tile_rows;
  if (args.batch < wanted) {
    const int64_t least =
        std::max(std::min(kStripeRows, args.tile_rows), divide_up(panel, args.tile_columns));
    stripe_rows = std::max(least, divide_up(rows, wanted));
  }
  const int64_t items = divide_up(rows, stripe_rows);
  const WeightPlan plan(args, items);
  const int64_t input_size =
      square(winograd_input_parts(args.form)) * winograd_image_stride(args.channels, panel);
  const int64_t product_size = square(winograd_products(args.form)) * kWinogradOutputs * panel;
  const int64_t band_size = kWinogradOutputs * winograd_band(args);
  const int64_t bands_size = plan.split_blocks * band_size + kWinogradSlack;
  const int64_t worker_size = input_size + product_size + bands_size + winograd_filter_memory(args);
  run_tasks(args, plan, items, worker_size, memory_like,
            [&](int64_t item, int64_t first, int64_t count, const float* weights, float* memory) {
              const int64_t first_row = item * stripe_rows,
                            last_row = std::min(rows, first_row + stripe_rows);
              const int64_t before = first_row % args.tile_rows > 0 ? 1 : 0;
              const WinogradStripe stripe{(first_row - before) * args.tile_columns,
                                          last_row * args.tile_columns, first_row};
              float* products = memory + input_size;
              float* bands = products + product_size;
              for (int64_t tile = stripe.begin; tile < stripe.end; tile += panel) {
                AVATAR_ISA_CALL(winograd_input, args, tile, stripe.end, 0, args.channels, memory);
                for (int64_t block = 0; block < count; ++block) {
                  AVATAR_ISA_CALL(winograd_up_output, args, stripe, tile, (first + block) * kWinogradOutputs,
                                  weights + block * plan.weight_size, memory, products,
                                  bands + block * band_size, bands + bands_size);
                }
              }
            });
}

// The modulated 3x3 convolution of images x (B, I, H, W), contiguous as all that is given: y, and what it is
// before noise, bias and activation to `demodulated` if given, in the dtype of x, the rest in float32. Both
// images are 0 outside; the output starts `before` pixels above and to the left of the input, or of what f is
// applied to. Transposed: weight (I, O, 3, 3) is that of the convolution whose transpose this is.
void modulated_conv2d_winograd_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& styles,
                                   const std::optional<Tensor>& scale, const std::optional<Tensor>& noise,
                                   const std::optional<Tensor>& bias, Tensor y,
                                   std::optional<Tensor> demodulated, const std::optional<Tensor>& f,
                                   int64_t up, int64_t down, int64_t before, bool flip, double filter_gain,
                                   double slope, double gain, std::optional<double> clamp, bool transposed) {
  const WinogradForm form = form_of(up, down);
  FilterValues values;
  if (f) values = split_filter(*f, flip, filter_gain);
  const int64_t taps = f ? f->size(0) : 0, height = y.size(2), width = y.size(3);
  const Tensor& smaller = form == WinogradForm::up ? x : y;
  const int64_t inputs = x.size(1), outputs = y.size(1);
  const WinogradConv2d args{form,
                            pixel_type(x),
                            x.const_data_ptr(),
                            const_data<float>(weight),
                            data_or_null(styles),
                            data_or_null(scale),
                            data_or_null(noise),
                            data_or_null(bias),
                            y.mutable_data_ptr(),
                            demodulated ? demodulated->mutable_data_ptr() : nullptr,
                            noise && noise->size(0) > 1 ? height * width : 0,
                            x.size(0),
                            inputs,
                            x.size(2),
                            x.size(3),
                            outputs,
                            height,
                            width,
                            before,
                            divide_up(smaller.size(2), kWinogradTile),
                            divide_up(smaller.size(3), kWinogradTile),
                            static_cast<float>(slope),
                            static_cast<float>(gain),
                            clamp ? static_cast<float>(*clamp) : std::numeric_limits<float>::infinity(),
                            {values.down.data(), values.across.data(),
                             taps ? static_cast<int64_t>(values.down.size()) / taps : 0, taps, before},
                            transposed ? 9 : 9 * inputs,
                            transposed ? 9 * outputs : 9,
                            // A transposed convolution correlates with the reversed filter.
                            (form == WinogradForm::up) != transposed,
                            nullptr};
  if (y.numel() == 0) return;
  for (Tensor* fresh : {&y, demodulated ? &*demodulated : &y}) {
    advise_huge_pages(fresh->mutable_data_ptr(), fresh->numel() * fresh->element_size());
  }
  form == WinogradForm::up ? convolve_up(args, weight) : convolve(args, weight);
}

// The gradient (O, I, 3, 3) in weight of the convolution of x (B, I, H, W), times styles (B, I), from that of
// its output, times scale (B, O), plus weight times factors (O, I); float32 and contiguous.
Tensor modulated_conv2d_winograd_weight_cpu(const Tensor& grad, const Tensor& x,
                                            const std::optional<Tensor>& scale,
                                            const std::optional<Tensor>& styles,
                                            const std::optional<Tensor>& f, int64_t up, int64_t down,
                                            int64_t before, bool flip, double filter_gain,
                                            const std::optional<Tensor>& weight,
                                            const std::optional<Tensor>& factors) {
  WinogradConv2d args{};
  args.form = form_of(up, down);
  args.pixel = PixelType::compute;
  args.x = x.const_data_ptr();
  args.y = const_cast<void*>(grad.const_data_ptr());
  args.weight = data_or_null(weight);
  args.weight_factors = data_or_null(factors);
  args.styles = data_or_null(styles);
  args.scale = data_or_null(scale);
  args.batch = x.size(0);
  args.channels = x.size(1);
  args.height = x.size(2);
  args.width = x.size(3);
  args.outputs = grad.size(1);
  args.out_height = grad.size(2);
  args.out_width = grad.size(3);
  args.padding = before;
  args.weight_output = 9 * args.channels;
  args.weight_channel = 9;
  FilterValues values;
  if (f) {
    // The gradient of the larger image goes through the transposed filter.
    const bool transposed = args.form == WinogradForm::up;
    const int64_t taps = f->size(0);
    values = split_filter(*f, flip != transposed, filter_gain);
    args.filter = {values.down.data(), values.across.data(), static_cast<int64_t>(values.down.size()) / taps,
                   taps, transposed ? taps - 1 - before : before};
  }
  const Tensor& smaller = args.form == WinogradForm::up ? x : grad;
  args.tile_rows = divide_up(smaller.size(2), kWinogradTile);
  args.tile_columns = divide_up(smaller.size(3), kWinogradTile);
  const int64_t panel = AVATAR_ISA_CALL(winograd_panel);
  const int64_t tiles = args.batch * args.tile_rows * args.tile_columns, panels = divide_up(tiles, panel);
  if (panels == 0) return torch::stable::new_zeros(x, {args.outputs, args.channels, 3, 3});
  const int64_t input_parts = square(winograd_input_parts(args.form));
  const int64_t gradient_parts = square(winograd_gradient_parts(args.form));
  const int64_t row = winograd_sum_row(args.channels, panel), rows = winograd_sum_outputs(args.outputs);
  const int64_t panel_size = panel * (input_parts * row + gradient_parts * rows);
  // So many tiles that adding to the sums weighs little, and no more, for the sake of the caches; or all, if
  // that takes no more memory, as the sums then need none.
  const int64_t wanted = divide_up(kSumTiles, panel), most = kMostMemory / panel_size;
  const bool all = panels * panel_size <= kWinogradParts * rows * row + std::min(wanted, most) * panel_size;
  const int64_t block_panels = all ? panels : std::max<int64_t>(1, std::min(wanted, most));
  const int64_t input_size = input_parts * winograd_image_stride(args.channels, panel);
  const int64_t gradient_size = gradient_parts * winograd_image_stride(args.outputs, panel);
  // The parts are kept from each other's place in the cache.
  const int64_t part_sums = kWinogradOutputs * panel + 16;
  const int64_t worker_size =
      std::max(std::max(input_size, gradient_size), all ? kWinogradParts * part_sums : 0);
  const int64_t threads = torch::stable::get_num_threads();
  Tensor inputs = torch::stable::new_empty(x, {block_panels * panel * input_parts * row});
  Tensor gradients = torch::stable::new_empty(x, {block_panels * panel * gradient_parts * rows});
  Tensor scratch = torch::stable::new_empty(x, {threads * worker_size});
  Tensor sums_memory = torch::stable::new_empty(x, {all ? 0 : kWinogradParts * rows * row});
  Tensor result = torch::stable::new_empty(x, {args.outputs, args.channels, 3, 3});
  float* packed_input = mutable_data<float>(inputs);
  float* packed_gradient = mutable_data<float>(gradients);
  float* sums = mutable_data<float>(sums_memory);
  // Calls task(number, memory of the worker).
  const auto run = [&](int64_t tasks, const auto& task) {
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, std::min(threads, tasks), 1, [&](int64_t worker, int64_t) {
      float* memory = mutable_data<float>(scratch) + worker * worker_size;
      for (int64_t number = next++; number < tasks; number = next++) task(number, memory);
    });
  };
  const int64_t blocks = rows / kWinogradOutputs;
  for (int64_t first = 0; first < panels; first += block_panels) {
    const int64_t count = std::min(block_panels, panels - first);
    run(2 * count, [&](int64_t task, float* memory) {
      const int64_t p = task / 2, tile = (first + p) * panel;
      if (task % 2 == 0) {
        AVATAR_ISA_CALL(winograd_input, args, tile, tiles, 0, args.channels, memory);
        AVATAR_ISA_CALL(winograd_pack_input, args, memory, p, count, packed_input);
      } else {
        AVATAR_ISA_CALL(winograd_gradient, args, tile, memory);
        AVATAR_ISA_CALL(winograd_pack_gradient, args, memory, p, count, packed_gradient);
      }
    });
    const WinogradPacked packed{packed_input, packed_gradient, count,
                                std::min(count * panel, tiles - first * panel)};
    if (all) {
      run(row / panel * blocks, [&](int64_t task, float* memory) {
        const int64_t channel = task / blocks * panel, output = task % blocks * kWinogradOutputs;
        for (int64_t part = 0; part < kWinogradParts; ++part) {
          AVATAR_ISA_CALL(winograd_weight_products, args, packed, part, output, channel, false,
                          memory + part * part_sums, panel);
        }
        for (int64_t o = 0; o < std::min(kWinogradOutputs, args.outputs - output); ++o) {
          AVATAR_ISA_CALL(winograd_weight_gradient, args, output + o, channel,
                          std::min(panel, args.channels - channel), memory + o * panel, part_sums,
                          mutable_data<float>(result));
        }
      });
      continue;
    }
    run(kWinogradParts * blocks, [&](int64_t task, float*) {
      const int64_t part = task / blocks, output = task % blocks * kWinogradOutputs;
      for (int64_t channel = 0; channel < args.channels; channel += panel) {
        AVATAR_ISA_CALL(winograd_weight_products, args, packed, part, output, channel, first > 0,
                        sums + (part * rows + output) * row + channel, row);
      }
    });
  }
  if (all) return result;
  torch::stable::parallel_for(0, args.outputs, 8, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      AVATAR_ISA_CALL(winograd_weight_gradient, args, o, 0, args.channels, sums + o * row, rows * row,
                      mutable_data<float>(result));
    }
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avatar_ops, CPU, m) {
  m.impl("modulated_conv2d_winograd_weight", TORCH_BOX(&modulated_conv2d_winograd_weight_cpu));
  m.impl("modulated_conv2d_winograd", TORCH_BOX(&modulated_conv2d_winograd_cpu));
}

}  // namespace avatar
