#include "bias_act/bias_act_simd.h"
#include "common/narrow.h"
#include "modulated_conv2d/modulated_conv2d_winograd_tile.h"
#include "upfirdn2d/upfirdn2d_simd.h"

namespace avatar {
namespace AVATAR_ISA {
namespace {

// products (kWinogradOutputs, side * side, kPanel)
template <int kVectors>
void multiply_vectors(const WinogradConv2d& args, const float* weights, const float* transformed,
                      float* products) {
  const int64_t weight_stride = winograd_weight_stride(args.channels);
  const int64_t input_stride = winograd_image_stride(args.channels, kPanel);
  const int64_t depth = winograd_depth(args.channels);
  const int64_t side = winograd_products(args.form), parts = winograd_input_parts(args.form);
  const auto filters_of = [&](int64_t n) {
    return weights +
           (winograd_weight_part(n / side) * kSide + winograd_weight_part(n % side)) * weight_stride;
  };
  const auto input_of = [&](int64_t n) {
    return transformed +
           (winograd_image_part(n / side, parts) * parts + winograd_image_part(n % side, parts)) *
               input_stride;
  };
  for (int64_t n = 0; n < side * side; ++n) {
    const float *filters = filters_of(n), *input = input_of(n);
    const int64_t next = (n + 1) % (side * side);
    for (int64_t o = 0; o < kWinogradOutputs; o += kRows) {
      product<kVectors, false>(
          args.channels, filters + o * depth, input,
          {filters_of(next) + o * depth, input_of(next) + args.channels * kPanel / kWinogradOutputs * o},
          products + (o * side * side + n) * kPanel, side * side * kPanel);
    }
  }
}

// Returns the vectors of each line of products that hold a tile.
int64_t multiply(const WinogradConv2d& args, int64_t tiles, const float* weights, const float* transformed,
                 float* products) {
  const int64_t vectors = (tiles + kLanes - 1) / kLanes;
  if (vectors == 1) {
    multiply_vectors<1>(args, weights, transformed, products);
  } else if (vectors == 2) {
    multiply_vectors<2>(args, weights, transformed, products);
  } else {
    multiply_vectors<3>(args, weights, transformed, products);
  }
  return vectors;
}

// parts[r][j] holds pixel (r, j) of all tiles.
template <typename Kind>
inline void transform_products(const float* products, int64_t vectors, float (*parts)[Kind::kLines][kPanel]) {
  constexpr int64_t kProducts = Kind::kProducts;
  for (int64_t v = 0; v < vectors * kLanes; v += kLanes) {
    Floats rows[Kind::kLines][kProducts];
    for (int64_t j = 0; j < kProducts; ++j) {
      Kind::transform([&](int i) { return load(products + (i * kProducts + j) * kPanel + v); },
                      [&](int r, Floats value) { rows[r][j] = value; });
    }
    for (int64_t r = 0; r < Kind::kLines; ++r) {
      Kind::transform([&](int j) { return rows[r][j]; },
                      [&](int j, Floats value) { store(parts[r][j] + v, value); });
    }
  }
}

// line holds the pixels of one row of all tiles beside each other.
template <int64_t kStep>
inline void interleave_row(const float (*parts)[kPanel], int64_t vectors, float* line) {
  for (int64_t t = 0; t < vectors * kLanes; t += kLanes) {
    Floats pixels[kStep];
    for (int64_t j = 0; j < kStep; ++j) pixels[j] = load(parts[j] + t);
    interleave(pixels);
    for (int64_t j = 0; j < kStep; ++j) store(line + t * kStep + j * kLanes, pixels[j]);
  }
}

template <typename Pixel>
void store_narrow(const float* pixels, int64_t count, Pixel* target) {
  if (count < kLanes) return store_some_floats(target, load_some(pixels, count), count);
  for (int64_t i = 0; i + kLanes <= count; i += kLanes) store_floats(target + i, load(pixels + i));
  store_floats(target + count - kLanes, load(pixels + count - kLanes));
}

// Finishes rows of narrow pixels in pieces that stay in cache.
template <typename Pixel>
void finish_narrow(BiasActRow<float> row, Pixel* y, Pixel* demodulated) {
  constexpr int64_t kPiece = kTile * kPanel;
  float results[kPiece], scaled[kPiece];
  row.output = results;
  row.scaled = demodulated ? scaled : nullptr;
  for (int64_t left = row.size; left > 0; left -= kPiece) {
    row.size = std::min(left, kPiece);
    bias_act_row(row);
    store_narrow(results, row.size, y);
    y += kPiece;
    if (demodulated) {
      store_narrow(scaled, row.size, demodulated);
      demodulated += kPiece;
    }
    row.input += kPiece;
    if (row.noise) row.noise += kPiece;
  }
}

template <typename Pixel>
Pixel* pixel_at(void* images, int64_t pixel) {
  return images ? static_cast<Pixel*>(images) + pixel : nullptr;
}

// `count` pixels of row `row` of output channel `output` from column `left` on.
void finish_pixels(const WinogradConv2d& args, int64_t sample, int64_t output, int64_t row, int64_t left,
                   int64_t count, const float* pixels) {
  const int64_t image = sample * args.outputs + output, pixel = row * args.out_width + left;
  const int64_t target = image * args.out_height * args.out_width + pixel;
  BiasActRow<float> finished{pixels,
                             args.noise ? args.noise + sample * args.noise_stride + pixel : nullptr,
                             nullptr,
                             nullptr,
                             args.scale ? args.scale[image] : 1.f,
                             args.bias ? args.bias[output] : 0.f,
                             args.slope,
                             args.gain,
                             args.clamp,
                             count};
  if (args.pixel == PixelType::bfloat16) {
    finish_narrow(finished, pixel_at<BFloat16>(args.y, target), pixel_at<BFloat16>(args.demodulated, target));
  } else if (args.pixel == PixelType::float16) {
    finish_narrow(finished, pixel_at<Float16>(args.y, target), pixel_at<Float16>(args.demodulated, target));
  } else {
    finished.output = pixel_at<float>(args.y, target);
    finished.scaled = pixel_at<float>(args.demodulated, target);
    bias_act_row(finished);
  }
}

template <typename Kind>
void finish_tiles(const WinogradConv2d& args, const Segment* segments, int64_t found, int64_t vectors,
                  int64_t output, const float* products) {
  float parts[kTile][kTile][kPanel], lines[kTile][kTile * kPanel];
  constexpr int64_t kProducts = Kind::kProducts * Kind::kProducts;
  for (int64_t o = 0; o < std::min(kWinogradOutputs, args.outputs - output); ++o) {
    transform_products<Kind>(products + o * kProducts * kPanel, vectors, parts);
    for (int64_t r = 0; r < kTile; ++r) interleave_row<kTile>(parts[r], vectors, lines[r]);
    for (int64_t s = 0; s < found; ++s) {
      const Segment& segment = segments[s];
      const int64_t top = segment.row * kTile, left = segment.column * kTile;
      for (int64_t r = 0; r < std::min(kTile, args.out_height - top); ++r) {
        finish_pixels(args, segment.sample, output + o, top + r, left,
                      std::min(segment.count * kTile, args.out_width - left),
                      lines[r] + segment.begin * kTile);
      }
    }
  }
}

// Rows of y that row `row` of tiles completes end before this one.
inline int64_t finished_rows(const WinogradConv2d& args, int64_t row) {
  if (row < 0) return 0;
  if (row + 1 == args.tile_rows) return args.out_height;
  const int64_t rows = 8 * (row + 1) - args.filter.taps + args.filter.before + 1;
  return std::clamp<int64_t>(rows, 0, args.out_height);
}

// Filters the lines of the larger image that are in `band` into the rows of y that row `row` of tiles
// completes. Some rows are filtered downwards before they are filtered across, which reads what was written
// last in other pieces.
void filter_band(const WinogradConv2d& args, int64_t sample, int64_t output, int64_t row, const float* band,
                 float* memory) {
  const WinogradFilter& filter = args.filter;
  const int64_t height = 2 * args.height + 1, width = 2 * args.width + 1;
  const int64_t margin = std::max<int64_t>(0, filter.before), line = winograd_band_line(args);
  const int64_t size = winograd_filter_line(args);
  float* result = memory + kWinogradRows * filter.terms * size;
  std::fill_n(memory, kWinogradRows * filter.terms * size, 0.f);
  const int64_t end = finished_rows(args, row);
  for (int64_t begin = finished_rows(args, row - 1); begin < end; begin += kWinogradRows) {
    const int64_t rows = std::min(kWinogradRows, end - begin);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t top = begin + r - filter.before;
      const int64_t first = std::clamp<int64_t>(-top, 0, filter.taps);
      const int64_t last = std::clamp<int64_t>(height - top, first, filter.taps);
      for (int64_t term = 0; term < filter.terms; ++term) {
        float* filtered = memory + (r * filter.terms + term) * size + margin;
        FirTap<float> taps[kWinogradTaps];
        for (int64_t j = first; j < last; ++j) {
          taps[j - first] = {band + (top + j) % 24 * line, filter.down[term * filter.taps + j]};
        }
        fir_row(taps, last - first, filtered, width);
        std::fill_n(filtered + width, fir_padded(width) - width, 0.f);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      FirTap<float> taps[kWinogradTaps * kWinogradTaps];
      int64_t num_taps = 0;
      for (int64_t term = 0; term < filter.terms; ++term) {
        const float* filtered = memory + (r * filter.terms + term) * size + margin - filter.before;
        for (int64_t j = 0; j < filter.taps; ++j) {
          const float tap = filter.across[term * filter.taps + j];
          if (tap != 0) taps[num_taps++] = {filtered + j, tap};
        }
      }
      fir_row(taps, num_taps, result, args.out_width);
      finish_pixels(args, sample, output, begin + r, 0, args.out_width, result);
    }
  }
}

// Adds the tiles of a segment, whose lines change, to the lines of the larger image. The first line and
// column of a tile also get the last ones of the tiles before it: column by column, and then the line above,
// however a row is cut into segments, between which the last column waits behind the lines.
void add_to_band(const WinogradConv2d& args, const Segment& segment, bool first_row,
                 const float (*parts)[9][kPanel], float (*lines)[8 * kPanel], float* band) {
  const bool complete = segment.column + segment.count == args.tile_columns;
  const int64_t size = 8 * segment.count;
  float* waiting = band + 24 * winograd_band_line(args);
  for (int64_t r = 0; r < 9; ++r) {
    float* target = band + (8 * segment.row + r) % 24 * winograd_band_line(args) + 8 * segment.column;
    float* line = lines[r] + 8 * segment.begin;
    if (segment.column > 0) line[0] += waiting[r];
    const float last = parts[r][8][segment.begin + segment.count - 1];
    waiting[r] = last;
    if (r == 0 && !first_row) {
      for (int64_t i = 0; i < size; ++i) target[i] += line[i];
      if (complete) target[size] += last;
    } else {
      std::copy_n(line, size, target);
      if (complete) target[size] = last;
    }
  }
}

}  // namespace

int64_t winograd_panel() {
  return kPanel;
}

void winograd_output(const WinogradConv2d& args, int64_t tile, int64_t output, const float* weights,
                     const float* transformed, float* products) {
  Segment segments[kPanel];
  const int64_t found = find_segments(args, tile, count_tiles(args), segments);
  const int64_t tiles = segments[found - 1].begin + segments[found - 1].count;
  const int64_t vectors = multiply(args, tiles, weights, transformed, products);
  if (args.form == WinogradForm::plain) {
    finish_tiles<PlainOutput>(args, segments, found, vectors, output, products);
  } else {
    finish_tiles<SmallOutput>(args, segments, found, vectors, output, products);
  }
}

void winograd_up_output(const WinogradConv2d& args, const WinogradStripe& stripe, int64_t tile,
                        int64_t output, const float* weights, const float* transformed, float* products,
                        float* bands, float* memory) {
  Segment segments[kPanel];
  const int64_t found = find_segments(args, tile, stripe.end, segments);
  const int64_t tiles = segments[found - 1].begin + segments[found - 1].count;
  const int64_t vectors = multiply(args, tiles, weights, transformed, products);
  constexpr int64_t kProducts = LargeOutput::kProducts * LargeOutput::kProducts;
  float parts[9][9][kPanel], lines[9][8 * kPanel];
  for (int64_t o = 0; o < std::min(kWinogradOutputs, args.outputs - output); ++o) {
    float* band = bands + o * winograd_band(args);
    transform_products<LargeOutput>(products + o * kProducts * kPanel, vectors, parts);
    for (int64_t r = 0; r < 9; ++r) {
      for (int64_t s = 0; s < found; ++s) {
        const int64_t begin = segments[s].begin, end = begin + segments[s].count;
        for (int64_t t = begin + 1; t < end; ++t) parts[r][0][t] += parts[r][8][t - 1];
      }
      interleave_row<8>(parts[r], vectors, lines[r]);
    }
    for (int64_t s = 0; s < found; ++s) {
      const Segment& segment = segments[s];
      const int64_t row = segment.sample * args.tile_rows + segment.row;
      const bool first_row = segment.row == 0 || row == stripe.begin / args.tile_columns;
      add_to_band(args, segment, first_row, parts, lines, band);
      const bool complete = segment.column + segment.count == args.tile_columns;
      if (complete && row >= stripe.first_row) {
        filter_band(args, segment.sample, output + o, segment.row, band, memory);
      }
    }
  }
}

}  // namespace AVATAR_ISA
}  // namespace avatar
