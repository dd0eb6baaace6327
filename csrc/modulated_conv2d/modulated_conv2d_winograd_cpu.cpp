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

int64_t divide_up(int64_t value, int64_t unit) {
  return (value + unit - 1) / unit;
}

// Tasks are blocks of panels times blocks of outputs. Each transforms the input that it needs in memory of
// its worker; no sum depends on how the work is cut.
void convolve(const WinogradConv2d& args, const Tensor& memory_like) {
  const int64_t panel = AVATAR_ISA_CALL(winograd_panel);
  const int64_t panels = divide_up(args.batch * args.tile_rows * args.tile_columns, panel);
  const int64_t blocks = divide_up(args.outputs, kWinogradOutputs);
  if (panels * blocks == 0) return;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t input_size = kWinogradProducts * winograd_input_stride(args.channels, panel);
  const bool plenty = panels >= 2 * kTaskPanels * threads && kTaskPanels * input_size <= kMostInput;
  const int64_t task_panels = plenty ? kTaskPanels : 1;
  const int64_t panel_blocks = divide_up(panels, task_panels);
  const int64_t weight_size = kWinogradProducts * winograd_weight_stride(args.channels);
  const int64_t rounds = divide_up(blocks, std::max<int64_t>(1, kMostMemory / weight_size));
  const int64_t round_blocks = divide_up(blocks, rounds);
  const int64_t splits = std::min(round_blocks, divide_up(2 * threads, panel_blocks));
  const int64_t tasks = panel_blocks * splits, workers = std::min(threads, tasks);

  const int64_t product_size = kWinogradProducts * kWinogradOutputs * panel;
  const int64_t worker_size = task_panels * input_size + product_size;
  Tensor weights = torch::stable::new_empty(memory_like, {round_blocks * weight_size});
  Tensor scratch = torch::stable::new_empty(memory_like, {workers * worker_size});
  float* transformed_weights = mutable_data<float>(weights);

  for (int64_t first = 0; first < blocks; first += round_blocks) {
    const int64_t count = std::min(round_blocks, blocks - first);
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        AVATAR_ISA_CALL(winograd_weights, args, (first + block) * kWinogradOutputs,
                        transformed_weights + block * weight_size);
      }
    });
    const int64_t split_blocks = divide_up(count, splits);
    const auto run = [&](int64_t task, float* inputs) {
      const int64_t first_panel = task / splits * task_panels;
      const int64_t last_panel = std::min(panels, first_panel + task_panels);
      const int64_t begin = task % splits * split_blocks, end = std::min(count, begin + split_blocks);
      if (begin >= end) return;
      for (int64_t p = first_panel; p < last_panel; ++p) {
        AVATAR_ISA_CALL(winograd_input, args, p * panel, inputs + (p - first_panel) * input_size);
      }
      for (int64_t block = begin; block < end; ++block) {
        for (int64_t p = first_panel; p < last_panel; ++p) {
          AVATAR_ISA_CALL(winograd_output, args, p * panel, (first + block) * kWinogradOutputs,
                          transformed_weights + block * weight_size, inputs + (p - first_panel) * input_size,
                          inputs + task_panels * input_size);
        }
      }
    };
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, workers, 1, [&](int64_t worker, int64_t) {
      float* memory = mutable_data<float>(scratch) + worker * worker_size;
      for (int64_t task = next++; task < tasks; task = next++) run(task, memory);
    });
  }
}

// The modulated 3x3 convolution of float32 images x (B, I, H, W), contiguous as all that is given: y, and
// what it is before noise, bias and activation to `demodulated` if given, (B, O, H + 2 padding - 2, ...).
void modulated_conv2d_winograd_cpu(const Tensor& x, const Tensor& weight, const Tensor& styles,
                                   const std::optional<Tensor>& scale, const std::optional<Tensor>& noise,
                                   const std::optional<Tensor>& bias, Tensor y,
                                   std::optional<Tensor> demodulated, int64_t padding, double slope,
                                   double gain, std::optional<double> clamp) {
  const auto data = [](const std::optional<Tensor>& tensor) {
    return tensor ? const_data<float>(*tensor) : nullptr;
  };
  const int64_t height = y.size(2), width = y.size(3);
  convolve({const_data<float>(x),
            const_data<float>(weight),
            const_data<float>(styles),
            data(scale),
            data(noise),
            data(bias),
            mutable_data<float>(y),
            demodulated ? mutable_data<float>(*demodulated) : nullptr,
            noise && noise->size(0) > 1 ? height * width : 0,
            x.size(0),
            x.size(1),
            x.size(2),
            x.size(3),
            y.size(1),
            height,
            width,
            padding,
            divide_up(height, kWinogradTile),
            divide_up(width, kWinogradTile),
            static_cast<float>(slope),
            static_cast<float>(gain),
            clamp ? static_cast<float>(*clamp) : std::numeric_limits<float>::infinity()},
           x);
}

// The gradient (O, I, 3, 3) in weight of the convolution of x (B, I, H, W) from that of its output, float32
// and contiguous. Blocks of panels follow each other; within one, work is cut between parts and outputs.
Tensor modulated_conv2d_winograd_weight_cpu(const Tensor& grad, const Tensor& x, int64_t padding) {
  WinogradConv2d args{};
  args.x = const_data<float>(x);
  args.y = const_cast<float*>(const_data<float>(grad));
  args.batch = x.size(0);
  args.channels = x.size(1);
  args.height = x.size(2);
  args.width = x.size(3);
  args.outputs = grad.size(1);
  args.out_height = grad.size(2);
  args.out_width = grad.size(3);
  args.padding = padding;
  args.tile_rows = divide_up(args.out_height, kWinogradTile);
  args.tile_columns = divide_up(args.out_width, kWinogradTile);
  const int64_t panel = AVATAR_ISA_CALL(winograd_panel);
  const int64_t panels = divide_up(args.batch * args.tile_rows * args.tile_columns, panel);
  const int64_t input_size = kWinogradProducts * winograd_input_stride(args.channels, panel);
  const int64_t gradient_size = kWinogradProducts * winograd_input_stride(args.outputs, panel);
  if (panels == 0) return torch::stable::new_zeros(x, {args.outputs, args.channels, 3, 3});
  // So many tiles that what ends a sum weighs little, and no more, for the sake of the caches.
  const int64_t wanted = divide_up(256, panel), most = kMostMemory / (input_size + gradient_size);
  const int64_t block_panels = std::min(panels, std::max<int64_t>(1, std::min(wanted, most)));
  const int64_t blocks = divide_up(args.outputs, kWinogradOutputs);
  Tensor inputs = torch::stable::new_empty(x, {block_panels * input_size + kWinogradSlack});
  Tensor gradients = torch::stable::new_empty(x, {block_panels * gradient_size + kWinogradSlack});
  Tensor sums = torch::stable::new_empty(x, {kWinogradProducts * args.outputs, pad_channels(args.channels)});
  Tensor result = torch::stable::new_empty(x, {args.outputs, args.channels, 3, 3});
  float* transformed = mutable_data<float>(inputs);
  float* transformed_gradient = mutable_data<float>(gradients);
  for (int64_t first = 0; first < panels; first += block_panels) {
    const int64_t count = std::min(block_panels, panels - first);
    torch::stable::parallel_for(0, 2 * count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t p = task / 2, tile = (first + p) * panel;
        if (task % 2 == 0) {
          AVATAR_ISA_CALL(winograd_input, args, tile, transformed + p * input_size);
        } else {
          AVATAR_ISA_CALL(winograd_gradient, args, tile, transformed_gradient + p * gradient_size);
        }
      }
    });
    torch::stable::parallel_for(0, kWinogradProducts * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        AVATAR_ISA_CALL(winograd_weight_products, args, count, task / blocks,
                        task % blocks * kWinogradOutputs, transformed, transformed_gradient, first > 0,
                        mutable_data<float>(sums));
      }
    });
  }
  torch::stable::parallel_for(0, args.outputs, 8, [&](int64_t begin, int64_t end) {
    for (int64_t output = begin; output < end; ++output) {
      AVATAR_ISA_CALL(winograd_weight_gradient, args, output, const_data<float>(sums),
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
