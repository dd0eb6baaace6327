#include "modulated_conv2d/modulated_conv2d_winograd_tile.h"

namespace avatar {
namespace AVATAR_ISA {
namespace {

// Input channels whose weights one vector holds beside each other.
constexpr int64_t kWeightChannels = kLanes / kRows;

// Where tap i of a filter is in memory: a transposed convolution correlates with the reversed filter.
inline int64_t tap_at(const WinogradConv2d& args, int64_t i) {
  return args.form == WinogradForm::up ? 8 - i : i;
}

// Layout: (kWinogradParts, kWinogradOutputs / kRows, channels, kRows).
template <bool kStrided>
void transform_weights(const WinogradConv2d& args, int64_t output, float* transformed) {
  const int64_t depth = winograd_depth(args.channels), stride = winograd_weight_stride(args.channels);
  for (int64_t o = 0; o < kWinogradOutputs; o += kRows) {
    for (int64_t c = 0; c < depth; c += kWeightChannels) {
      float filters[9][kLanes] = {};
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int64_t row = output + o + lane % kRows, channel = c + lane / kRows;
        if (row >= args.outputs || channel >= args.channels) continue;
        const float* filter = args.weight + (row * args.channels + channel) * 9;
        for (int64_t tap = 0; tap < 9; ++tap) filters[tap][lane] = filter[tap];
      }
      Floats g[9], columns[kSide * 3], w[kSide];
      for (int64_t tap = 0; tap < 9; ++tap) g[tap] = load(filters[tap_at(args, tap)]);
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

template <bool kStrided>
void transform_sums(const WinogradConv2d& args, int64_t output, const float* sums, int64_t stride,
                    float* grad_weight) {
  for (int64_t c = 0; c < args.channels; c += kLanes) {
    Floats w[kWinogradParts], columns[3 * kSide], g[9];
    for (int64_t n = 0; n < kWinogradParts; ++n) w[n] = load(sums + n * stride + c);
    for (int64_t j = 0; j < kSide; ++j) transform_weight_gradient<kStrided>(w + j, kSide, columns + j, kSide);
    for (int64_t i = 0; i < 3; ++i) transform_weight_gradient<kStrided>(columns + i * kSide, 1, g + i * 3, 1);
    for (int64_t lane = 0; lane < std::min(kLanes, args.channels - c); ++lane) {
      float* filter = grad_weight + (output * args.channels + c + lane) * 9;
      for (int64_t tap = 0; tap < 9; ++tap) filter[tap_at(args, tap)] = g[tap][lane];
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
    transform_weights<false>(args, output, transformed);
  } else {
    transform_weights<true>(args, output, transformed);
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

void winograd_weight_products(const WinogradConv2d& args, int64_t panels, int64_t part, int64_t output,
                              const float* inputs, const float* gradients, bool accumulate, float* target) {
  const int64_t row = winograd_sum_row(args.channels, kPanel), tiles = panels * kPanel;
  PartPair pairs[16];
  const int64_t num_pairs = find_pairs(args.form, part, pairs);
  for (int64_t pair = 0; pair < num_pairs; ++pair) {
    const float* input = inputs + pairs[pair].input * row * tiles;
    const float* gradient =
        gradients + (pairs[pair].gradient * winograd_sum_outputs(args.outputs) + output) * tiles;
    for (int64_t c = 0; c < args.channels; c += kPanel) {
      for (int64_t o = 0; o < std::min(kWinogradOutputs, args.outputs - output); o += kRows) {
        if (accumulate || pair > 0) {
          product<kPanelVectors, true>(tiles, gradient + o * tiles, input + c * tiles, target + o * row + c,
                                       row);
        } else {
          product<kPanelVectors, false>(tiles, gradient + o * tiles, input + c * tiles, target + o * row + c,
                                        row);
        }
      }
    }
  }
}

void winograd_weight_gradient(const WinogradConv2d& args, int64_t output, const float* sums, int64_t stride,
                              float* grad_weight) {
  if (args.form == WinogradForm::plain) {
    transform_sums<false>(args, output, sums, stride, grad_weight);
  } else {
    transform_sums<true>(args, output, sums, stride, grad_weight);
  }
}

}  // namespace AVATAR_ISA
}  // namespace avatar
