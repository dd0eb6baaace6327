#include <algorithm>
#include <memory>
#include <numeric>

#include "common/tensor.h"
#include "upfirdn2d/upfirdn2d_simd.h"

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
  const Phase& phase(int64_t output) const { return phases[output % num_phases()]; }
  int64_t first_sample(int64_t output) const { return phase(output).first + output / num_phases() * step; }
};

// Filters rows [begin, end) of one output plane. An input row is split by the step of the horizontal axis, so
// that every tap reads consecutive samples; outputs stay apart by phase until they are stored.
template <typename T>
class PlaneFilter {
 public:
  // taps: the filter, rows of taps_across; or its vertical part, with the horizontal one in separable_taps.
  PlaneFilter(const Axis& vertical, const Axis& horizontal, const std::vector<T>& taps,
              const std::vector<T>& separable_taps, int64_t taps_across)
      : vertical_(vertical),
        horizontal_(horizontal),
        taps_(taps.data()),
        across_(separable_taps.data()),
        taps_across_(taps_across),
        separable_(!separable_taps.empty()),
        phase_stride_(fir_padded(horizontal.phase_size())),
        width_(phase_stride_ * horizontal.num_phases()),
        origin_(std::numeric_limits<int64_t>::max()) {
    int64_t last = 0, most_down = 0;
    for (const Phase& phase : horizontal.phases) origin_ = std::min(origin_, phase.first);
    for (const Phase& phase : horizontal.phases) {
      last = std::max(last, phase.first + phase.count - origin_);
      most_across_ = std::max(most_across_, phase.count);
    }
    for (const Phase& phase : vertical.phases) most_down = std::max(most_down, phase.count);
    split_stride_ = phase_stride_ + last / horizontal.step + 1;
    offsets_.resize(horizontal.num_phases() * most_across_);
    for (int64_t r = 0; r < horizontal.num_phases(); ++r) {
      for (int64_t j = 0; j < horizontal.phases[r].count; ++j) {
        const int64_t offset = horizontal.phases[r].first + j - origin_;
        offsets_[r * most_across_ + j] = offset % horizontal.step * split_stride_ + offset / horizontal.step;
      }
    }
    fir_taps_.resize(separable_ ? std::max(most_across_, most_down) : most_across_ * most_down);
    sums_.reset(new T[width_]);
    if (separable_) split_.reset(new T[split_stride_ * horizontal.step]);
  }

  // Elements kept for each input row that a band of output rows needs.
  int64_t row_elements() const { return separable_ ? width_ : split_stride_ * horizontal_.step; }

  void run(const T* input, T* output, int64_t begin, int64_t end) {
    int64_t low = std::numeric_limits<int64_t>::max(), high = std::numeric_limits<int64_t>::min();
    for (int64_t row = begin; row < end; ++row) {
      const int64_t first = vertical_.first_sample(row);
      low = std::min(low, first);
      high = std::max(high, first + vertical_.phase(row).count);
    }
    low = std::clamp<int64_t>(low, 0, vertical_.size_in);
    high = std::clamp<int64_t>(high, low, vertical_.size_in);
    reserve((high - low) * row_elements());
    for (int64_t row = low; row < high; ++row) {
      prepare(input + row * horizontal_.size_in, rows_.get() + (row - low) * row_elements());
    }
    for (int64_t row = begin; row < end; ++row) {
      const Phase& phase = vertical_.phase(row);
      const int64_t first = vertical_.first_sample(row);
      const int64_t from = std::clamp<int64_t>(low - first, 0, phase.count);
      const int64_t to = std::clamp<int64_t>(high - first, from, phase.count);
      const auto row_at = [&](int64_t j) { return rows_.get() + (first + j - low) * row_elements(); };
      if (separable_) {
        for (int64_t j = from; j < to; ++j) {
          fir_taps_[j - from] = {row_at(j), taps_[phase.first_tap - j * vertical_.up]};
        }
        AVATAR_ISA_CALL(fir_row, fir_taps_.data(), to - from, sums_.get(), width_);
      } else {
        for (int64_t r = 0; r < horizontal_.num_phases(); ++r) {
          FirTap<T>* next = fir_taps_.data();
          for (int64_t j = from; j < to; ++j) {
            const T* taps = taps_ + (phase.first_tap - j * vertical_.up) * taps_across_;
            next = list_taps(r, taps, row_at(j), next);
          }
          AVATAR_ISA_CALL(fir_row, fir_taps_.data(), next - fir_taps_.data(), sums_.get() + r * phase_stride_,
                          phase_stride_);
        }
      }
      AVATAR_ISA_CALL(interleave, sums_.get(), phase_stride_, horizontal_.num_phases(),
                      output + row * horizontal_.size_out, horizontal_.size_out);
    }
  }

 private:
  void reserve(int64_t elements) {
    if (elements <= reserved_) return;
    rows_.reset(new T[elements]);
    reserved_ = elements;
  }

  // The taps of horizontal phase r on a split row; the filter's row holds `taps`.
  FirTap<T>* list_taps(int64_t r, const T* taps, const T* split, FirTap<T>* next) const {
    const Phase& phase = horizontal_.phases[r];
    const int64_t* offsets = offsets_.data() + r * most_across_;
    for (int64_t j = 0; j < phase.count; ++j) {
      *next++ = {split + offsets[j], taps[phase.first_tap - j * horizontal_.up]};
    }
    return next;
  }

  // An input row as run() reads it: split, and filtered across when the filter is separable.
  void prepare(const T* row, T* target) {
    T* split = separable_ ? split_.get() : target;
    for (int64_t q = 0; q < horizontal_.step; ++q) {
      AVATAR_ISA_CALL(deinterleave, row, horizontal_.size_in, origin_ + q, horizontal_.step,
                      split + q * split_stride_, split_stride_);
    }
    if (!separable_) return;
    for (int64_t r = 0; r < horizontal_.num_phases(); ++r) {
      const FirTap<T>* end = list_taps(r, across_, split, fir_taps_.data());
      AVATAR_ISA_CALL(fir_row, fir_taps_.data(), end - fir_taps_.data(), target + r * phase_stride_,
                      phase_stride_);
    }
  }

  const Axis& vertical_;
  const Axis& horizontal_;
  const T* taps_;
  const T* across_;
  int64_t taps_across_;
  bool separable_;
  int64_t phase_stride_, width_, origin_, split_stride_, most_across_ = 0, reserved_ = 0;
  // Where in a split row each tap of each horizontal phase reads for the first output.
  std::vector<int64_t> offsets_;
  std::vector<FirTap<T>> fir_taps_;
  std::unique_ptr<T[]> sums_, split_, rows_;
};

// x (B, C, H, W); f (fh, fw) or separable (f,), reversed first where flip is set -> (B, C, H', W').
Tensor upfirdn2d_cpu(const Tensor& x_in, const Tensor& f_in, int64_t up, int64_t down, int64_t x0, int64_t x1,
                     int64_t y0, int64_t y1, bool flip, double gain) {
  const Tensor x = to_compute(x_in);
  const Tensor f = torch::stable::contiguous(to_type(f_in, x.scalar_type()));
  const bool separable = f.dim() == 1;
  const int64_t taps_down = f.size(0), taps_across = f.size(separable ? 0 : 1);
  const int64_t planes = x.size(0) * x.size(1), height = x.size(2), width = x.size(3);
  const int64_t height_out = floor_divide(height * up + y0 + y1 - taps_down, down) + 1;
  const int64_t width_out = floor_divide(width * up + x0 + x1 - taps_across, down) + 1;
  if (height_out < 0 || width_out < 0 || f.numel() == 0) {
    throw std::invalid_argument("upfirdn2d: the padded image is smaller than the filter");
  }
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1), height_out, width_out});
  if (y.numel() == 0) return to_type(y, x_in.scalar_type());
  const Axis vertical(height, height_out, up, down, y0, taps_down);
  const Axis horizontal(width, width_out, up, down, x0, taps_across);
  dispatch_compute(x.scalar_type(), "upfirdn2d", [&](auto zero) {
    using T = decltype(zero);
    std::vector<T> taps(const_data<T>(f), const_data<T>(f) + f.numel());
    if (flip) std::reverse(taps.begin(), taps.end());
    const std::vector<T> separable_taps = separable ? taps : std::vector<T>();
    for (T& tap : taps) tap *= static_cast<T>(gain);

    // Bands of output rows whose input rows fit the second-level cache.
    constexpr int64_t kBandElements = 32768;
    const int64_t row_elements =
        PlaneFilter<T>(vertical, horizontal, taps, separable_taps, taps_across).row_elements();
    const int64_t fitting = std::max(kBandElements / row_elements * up / down, taps_down / down + 4);
    const int64_t band = std::min(fitting, height_out);
    const int64_t bands = (height_out + band - 1) / band;
    const int64_t grain = std::max<int64_t>(1, 16384 / (band * width_out));
    torch::stable::parallel_for(0, planes * bands, grain, [&](int64_t begin, int64_t end) {
      PlaneFilter<T> filter(vertical, horizontal, taps, separable_taps, taps_across);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t plane = task / bands, first = task % bands * band;
        filter.run(const_data<T>(x) + plane * height * width,
                   mutable_data<T>(y) + plane * height_out * width_out, first,
                   std::min(first + band, height_out));
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
