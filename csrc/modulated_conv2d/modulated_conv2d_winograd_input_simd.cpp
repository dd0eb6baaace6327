#include "modulated_conv2d/modulated_conv2d_winograd_tile.h"
#include "upfirdn2d/upfirdn2d_simd.h"

namespace avatar {
namespace AVATAR_ISA {
namespace {

// Pixels of one row under a panel that crosses no row of tiles, with room for whole blocks of the resampling
// filter and its taps.
constexpr int64_t kLine =
    (8 * kPanel + 1 + 2 * kWinogradTaps + kFirBlock) / kFirBlock * kFirBlock + kFirBlock;
constexpr int64_t kMostParts = 9;
using Lines = float[kMostParts][kLine];
// Whole vectors may end past the last tile.
using Parts = float[kMostParts][kMostParts][kPanel + kLanes];

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

struct Image {
  const float* pixels;
  int64_t height, width;
  float style;
};

// The first of `count` lines of `length` pixels is at (top, left).
inline void copy_lines(const Image& image, int64_t top, int64_t left, int64_t count, int64_t length,
                       float (*lines)[kLine]) {
  for (int64_t i = 0; i < count; ++i) {
    const bool inside = top + i >= 0 && top + i < image.height;
    copy_line(inside ? image.pixels + (top + i) * image.width : image.pixels, inside ? image.width : 0, left,
              length, image.style, lines[i]);
  }
}

// The same of the filtered image. Every line is filtered downwards before the first is filtered across, which
// reads what was written last in other pieces.
void filter_lines(const Image& image, const WinogradFilter& filter, int64_t top, int64_t left, int64_t count,
                  int64_t length, float (*lines)[kLine]) {
  float source[kMostParts + kWinogradTaps][kLine], filtered[kMostParts][kWinogradTaps][kLine];
  const int64_t wide = length + filter.taps - 1;
  copy_lines(image, top - filter.before, left - filter.before, count + filter.taps - 1, wide, source);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t term = 0; term < filter.terms; ++term) {
      FirTap<float> taps[kWinogradTaps];
      for (int64_t j = 0; j < filter.taps; ++j) {
        taps[j] = {source[i + j], filter.down[term * filter.taps + j]};
      }
      fir_row(taps, filter.taps, filtered[i][term], wide);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    FirTap<float> taps[kWinogradTaps * kWinogradTaps];
    int64_t num_taps = 0;
    for (int64_t term = 0; term < filter.terms; ++term) {
      for (int64_t j = 0; j < filter.taps; ++j) {
        const float tap = filter.across[term * filter.taps + j];
        if (tap != 0) taps[num_taps++] = {filtered[i][term] + j, tap};
      }
    }
    fir_row(taps, num_taps, lines[i], length);
  }
}

// parts[i][j][t] for the tiles of a segment: row i of the tiles transformed vertically, column j of the tile.
template <typename Kind>
void transform_segment(const Segment& segment, Lines& lines, Parts& parts) {
  const int64_t length = (segment.count - 1) * Kind::kStep + Kind::kLines;
  for (int64_t p = 0; p < length; p += kLanes) {
    Kind::transform([&](int i) { return load(lines[i] + p); },
                    [&](int i, Floats value) { store(lines[i] + p, value); });
  }
  constexpr int64_t kStep = Kind::kStep;
  for (int64_t i = 0; i < Kind::kParts; ++i) {
    const float* line = lines[i];
    for (int64_t t = 0; t < segment.count; t += kLanes) {
      Floats pixels[kStep];
      for (int64_t j = 0; j < kStep; ++j) pixels[j] = load(line + t * kStep + j * kLanes);
      deinterleave(pixels);
      for (int64_t j = 0; j < kStep; ++j) {
        store_some(parts[i][j] + segment.begin + t, pixels[j], segment.count - t);
      }
    }
    // The last pixels of a tile are the first of the next.
    for (int64_t j = kStep; j < Kind::kLines; ++j) {
      const float* next = parts[i][j - kStep] + segment.begin + 1;
      std::copy_n(next, segment.count - 1, parts[i][j] + segment.begin);
      parts[i][j][segment.begin + segment.count - 1] = line[segment.count * kStep + j - kStep];
    }
  }
}

// Transforms a panel of `channels` images of each sample, whose lines `fill(segment, channel, lines)` gives.
template <typename Kind, typename Fill>
void transform_panel(const WinogradConv2d& args, int64_t tile, int64_t end, int64_t channels,
                     const Fill& fill, float* transformed) {
  Segment segments[kPanel];
  const int64_t found = find_segments(args, tile, end, segments);
  const int64_t stride = winograd_image_stride(channels, kPanel);
  Lines lines = {};
  // Tiles past the last stay 0.
  Parts parts = {};
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t s = 0; s < found; ++s) {
      fill(segments[s], c, lines);
      transform_segment<Kind>(segments[s], lines, parts);
    }
    float* target = transformed + c * kPanel;
    for (int64_t i = 0; i < Kind::kParts; ++i) {
      for (int64_t t = 0; t < kPanel; t += kLanes) {
        Kind::transform(
            [&](int j) { return load(parts[i][j] + t); },
            [&](int j, Floats value) { store(target + (i * Kind::kParts + j) * stride + t, value); });
      }
    }
  }
}

// Tiles without a filter, the first of which is `padding` above and to the left of the image.
template <typename Kind>
void transform_tiles(const WinogradConv2d& args, int64_t tile, int64_t end, const Image& image,
                     int64_t channels, const float* styles, int64_t padding, float* transformed) {
  const auto fill = [&](const Segment& segment, int64_t channel, Lines& lines) {
    const int64_t plane = segment.sample * channels + channel;
    copy_lines({image.pixels + plane * image.height * image.width, image.height, image.width,
                styles ? styles[plane] : 1.f},
               segment.row * Kind::kStep - padding, segment.column * Kind::kStep - padding, Kind::kLines,
               (segment.count - 1) * Kind::kStep + Kind::kLines, lines);
  };
  transform_panel<Kind>(args, tile, end, channels, fill, transformed);
}

void transform_filtered(const WinogradConv2d& args, int64_t tile, int64_t end, const Image& image,
                        int64_t channels, const float* styles, float* transformed) {
  using Kind = LargeTile;
  const auto fill = [&](const Segment& segment, int64_t channel, Lines& lines) {
    const int64_t plane = segment.sample * channels + channel;
    filter_lines({image.pixels + plane * image.height * image.width, image.height, image.width,
                  styles ? styles[plane] : 1.f},
                 args.filter, segment.row * Kind::kStep, segment.column * Kind::kStep, Kind::kLines,
                 (segment.count - 1) * Kind::kStep + Kind::kLines, lines);
  };
  transform_panel<Kind>(args, tile, end, channels, fill, transformed);
}

}  // namespace

void winograd_input(const WinogradConv2d& args, int64_t tile, int64_t end, float* transformed) {
  const Image image{args.x, args.height, args.width, 1.f};
  if (args.form == WinogradForm::plain) {
    transform_tiles<PlainInput>(args, tile, end, image, args.channels, args.styles, args.padding,
                                transformed);
  } else if (args.form == WinogradForm::up) {
    transform_tiles<SmallTile>(args, tile, end, image, args.channels, args.styles, 0, transformed);
  } else {
    transform_filtered(args, tile, end, image, args.channels, args.styles, transformed);
  }
}

void winograd_gradient(const WinogradConv2d& args, int64_t tile, float* transformed) {
  const Image image{args.y, args.out_height, args.out_width, 1.f};
  const int64_t end = count_tiles(args);
  if (args.form == WinogradForm::plain) {
    transform_tiles<PlainGradient>(args, tile, end, image, args.outputs, args.scale, 0, transformed);
  } else if (args.form == WinogradForm::down) {
    transform_tiles<SmallTile>(args, tile, end, image, args.outputs, args.scale, 0, transformed);
  } else {
    transform_filtered(args, tile, end, image, args.outputs, args.scale, transformed);
  }
}

}  // namespace AVATAR_ISA
}  // namespace avatar
