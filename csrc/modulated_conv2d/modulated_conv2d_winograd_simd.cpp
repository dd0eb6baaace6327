#include "modulated_conv2d/modulated_conv2d_winograd_simd.h"

#include <algorithm>
#include <limits>

#include "bias_act/bias_act_simd.h"
#include "common/vector.h"

namespace avatar {
namespace AVATAR_ISA {
namespace {

using Floats = Vector<float>;

constexpr int64_t kLanes = Lanes<float>::kCount;
constexpr int64_t kTile = kWinogradTile, kWindow = kTile + 2;
// Accumulators of a product: 8 x 3 of 32 registers, or 4 x 3 of 16.
constexpr int64_t kRows = kVectorBytes == 64 ? 8 : 4;
constexpr int64_t kPanelVectors = 3, kPanel = kPanelVectors * kLanes;
// Input channels whose weights one vector holds beside each other.
constexpr int64_t kWeightChannels = kLanes / kRows;
// Pixels of one row under a panel that crosses no row of tiles, in whole vectors.
constexpr int64_t kLine = (kTile * kPanel + 2 + kLanes - 1) / kLanes * kLanes;

// The points are 0, +-a, +-b and infinity, with a b = 1.
constexpr float a = 2. / 3, a2 = 4. / 9, a3 = 8. / 27, b = 3. / 2, b2 = 9. / 4, b3 = 27. / 8;
constexpr float a2b2 = 97. / 36;  // a^2 + b^2
// Reciprocals of the products of differences of the points.
constexpr float at_a = -81. / 130, at_b = 8. / 65;

inline void transform_weight(const Floats* g, int64_t step, Floats* w, int64_t w_step) {
  const Floats g0 = g[0], g1 = g[step], g2 = g[2 * step];
  const Floats even_a = g0 * at_a + g2 * (at_a * a2), odd_a = g1 * (at_a * a);
  const Floats even_b = g0 * at_b + g2 * (at_b * b2), odd_b = g1 * (at_b * b);
  w[0] = g0;
  w[w_step] = even_a + odd_a;
  w[2 * w_step] = even_a - odd_a;
  w[3 * w_step] = even_b + odd_b;
  w[4 * w_step] = even_b - odd_b;
  w[5 * w_step] = g2;
}

template <typename Store>
inline void transform_input(Floats d0, Floats d1, Floats d2, Floats d3, Floats d4, Floats d5,
                            const Store& store_part) {
  const Floats even_a = d4 - d2 * b2, odd_a = d3 * a - d1 * b;
  const Floats even_b = d4 - d2 * a2, odd_b = d3 * b - d1 * a;
  store_part(0, d0 + d4 - d2 * a2b2);
  store_part(1, even_a + odd_a);
  store_part(2, even_a - odd_a);
  store_part(3, even_b + odd_b);
  store_part(4, even_b - odd_b);
  store_part(5, d1 + d5 - d3 * a2b2);
}

inline void transform_output(const Floats* m, int64_t step, Floats* y, int64_t y_step) {
  const Floats sum_a = m[step] + m[2 * step], difference_a = m[step] - m[2 * step];
  const Floats sum_b = m[3 * step] + m[4 * step], difference_b = m[3 * step] - m[4 * step];
  y[0] = m[0] + sum_a + sum_b;
  y[y_step] = difference_a * a + difference_b * b;
  y[2 * y_step] = sum_a * a2 + sum_b * b2;
  y[3 * y_step] = difference_a * a3 + difference_b * b3 + m[5 * step];
}

// The transposes of transform_output and transform_weight, for gradients.
template <typename Store>
inline void transform_gradient(Floats y0, Floats y1, Floats y2, Floats y3, const Store& store_part) {
  const Floats even_a = y0 + y2 * a2, odd_a = y1 * a + y3 * a3;
  const Floats even_b = y0 + y2 * b2, odd_b = y1 * b + y3 * b3;
  store_part(0, y0);
  store_part(1, even_a + odd_a);
  store_part(2, even_a - odd_a);
  store_part(3, even_b + odd_b);
  store_part(4, even_b - odd_b);
  store_part(5, y3);
}

inline void transform_weight_gradient(const Floats* w, int64_t step, Floats* g, int64_t g_step) {
  const Floats sum_a = (w[step] + w[2 * step]) * at_a, difference_a = (w[step] - w[2 * step]) * at_a;
  const Floats sum_b = (w[3 * step] + w[4 * step]) * at_b, difference_b = (w[3 * step] - w[4 * step]) * at_b;
  g[0] = w[0] + sum_a + sum_b;
  g[g_step] = difference_a * a + difference_b * b;
  g[2 * g_step] = sum_a * a2 + sum_b * b2 + w[5 * step];
}

// Tiles beside each other in one row of one sample.
struct Segment {
  int64_t sample, row, column;  // of its first tile
  int64_t begin, count;         // within the panel
};

int64_t find_segments(const WinogradConv2d& args, int64_t tile, Segment* segments) {
  const int64_t per_sample = args.tile_rows * args.tile_columns;
  const int64_t end = std::min(tile + kPanel, args.batch * per_sample);
  int64_t found = 0;
  for (int64_t t = tile; t < end; ++found) {
    const int64_t column = t % args.tile_columns;
    const int64_t count = std::min(args.tile_columns - column, end - t);
    segments[found] = {t / per_sample, t % per_sample / args.tile_columns, column, t - tile, count};
    t += count;
  }
  return found;
}

inline float lane_sum(Floats value) {
  typedef float Half __attribute__((vector_size(kVectorBytes / 2)));
  Half low, high;
  __builtin_memcpy(&low, &value, sizeof low);
  __builtin_memcpy(&high, reinterpret_cast<const char*>(&value) + sizeof low, sizeof high);
  low += high;
  float sum = 0;
  for (int64_t lane = 0; lane < kLanes / 2; ++lane) sum += low[lane];
  return sum;
}

// Copies `length` pixels of a row of `width` from `start` on, times `style`; 0 outside.
inline void copy_line(const float* row, int64_t width, int64_t start, int64_t length, float style,
                      float* line) {
  const int64_t first = std::min(length, std::max<int64_t>(0, -start));
  const int64_t last = std::max(first, std::min(length, width - start));
  for (int64_t i = 0; i < first; ++i) line[i] = 0;
  for (int64_t i = last; i < length; ++i) line[i] = 0;
  const float* source = row + start;
  int64_t i = first;
  for (; i + kLanes <= last; i += kLanes) store(line + i, load(source + i) * style);
  for (; i < last; ++i) line[i] = source[i] * style;
}

// Transforms `kWidth` lines, and then columns, in the way of the input or of the gradient of the output.
template <int64_t kWidth, typename Load, typename Store>
inline void transform_window(const Load& load_part, const Store& store_part) {
  if constexpr (kWidth == kWindow) {
    transform_input(load_part(0), load_part(1), load_part(2), load_part(3), load_part(4), load_part(5),
                    store_part);
  } else {
    transform_gradient(load_part(0), load_part(1), load_part(2), load_part(3), store_part);
  }
}

// parts[i][j][t] for the tiles of a segment: row i of the tiles transformed vertically, column j of the
// window, whose first pixel is (top, left) of `image` (height, width).
template <int64_t kWidth>
void transform_segment(const float* image, int64_t height, int64_t width, int64_t top, int64_t left,
                       const Segment& segment, float style, float (*lines)[kLine],
                       float (*parts)[kWindow][kPanel]) {
  const int64_t length = segment.count * kTile + kWidth - kTile;
  for (int64_t i = 0; i < kWidth; ++i) {
    const bool inside = top + i >= 0 && top + i < height;
    copy_line(inside ? image + (top + i) * width : image, inside ? width : 0, left, length, style, lines[i]);
  }
  for (int64_t p = 0; p < length; p += kLanes) {
    transform_window<kWidth>([&](int i) { return load(lines[i] + p); },
                             [&](int i, Floats value) { store(lines[i] + p, value); });
  }
  for (int64_t i = 0; i < kWindow; ++i) {
    const float* __restrict__ line = lines[i];
    float (*__restrict__ part)[kPanel] = parts[i];
    for (int64_t t = 0; t < segment.count; ++t) {
      for (int64_t j = 0; j < kTile; ++j) part[j][segment.begin + t] = line[t * kTile + j];
    }
    for (int64_t t = 0; t < segment.count; ++t) {
      for (int64_t j = kTile; j < kWidth; ++j) part[j][segment.begin + t] = line[t * kTile + j];
    }
  }
}

template <int64_t kWidth>
void transform_columns(const float (*parts)[kWindow][kPanel], float* target, int64_t stride) {
  for (int64_t i = 0; i < kWindow; ++i) {
    for (int64_t t = 0; t < kPanel; t += kLanes) {
      transform_window<kWidth>(
          [&](int j) { return load(parts[i][j] + t); },
          [&](int j, Floats value) { store(target + (i * kWindow + j) * stride + t, value); });
    }
  }
}

// target (kRows, kVectors), rows target_row apart, = weights (depth, kRows) transposed times input (depth,
// kPanel).
template <int kVectors>
inline void product(int64_t depth, const float* weights, const float* input, float* target,
                    int64_t target_row) {
  Floats sums[kRows][kVectors] = {};
  for (int64_t d = 0; d < depth; ++d) {
    Floats right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = load(input + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const float left = weights[r];
      for (int v = 0; v < kVectors; ++v) sums[r][v] += left * right[v];
    }
    weights += kRows;
    input += kPanel;
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) store(target + r * target_row + v * kLanes, sums[r][v]);
  }
}

// products (kWinogradOutputs, kWinogradProducts, kPanel)
template <int kVectors>
void multiply(const WinogradConv2d& args, const float* weights, const float* transformed, float* products) {
  const int64_t weight_stride = winograd_weight_stride(args.channels);
  const int64_t input_stride = winograd_input_stride(args.channels, kPanel);
  for (int64_t n = 0; n < kWinogradProducts; ++n) {
    for (int64_t o = 0; o < kWinogradOutputs; o += kRows) {
      product<kVectors>(args.channels, weights + n * weight_stride + o * winograd_depth(args.channels),
                        transformed + n * input_stride, products + (o * kWinogradProducts + n) * kPanel,
                        kWinogradProducts * kPanel);
    }
  }
}

// lines[r] holds the pixels of row r of all tiles.
inline void transform_products(const float* products, int64_t vectors, float (*lines)[kTile * kPanel]) {
  float parts[kTile][kTile][kPanel];
  for (int64_t v = 0; v < vectors; ++v) {
    Floats m[kWinogradProducts], rows[kTile * kWindow], y[kTile];
    for (int64_t n = 0; n < kWinogradProducts; ++n) m[n] = load(products + n * kPanel + v * kLanes);
    for (int64_t j = 0; j < kWindow; ++j) transform_output(m + j, kWindow, rows + j, kWindow);
    for (int64_t r = 0; r < kTile; ++r) {
      transform_output(rows + r * kWindow, 1, y, 1);
      for (int64_t j = 0; j < kTile; ++j) store(parts[r][j] + v * kLanes, y[j]);
    }
  }
  for (int64_t r = 0; r < kTile; ++r) {
    for (int64_t t = 0; t < vectors * kLanes; ++t) {
      for (int64_t j = 0; j < kTile; ++j) lines[r][t * kTile + j] = parts[r][j][t];
    }
  }
}

void finish_segment(const WinogradConv2d& args, const Segment& segment, int64_t output,
                    const float (*lines)[kTile * kPanel]) {
  const int64_t top = segment.row * kTile, left = segment.column * kTile;
  const int64_t rows = std::min(kTile, args.out_height - top);
  const int64_t image = segment.sample * args.outputs + output;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t pixel = (top + r) * args.out_width + left;
    const int64_t target = image * args.out_height * args.out_width + pixel;
    bias_act_row(BiasActRow<float>{
        lines[r] + segment.begin * kTile,
        args.noise ? args.noise + segment.sample * args.noise_stride + pixel : nullptr, args.y + target,
        args.demodulated ? args.demodulated + target : nullptr, args.scale ? args.scale[image] : 1.f,
        args.bias ? args.bias[output] : 0.f, args.slope, args.gain, args.clamp,
        std::min(segment.count * kTile, args.out_width - left)});
  }
}

}  // namespace

int64_t winograd_panel() {
  return kPanel;
}

// Layout: (kWinogradProducts, kWinogradOutputs / kRows, channels, kRows).
void winograd_weights(const WinogradConv2d& args, int64_t output, float* transformed) {
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
      Floats g[9], columns[kWindow * 3], w[kWindow];
      for (int64_t tap = 0; tap < 9; ++tap) g[tap] = load(filters[tap]);
      for (int64_t j = 0; j < 3; ++j) transform_weight(g + j, 3, columns + j, 3);
      for (int64_t i = 0; i < kWindow; ++i) {
        transform_weight(columns + i * 3, 1, w, 1);
        for (int64_t j = 0; j < kWindow; ++j) {
          store(transformed + (i * kWindow + j) * stride + o * depth + c * kRows, w[j]);
        }
      }
    }
  }
}

void winograd_input(const WinogradConv2d& args, int64_t tile, float* transformed) {
  Segment segments[kPanel];
  const int64_t found = find_segments(args, tile, segments);
  const int64_t stride = winograd_input_stride(args.channels, kPanel);
  float lines[kWindow][kLine] = {};
  // Tiles past the last stay 0.
  float parts[kWindow][kWindow][kPanel] = {};
  for (int64_t c = 0; c < args.channels; ++c) {
    for (int64_t s = 0; s < found; ++s) {
      const Segment& segment = segments[s];
      const int64_t image = segment.sample * args.channels + c;
      transform_segment<kWindow>(args.x + image * args.height * args.width, args.height, args.width,
                                 segment.row * kTile - args.padding, segment.column * kTile - args.padding,
                                 segment, args.styles ? args.styles[image] : 1.f, lines, parts);
    }
    transform_columns<kWindow>(parts, transformed + c * kPanel, stride);
  }
}

void winograd_gradient(const WinogradConv2d& args, int64_t tile, float* transformed) {
  Segment segments[kPanel];
  const int64_t found = find_segments(args, tile, segments);
  const int64_t stride = winograd_input_stride(args.outputs, kPanel);
  float lines[kWindow][kLine] = {};
  float parts[kWindow][kWindow][kPanel] = {};
  for (int64_t o = 0; o < args.outputs; ++o) {
    for (int64_t s = 0; s < found; ++s) {
      const Segment& segment = segments[s];
      const int64_t image = segment.sample * args.outputs + o;
      transform_segment<kTile>(args.y + image * args.out_height * args.out_width, args.out_height,
                               args.out_width, segment.row * kTile, segment.column * kTile, segment, 1.f,
                               lines, parts);
    }
    transform_columns<kTile>(parts, transformed + o * kPanel, stride);
  }
}

void winograd_weight_products(const WinogradConv2d& args, int64_t panels, int64_t part, int64_t output,
                              const float* inputs, const float* gradients, bool accumulate, float* target) {
  const int64_t input_stride = winograd_input_stride(args.channels, kPanel);
  const int64_t gradient_stride = winograd_input_stride(args.outputs, kPanel);
  const int64_t row = pad_channels(args.channels),
                outputs = std::min(args.outputs, output + kWinogradOutputs);
  for (int64_t c = 0; c < args.channels; c += kPanelVectors) {
    for (int64_t o = output; o < outputs; o += kRows) {
      const float* input = inputs + part * input_stride + c * kPanel;
      const float* gradient = gradients + part * gradient_stride + o * kPanel;
      Floats sums[kRows][kPanelVectors] = {};
      for (int64_t p = 0; p < panels; ++p) {
        for (int64_t t = 0; t < kPanel; t += kLanes) {
          Floats right[kPanelVectors];
          for (int v = 0; v < kPanelVectors; ++v) right[v] = load(input + v * kPanel + t);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            const Floats left = load(gradient + r * kPanel + t);
            for (int v = 0; v < kPanelVectors; ++v) sums[r][v] += left * right[v];
          }
        }
        input += kWinogradProducts * input_stride;
        gradient += kWinogradProducts * gradient_stride;
      }
      // What lies past the last channel or output is no sum of anything.
      for (int64_t r = 0; r < std::min(kRows, outputs - o); ++r) {
        float* values = target + (part * args.outputs + o + r) * row + c;
        for (int64_t v = 0; v < std::min(kPanelVectors, args.channels - c); ++v) {
          const float sum = lane_sum(sums[r][v]);
          values[v] = accumulate ? values[v] + sum : sum;
        }
      }
    }
  }
}

void winograd_weight_gradient(const WinogradConv2d& args, int64_t output, const float* sums,
                              float* grad_weight) {
  const int64_t row = pad_channels(args.channels);
  for (int64_t c = 0; c < args.channels; c += kLanes) {
    Floats w[kWinogradProducts], columns[3 * kWindow], g[9];
    for (int64_t n = 0; n < kWinogradProducts; ++n) w[n] = load(sums + (n * args.outputs + output) * row + c);
    for (int64_t j = 0; j < kWindow; ++j) transform_weight_gradient(w + j, kWindow, columns + j, kWindow);
    for (int64_t i = 0; i < 3; ++i) transform_weight_gradient(columns + i * kWindow, 1, g + i * 3, 1);
    for (int64_t lane = 0; lane < std::min(kLanes, args.channels - c); ++lane) {
      float* filter = grad_weight + (output * args.channels + c + lane) * 9;
      for (int64_t tap = 0; tap < 9; ++tap) filter[tap] = g[tap][lane];
    }
  }
}

void winograd_output(const WinogradConv2d& args, int64_t tile, int64_t output, const float* weights,
                     const float* transformed, float* products) {
  Segment segments[kPanel];
  const int64_t found = find_segments(args, tile, segments);
  const int64_t tiles = segments[found - 1].begin + segments[found - 1].count;
  const int64_t vectors = (tiles + kLanes - 1) / kLanes;
  if (vectors == 1) {
    multiply<1>(args, weights, transformed, products);
  } else if (vectors == 2) {
    multiply<2>(args, weights, transformed, products);
  } else {
    multiply<3>(args, weights, transformed, products);
  }
  float lines[kTile][kTile * kPanel];
  for (int64_t o = 0; o < std::min(kWinogradOutputs, args.outputs - output); ++o) {
    transform_products(products + o * kWinogradProducts * kPanel, vectors, lines);
    for (int64_t s = 0; s < found; ++s) finish_segment(args, segments[s], output + o, lines);
  }
}

}  // namespace AVATAR_ISA
}  // namespace avatar
