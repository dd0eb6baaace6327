// Modulated 3x3 convolution by Winograd's F(4x4, 3x3) in float32, built once per instruction set: 36 products
// instead of 144 for every 4x4 outputs. The points are 0, +-2/3, +-3/2 and infinity: the usual 0, +-1, +-2
// lose twice as many bits.
// Sources: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016; on points, Alam et
// al., Winograd Convolution for Deep Neural Networks: Efficient Point Selection, TECS 2022.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace avatar {

constexpr int64_t kWinogradTile = 4;       // outputs of a tile in each direction
constexpr int64_t kWinogradProducts = 36;  // elements of a transformed tile
// Output channels are worked on in blocks of this many; filters that are missing in the last are 0.
constexpr int64_t kWinogradOutputs = 32;

// Elements that products of the last channels may read beyond those of a panel.
constexpr int64_t kWinogradSlack = 512;

// Tiles are counted through samples, rows and columns, and worked on in panels of winograd_panel() tiles.
struct WinogradConv2d {
  const float* x;        // (batch, channels, height, width)
  const float* weight;   // (outputs, channels, 3, 3)
  const float* styles;   // (batch, channels)
  const float* scale;    // (batch, outputs), null for none
  const float* noise;    // (1 or batch, 1, out_height, out_width), null for none
  const float* bias;     // (outputs), null for none
  float* y;              // (batch, outputs, out_height, out_width)
  float* demodulated;    // the same before noise and bias, null where not wanted
  int64_t noise_stride;  // from one sample to the next
  int64_t batch, channels, height, width, outputs, out_height, out_width, padding;
  int64_t tile_rows, tile_columns;
  float slope, gain, clamp;
};

// Input channels of the transformed weights; one that is added is 0.
inline int64_t winograd_depth(int64_t channels) {
  return (channels + 1) / 2 * 2;
}

// Elements of each of the 36 parts of kWinogradOutputs transformed filters, and of the transformed input of
// one panel. What is added to both keeps the parts from each other's place in the cache.
inline int64_t winograd_weight_stride(int64_t channels) {
  return kWinogradOutputs * winograd_depth(channels) + 16;
}

inline int64_t winograd_input_stride(int64_t channels, int64_t panel) {
  return channels * panel + 16;
}

// Channels of the sums that winograd_weight_products makes, with room for whole vectors.
inline int64_t pad_channels(int64_t channels) {
  return (channels + 15) / 16 * 16;
}

// winograd_weights transforms kWinogradOutputs filters from `output` on, into kWinogradProducts *
// winograd_weight_stride elements.
// winograd_input transforms the panel of tiles that starts at `tile`, into `transformed`, of
// kWinogradProducts * winograd_input_stride elements.
// winograd_output computes kWinogradOutputs channels from `output` on of that panel from what those two made;
// `products` is working memory of kWinogradProducts * kWinogradOutputs * panel elements.
// Of the gradient in weight: winograd_gradient transforms that of the output, which args.y holds, as
// winograd_input does the input, with outputs for channels; winograd_weight_products multiplies both over
// `panels` panels, for one of the 36 parts and kWinogradOutputs filters, into sums (kWinogradProducts,
// outputs, pad_channels(channels)), reading up to kWinogradSlack elements beyond; winograd_weight_gradient
// makes the gradient of one filter of the sums.
#define AVATAR_DECLARE(ISA)                                                                               \
  namespace ISA {                                                                                         \
  int64_t winograd_panel();                                                                               \
  void winograd_weights(const WinogradConv2d& args, int64_t output, float* transformed);                  \
  void winograd_input(const WinogradConv2d& args, int64_t tile, float* transformed);                      \
  void winograd_output(const WinogradConv2d& args, int64_t tile, int64_t output, const float* weights,    \
                       const float* transformed, float* products);                                        \
  void winograd_gradient(const WinogradConv2d& args, int64_t tile, float* transformed);                   \
  void winograd_weight_products(const WinogradConv2d& args, int64_t panels, int64_t part, int64_t output, \
                                const float* inputs, const float* gradients, bool accumulate,             \
                                float* target);                                                           \
  void winograd_weight_gradient(const WinogradConv2d& args, int64_t output, const float* sums,            \
                                float* grad_weight);                                                      \
  }
AVATAR_FOR_EACH_ISA(AVATAR_DECLARE)
#undef AVATAR_DECLARE

}  // namespace avatar
