// Modulated 3x3 convolution by Winograd's form in float32, built once per instruction set. The points are 0,
// +-2/3, +-3/2 and infinity: the usual 0, +-1, +-2 lose twice as many bits.
//
// F(4x4, 3x3) takes 36 products instead of 144 for every 4x4 outputs. A convolution of stride 2 splits into
// the even inputs, which meet two taps, F(4, 2) without the point 0, and the odd ones, which meet the middle
// tap alone: 9 products instead of 12 in each direction, 81 instead of 144, with 6 x 6 different transformed
// weights. The transposed convolution is its transpose. The resampling filter is applied to the lines that
// the transform of the input reads, or to those that the transform of the output wrote, while they are in
// cache.
// Sources: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016; on points, Alam et
// al., Winograd Convolution for Deep Neural Networks: Efficient Point Selection, TECS 2022; on strides,
// Huang et al., DWM: A Decomposable Winograd Method for Convolution Acceleration, AAAI 2020.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/pixel_type.h"

namespace avatar {

constexpr int64_t kWinogradTile = 4;    // pixels of a tile in each direction, of the smaller image
constexpr int64_t kWinogradSide = 6;    // points in each direction
constexpr int64_t kWinogradParts = 36;  // elements of a transformed filter
// Output channels are worked on in blocks of this many; filters that are missing in the last are 0.
constexpr int64_t kWinogradOutputs = 32;
// The most taps of a resampling filter in each direction.
constexpr int64_t kWinogradTaps = 8;

// Elements that the resampling filter may read beyond the lines it is given.
constexpr int64_t kWinogradSlack = 64;

// Which image is the larger one: neither, the output (a transposed convolution of stride 2, then the
// resampling filter) or the input (the filter, then a convolution of stride 2).
enum class WinogradForm { plain, up, down };

// The resampling filter as a sum of `terms` separable ones, each correlated with (taps) values down and
// across; output o starts at input o - before.
struct WinogradFilter {
  const float* down;    // (terms, taps)
  const float* across;  // (terms, taps)
  int64_t terms, taps, before;
};

// Tiles are counted through samples, rows and columns, and worked on in panels of winograd_panel() tiles.
struct WinogradConv2d {
  WinogradForm form;
  PixelType pixel;
  const void* x;         // (batch, channels, height, width)
  const float* weight;   // (outputs, channels, 3, 3), or (channels, outputs, 3, 3)
  const float* styles;   // (batch, channels), null for ones
  const float* scale;    // (batch, outputs), null for ones
  const float* noise;    // (1 or batch, 1, out_height, out_width), null for none
  const float* bias;     // (outputs), null for none
  void* y;               // (batch, outputs, out_height, out_width)
  void* demodulated;     // the same before noise and bias, null where not wanted
  int64_t noise_stride;  // from one sample to the next
  int64_t batch, channels, height, width, outputs, out_height, out_width;
  int64_t padding;  // of the plain form
  int64_t tile_rows, tile_columns;
  float slope, gain, clamp;
  WinogradFilter filter;
  int64_t weight_output, weight_channel;  // from one filter to the next
  bool reversed;                          // whether the last tap of a filter is the first in memory
  const float* weight_factors;  // (outputs, channels), of the weights in their gradient, null for zeros
};

// The transformed input and gradient of the output for the products of the gradient in weight: `tiles` tiles
// in memory for `panels` panels.
struct WinogradPacked {
  const float* inputs;
  const float* gradients;
  int64_t panels, tiles;
};

// Products in each direction.
inline int64_t winograd_products(WinogradForm form) {
  return form == WinogradForm::plain ? kWinogradSide : 9;
}

// Where product k of one direction finds its part of the transformed filter, and of the transformed image.
// Products 0, 6, 7 and 8 share the middle tap; the last pixel of a tile is its value at infinity too.
inline int64_t winograd_weight_part(int64_t k) {
  return k < kWinogradSide ? k : 0;
}

inline int64_t winograd_image_part(int64_t k, int64_t parts) {
  return k < parts ? k : 5;
}

// Parts of the transformed input, and of the transformed gradient of the output, in each direction.
inline int64_t winograd_input_parts(WinogradForm form) {
  return form == WinogradForm::plain ? kWinogradSide : form == WinogradForm::up ? 8 : 9;
}

inline int64_t winograd_gradient_parts(WinogradForm form) {
  return form == WinogradForm::plain ? kWinogradSide : form == WinogradForm::up ? 9 : 8;
}

// Input channels of the transformed weights; one that is added is 0.
inline int64_t winograd_depth(int64_t channels) {
  return (channels + 1) / 2 * 2;
}

// Elements of each of the parts of kWinogradOutputs transformed filters, and of the transformed image of one
// panel. What is added to both keeps the parts from each other's place in the cache.
inline int64_t winograd_weight_stride(int64_t channels) {
  return kWinogradOutputs * winograd_depth(channels) + 16;
}

inline int64_t winograd_image_stride(int64_t channels, int64_t panel) {
  return channels * panel + 16;
}

// Rows, and elements of a row, of the sums of the gradient in weight, with room for whole blocks.
inline int64_t winograd_sum_outputs(int64_t outputs) {
  return (outputs + kWinogradOutputs - 1) / kWinogradOutputs * kWinogradOutputs;
}

inline int64_t winograd_sum_row(int64_t channels, int64_t panel) {
  return (channels + panel - 1) / panel * panel;
}

// Elements of a line of the larger output image, and of the lines that are kept of one of its channels: those
// of three rows of tiles, in turn, and what is to be added to the next tile. The resampling filter may read
// kWinogradSlack elements beyond.
inline int64_t winograd_band_line(const WinogradConv2d& args) {
  return args.tile_columns * 8 + 8;
}

inline int64_t winograd_band(const WinogradConv2d& args) {
  return 24 * winograd_band_line(args) + 16;
}

// Working memory of a resampling filter on kWinogradRows lines of the larger output image, with zeros around
// them.
constexpr int64_t kWinogradRows = 8;

inline int64_t winograd_filter_line(const WinogradConv2d& args) {
  const int64_t before = args.filter.before < 0 ? -args.filter.before : args.filter.before;
  return 2 * args.width + args.out_width + before + 64;
}

inline int64_t winograd_filter_memory(const WinogradConv2d& args) {
  return (kWinogradRows * args.filter.terms + 1) * winograd_filter_line(args);
}

// A run of tiles of which winograd_up_output is given one panel after the other. Rows of tiles before
// `first_row` (counted through the samples) are only there for the sake of those after them.
struct WinogradStripe {
  int64_t begin, end, first_row;
};

// winograd_weights transforms kWinogradOutputs filters from `output` on, into kWinogradParts *
// winograd_weight_stride elements.
// winograd_input transforms `count` channels from `channel` on of the panel of tiles from `tile` to before
// `end`, into `transformed`, of winograd_input_parts^2 * winograd_image_stride elements.
// winograd_output computes kWinogradOutputs channels from `output` on of that panel from what those two made;
// `products` is working memory of winograd_products^2 * kWinogradOutputs * panel elements.
// winograd_up_output does so for the form `up`, with `bands` for these channels' lines and working `memory`
// for the filter, and writes the rows of y that the panel completes.
// Of the gradient in weight: winograd_gradient transforms that of the output, which args.y holds, times
// args.scale, as winograd_input does the input, with outputs for channels; winograd_pack_* reorder that for
// the products: `packed` holds `panels` panels, of which this is number `panel`, in winograd_input_parts^2 *
// winograd_sum_row * panels * panel elements, or winograd_gradient_parts^2 * winograd_sum_outputs * panels *
// panel; winograd_weight_products multiplies both, for one of the 36 parts and the filters of
// kWinogradOutputs outputs from `output` and of a panel of channels from `channel` on, into target
// (kWinogradOutputs, panel), rows target_row apart; winograd_weight_gradient makes the gradient of `count`
// filters of one output of their sums, those of different parts `stride` apart, and adds args.weight times
// args.weight_factors. args.filter is that of whichever image is the larger.
#define AVATAR_DECLARE(ISA)                                                                                  \
  namespace ISA {                                                                                            \
  int64_t winograd_panel();                                                                                  \
  void winograd_weights(const WinogradConv2d& args, int64_t output, float* transformed);                     \
  void winograd_input(const WinogradConv2d& args, int64_t tile, int64_t end, int64_t channel, int64_t count, \
                      float* transformed);                                                                   \
  void winograd_output(const WinogradConv2d& args, int64_t tile, int64_t output, const float* weights,       \
                       const float* transformed, float* products);                                           \
  void winograd_up_output(const WinogradConv2d& args, const WinogradStripe& stripe, int64_t tile,            \
                          int64_t output, const float* weights, const float* transformed, float* products,   \
                          float* bands, float* memory);                                                      \
  void winograd_gradient(const WinogradConv2d& args, int64_t tile, float* transformed);                      \
  void winograd_pack_input(const WinogradConv2d& args, const float* transformed, int64_t panel,              \
                           int64_t panels, float* packed);                                                   \
  void winograd_pack_gradient(const WinogradConv2d& args, const float* transformed, int64_t panel,           \
                              int64_t panels, float* packed);                                                \
  void winograd_weight_products(const WinogradConv2d& args, const WinogradPacked& packed, int64_t part,      \
                                int64_t output, int64_t channel, bool accumulate, float* target,             \
                                int64_t target_row);                                                         \
  void winograd_weight_gradient(const WinogradConv2d& args, int64_t output, int64_t channel, int64_t count,  \
                                const float* sums, int64_t stride, float* grad_weight);                      \
  }
AVATAR_FOR_EACH_ISA(AVATAR_DECLARE)
#undef AVATAR_DECLARE

}  // namespace avatar
