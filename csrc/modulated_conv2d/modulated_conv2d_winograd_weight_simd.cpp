#include "modulated_conv2d/modulated_conv2d_winograd_tile.h"

namespace avatar {
namespace AVATAR_ISA {
namespace {

// Input channels whose weights one vector holds beside each other.
constexpr int64_t kWeightChannels = kLanes / kRows;
// Taps of a filter, and the vectors that hold them.
constexpr int64_t kTaps = 9, kTapVectors = (kTaps + kLanes - 1) / kLanes;
constexpr int64_t kPaddedTaps = kTapVectors * kLanes;

// Where tap i of a filter is in memory.
template <bool kReversed>
constexpr int64_t tap_at(int64_t i) {
  return kReversed ? kTaps - 1 - i : i;
}

// The filters of args.weight, each followed by something to make kPaddedTaps numbers of.
class Filters {
 public:
  explicit Filters(const WinogradConv2d& args)
      : args_(args), last_at_(args.weight + (args.outputs * args.channels - 1) * kTaps) {
    std::copy_n(last_at_, kTaps, last_);
  }
  const float* at(int64_t output, int64_t channel) const {
    if (output >= args_.outputs || channel >= args_.channels) return none_;
    const float* filter = args_.weight + output * args_.weight_output + channel * args_.weight_channel;
    return filter == last_at_ ? last_ : filter;
  }

 private:
  const WinogradConv2d& args_;
  const float* last_at_;
  float last_[kPaddedTaps] = {}, none_[kPaddedTaps] = {};
};

// Layout: (kWinogradParts, kWinogradOutputs / kRows, channels, kRows).
template <bool kStrided, bool kReversed>
void transform_weights(const WinogradConv2d& args, int64_t output, float* transformed) {
  const int64_t depth = winograd_depth(args.channels), stride = winograd_weight_stride(args.channels);
  const Filters filters(args);
  for (int64_t o = 0; o < kWinogradOutputs; o += kRows) {
    for (int64_t c = 0; c < depth; c += kWeightChannels) {
      const float* sources[kLanes];
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        sources[lane] = filters.at(output + o + lane % kRows, c + lane / kRows);
      }
      Floats taps[kPaddedTaps];
#pragma GCC unroll 3
      for (int64_t first = 0; first < kPaddedTaps; first += kLanes) {
        Floats rows[kLanes];
        for (int64_t lane = 0; lane < kLanes; ++lane) rows[lane] = load(sources[lane] + first);
        interleave(rows);
        for (int64_t lane = 0; lane < kLanes; ++lane) taps[first + lane] = rows[lane];
      }
      Floats g[kTaps], columns[kSide * 3], w[kSide];
      for (int64_t tap = 0; tap < kTaps; ++tap) g[tap] = taps[tap_at<kReversed>(tap)];
      for (int64_t j = 0; j < 3; ++j) transform_weight<kStrided>(g + j, 3, columns + j, 3);
      for (int64_t i = 0; i < kSide; ++i) {
        transform_weight<kStrided>(columns + i * 3, 1, w, 1);
        for (int64_t j = 0; j < kSide; ++j) {
          store(transformed + (i * kSide + j) * stride + o * depth + c * kRows, w[j]);
        }
      }
    }
  }
}

template <bool kStrided, bool kReversed>
void transform_sums(const WinogradConv2d& args, int64_t output, int64_t channel, int64_t count,
                    const float* sums, int64_t stride, float* grad_weight) {
  for (int64_t c = 0; c < count; c += kLanes) {
    Floats w[kWinogradParts], columns[3 * kSide], g[kTaps];
    for (int64_t n = 0; n < kWinogradParts; ++n) w[n] = load(sums + n * stride + c);
    for (int64_t j = 0; j < kSide; ++j) transform_weight_gradient<kStrided>(w + j, kSide, columns + j, kSide);
    for (int64_t i = 0; i < 3; ++i) transform_weight_gradient<kStrided>(columns + i * kSide, 1, g + i * 3, 1);
    // Each filter is followed by what the next one then covers.
    float filters[(kLanes - 1) * kTaps + kPaddedTaps];
    Floats rows[kTapVectors][kLanes] = {};
    for (int64_t tap = 0; tap < kTaps; ++tap) rows[tap / kLanes][tap % kLanes] = g[tap_at<kReversed>(tap)];
#pragma GCC unroll 3
    for (int64_t i = 0; i < kTapVectors; ++i) interleave(rows[i]);
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      for (int64_t i = 0; i < kTapVectors; ++i) store(filters + lane * kTaps + i * kLanes, rows[i][lane]);
    }
    const int64_t first = output * args.channels + channel + c, present = std::min(kLanes, count - c);
    float* __restrict__ target = grad_weight + first * kTaps;
    if (!args.weight_factors) {
      std::copy_n(filters, present * kTaps, target);
      continue;
    }
    for (int64_t lane = 0; lane < present; ++lane) {
      const float* weight = args.weight + (first + lane) * kTaps;
      const float factor = args.weight_factors[first + lane];
      for (int64_t tap = 0; tap < kTaps; ++tap) {
        target[lane * kTaps + tap] = filters[lane * kTaps + tap] + weight[tap] * factor;
      }
    }
  }
}

// target (channels / kBlock, tiles, kBlock) from (channels, kPanel), by groups of channels, the last of which
// is filled up with 0.
template <int64_t kBlock, int64_t kGroup>
void pack_part(const float* part, int64_t channels, int64_t tiles, float* target) {
  // A vector holds the group of kTiles tiles, which are beside each other only if the group is the block.
  constexpr int64_t kTiles = kLanes / kGroup;
  static_assert(kTiles == 1 || kGroup == kBlock, "a vector is stored in one piece");
  for (int64_t c = 0; c < channels; c += kGroup) {
    float* block = target + c / kBlock * tiles * kBlock + c % kBlock;
    for (int64_t t = 0; t < kPanel; t += kLanes) {
      Floats rows[kGroup];
      for (int64_t i = 0; i < kGroup; ++i) {
        rows[i] = c + i < channels ? load(part + (c + i) * kPanel + t) : Floats{};
      }
      interleave(rows);
      for (int64_t i = 0; i < kGroup; ++i) store(block + (t + i * kTiles) * kBlock, rows[i]);
    }
  }
}

// Where the two images have the parts of one product.
struct PartPair {
  int64_t input, gradient;
};

// The products that share part `part` of the weights; returns how many.
int64_t find_pairs(WinogradForm form, int64_t part, PartPair* pairs) {
  const int64_t products = winograd_products(form);
  const int64_t inputs = winograd_input_parts(form), gradients = winograd_gradient_parts(form);
  int64_t found = 0;
  for (int64_t i = 0; i < products; ++i) {
    for (int64_t j = 0; j < products; ++j) {
      if (winograd_weight_part(i) * kSide + winograd_weight_part(j) != part) continue;
      pairs[found++] = {winograd_image_part(i, inputs) * inputs + winograd_image_part(j, inputs),
                        winograd_image_part(i, gradients) * gradients + winograd_image_part(j, gradients)};
    }
  }
  return found;
}

}  // namespace

void winograd_weights(const WinogradConv2d& args, int64_t output, float* transformed) {
  if (args.form == WinogradForm::plain) {
    args.reversed ? transform_weights<false, true>(args, output, transformed)
                  : transform_weights<false, false>(args, output, transformed);
  } else {
    args.reversed ? transform_weights<true, true>(args, output, transformed)
                  : transform_weights<true, false>(args, output, transformed);
  }
}

void winograd_pack_input(const WinogradConv2d& args, const float* transformed, int64_t panel, int64_t panels,
                         float* packed) {
  const int64_t parts = winograd_input_parts(args.form), tiles = panels * kPanel;
  for (int64_t n = 0; n < parts * parts; ++n) {
    pack_part<kPanel, kLanes>(
        transformed + n * winograd_image_stride(args.channels, kPanel), args.channels, tiles,
        packed + n * winograd_sum_row(args.channels, kPanel) * tiles + panel * kPanel * kPanel);
  }
}

void winograd_pack_gradient(const WinogradConv2d& args, const float* transformed, int64_t panel,
                            int64_t panels, float* packed) {
  const int64_t parts = winograd_gradient_parts(args.form), tiles = panels * kPanel;
  for (int64_t n = 0; n < parts * parts; ++n) {
    pack_part<kRows, kRows>(transformed + n * winograd_image_stride(args.outputs, kPanel), args.outputs,
                            tiles,
                            packed + n * winograd_sum_outputs(args.outputs) * tiles + panel * kPanel * kRows);
  }
}

void winograd_weight_products(const WinogradConv2d& args, const WinogradPacked& packed, int64_t part,
                              int64_t output, int64_t channel, bool accumulate, float* target,
                              int64_t target_row) {
  const int64_t row = winograd_sum_row(args.channels, kPanel), place = packed.panels * kPanel;
  PartPair pairs[32];
  const int64_t num_pairs = find_pairs(args.form, part, pairs);
  find_pairs(args.form, std::min(part + 1, kWinogradParts - 1), pairs + num_pairs);
  const auto input_of = [&](int64_t pair) {
    return packed.inputs + (pairs[pair].input * row + channel) * place;
  };
  const auto gradient_of = [&](int64_t pair) {
    return packed.gradients + (pairs[pair].gradient * winograd_sum_outputs(args.outputs) + output) * place;
  };
  for (int64_t pair = 0; pair < num_pairs; ++pair) {
    const float *input = input_of(pair), *gradient = gradient_of(pair);
    for (int64_t o = 0; o < std::min(kWinogradOutputs, args.outputs - output); o += kRows) {
      const NextFactors next{gradient_of(pair + 1) + o * place,
                             input_of(pair + 1) + packed.tiles * kPanel / kWinogradOutputs * o};
      if (accumulate || pair > 0) {
        product<kPanelVectors, true>(packed.tiles, gradient + o * place, input, next, target + o * target_row,
                                     target_row);
      } else {
        product<kPanelVectors, false>(packed.tiles, gradient + o * place, input, next,
                                      target + o * target_row, target_row);
      }
    }
  }
}

void winograd_weight_gradient(const WinogradConv2d& args, int64_t output, int64_t channel, int64_t count,
                              const float* sums, int64_t stride, float* grad_weight) {
  // A transposed convolution correlates with the reversed filter.
  if (args.form == WinogradForm::plain) {
    transform_sums<false, false>(args, output, channel, count, sums, stride, grad_weight);
  } else if (args.form == WinogradForm::up) {
    transform_sums<true, true>(args, output, channel, count, sums, stride, grad_weight);
  } else {
    transform_sums<true, false>(args, output, channel, count, sums, stride, grad_weight);
  }
}

}  // namespace AVATAR_ISA
}  // namespace avatar
