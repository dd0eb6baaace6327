#include <algorithm>
#include <numeric>

#include "common/tensor.h"
#include "upfirdn2d/upfirdn2d_band_simd.h"

namespace avatar {
namespace {

int64_t floor_divide(int64_t a, int64_t b) {
  return a / b - (a % b < 0);
}

// The taps that meet samples rather than inserted zeros, for the outputs phases * m + r of one axis:
// sample step * m + first + j meets tap first_tap - j * up, for j < count.
struct Phase {
  int64_t first, first_tap, count;
};

// Polyphase form of one axis: output o, tap t and sample i meet where t = o * down + taps - 1 - before - i *
// up.
struct Axis {
  int64_t size_in, size_out, up, step;
  std::vector<Phase> phases;

  Axis(int64_t size_in, int64_t size_out, int64_t up, int64_t down, int64_t before, int64_t taps)
      : size_in(size_in), size_out(size_out), up(up), step(down / std::gcd(up, down)) {
    for (int64_t r = 0; r < up / std::gcd(up, down); ++r) {
      const int64_t first = -floor_divide(before - r * down, up);
      const int64_t last = floor_divide(r * down + taps - 1 - before, up);
      const int64_t first_tap = r * down + taps - 1 - before - first * up;
      phases.push_back({first, first_tap, std::max<int64_t>(0, last - first + 1)});
    }
  }

  int64_t num_phases() const { return static_cast<int64_t>(phases.size()); }
  // Outputs of the fullest phase.
  int64_t phase_size() const { return (size_out + num_phases() - 1) / num_phases(); }
  // The first sample that the first outputs of the phases meet.
  int64_t origin() const {
    int64_t origin = phases[0].first;
    for (const Phase& phase : phases) origin = std::min(origin, phase.first);
    return origin;
  }
  // Steps from the first sample of an output to its last.
  int64_t reach() const {
    int64_t last = 0;
    for (const Phase& phase : phases) last = std::max(last, phase.first + phase.count - 1 - origin());
    return last / step;
  }
};

// A plan and the lists of taps that it points to.
template <typename T>
class PlaneFilter {
 public:
  // taps: the filter, rows of taps_across; or its vertical part, with the horizontal one in separable_taps.
  PlaneFilter(const Axis& vertical, const Axis& horizontal, const std::vector<T>& taps,
              const std::vector<T>& separable_taps, int64_t taps_across) {
    // Positions of rows whose samples fit the first-level cache or nearly, but not so few that those which
    // bands share weigh much.
    constexpr int64_t kBandElements = 8192;
    const int64_t step = vertical.step, phases = vertical.num_phases();
    const int64_t stride = horizontal.phase_size() + horizontal.reach(), reach = vertical.reach();
    const int64_t fitting = kBandElements / (step * step * stride);
    const int64_t count = std::min(vertical.phase_size(), std::max(fitting, 2 * reach + 4));
    const int64_t size = (count + reach) * stride, part = count * stride + kBandSlack;
    plan_ = {vertical.size_in,
             horizontal.size_in,
             vertical.size_out,
             horizontal.size_out,
             phases,
             step,
             vertical.origin(),
             horizontal.origin(),
             stride,
             reach,
             size,
             count,
             !separable_taps.empty(),
             nullptr,
             nullptr,
             nullptr,
             nullptr};
    down_starts_.push_back(0);
    across_starts_.push_back(0);
    for (int64_t q = 0; q < phases; ++q) {
      if (plan_.separable) {
        list(vertical, q, taps.data(), step * size, stride, 0, down_);
        down_starts_.push_back(static_cast<int64_t>(down_.size()));
        list(horizontal, q, separable_taps.data(), part, 1, 0, across_);
        across_starts_.push_back(static_cast<int64_t>(across_.size()));
        continue;
      }
      const Phase& phase = vertical.phases[q];
      for (int64_t r = 0; r < phases; ++r) {
        for (int64_t j = 0; j < phase.count; ++j) {
          const int64_t sample = phase.first + j - vertical.origin();
          const int64_t row = sample % step * step * size + sample / step * stride;
          list(horizontal, r, taps.data() + (phase.first_tap - j * vertical.up) * taps_across, size, 1, row,
               down_);
        }
        down_starts_.push_back(static_cast<int64_t>(down_.size()));
      }
    }
    plan_.down = down_.data();
    plan_.down_starts = down_starts_.data();
    plan_.across = across_.data();
    plan_.across_starts = across_starts_.data();
  }

  PlaneFilter(const PlaneFilter&) = delete;

  const BandPlan<T>& plan() const { return plan_; }

 private:
  // Appends the taps of a phase; samples of one place in a step lie `part` from those of the place before,
  // successive samples of one place `next` from each other.
  static void list(const Axis& axis, int64_t phase_number, const T* taps, int64_t part, int64_t next,
                   int64_t offset, std::vector<BandTap<T>>& into) {
    const Phase& phase = axis.phases[phase_number];
    for (int64_t j = 0; j < phase.count; ++j) {
      const int64_t sample = phase.first + j - axis.origin();
      into.push_back({offset + sample % axis.step * part + sample / axis.step * next,
                      taps[phase.first_tap - j * axis.up]});
    }
  }

  BandPlan<T> plan_;
  std::vector<BandTap<T>> down_, across_;
  std::vector<int64_t> down_starts_, across_starts_;
};

// x (B, C, H, W); f (fh, fw) or separable (f,), reversed first where flip is set -> (B, C, H', W').
Tensor upfirdn2d_cpu(const Tensor& x_in, const Tensor& f_in, int64_t up, int64_t down, int64_t x0, int64_t x1,
                     int64_t y0, int64_t y1, bool flip, double gain) {
  const Tensor x = to_compute(x_in);
  const Tensor f = as_contiguous(to_type(f_in, x.scalar_type()));
  const bool separable = f.dim() == 1;
  const int64_t taps_down = f.size(0), taps_across = f.size(separable ? 0 : 1);
  const int64_t planes = x.size(0) * x.size(1), height = x.size(2), width = x.size(3);
  const int64_t height_out = floor_divide(height * up + y0 + y1 - taps_down, down) + 1;
  const int64_t width_out = floor_divide(width * up + x0 + x1 - taps_across, down) + 1;
  if (height_out < 0 || width_out < 0 || f.numel() == 0) {
    throw std::invalid_argument("upfirdn2d: the padded image is smaller than the filter");
  }
  Tensor y = new_result(x, {x.size(0), x.size(1), height_out, width_out});
  if (y.numel() == 0) return to_type(y, x_in.scalar_type());
  const Axis vertical(height, height_out, up, down, y0, taps_down);
  const Axis horizontal(width, width_out, up, down, x0, taps_across);
  dispatch_compute(x.scalar_type(), "upfirdn2d", [&](auto zero) {
    using T = decltype(zero);
    std::vector<T> taps(const_data<T>(f), const_data<T>(f) + f.numel());
    if (flip) std::reverse(taps.begin(), taps.end());
    const std::vector<T> separable_taps = separable ? taps : std::vector<T>();
    for (T& tap : taps) tap *= static_cast<T>(gain);

    const PlaneFilter<T> filter(vertical, horizontal, taps, separable_taps, taps_across);
    const BandPlan<T>& plan = filter.plan();
    const int64_t positions = vertical.phase_size();
    const T* input = const_data<T>(x);
    T* output = mutable_data<T>(y);
    const int64_t bands = (positions + plan.count - 1) / plan.count;
    const int64_t grain = std::max<int64_t>(1, 16384 / (plan.count * plan.phases * width_out));
    torch::stable::parallel_for(0, planes * bands, grain, [&](int64_t begin, int64_t end) {
      // Zeros where nothing is written: sums may read there, for columns that are not kept.
      std::vector<T> memory(band_memory(plan));
      for (int64_t task = begin; task < end; ++task) {
        const int64_t plane = task / bands, first = task % bands * plan.count;
        AVATAR_ISA_CALL(fir_band, plan, input + plane * height * width,
                        output + plane * height_out * width_out, first,
                        std::min(plan.count, positions - first), memory.data());
      }
    });
  });
  return to_type(y, x_in.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avatar_ops, CPU, m) {
  m.impl("upfirdn2d", TORCH_BOX(&upfirdn2d_cpu));
}

}  // namespace avatar
