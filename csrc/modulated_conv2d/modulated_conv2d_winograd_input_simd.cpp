#include "common/narrow.h"
#include "modulated_conv2d/modulated_conv2d_winograd_tile.h"
#include "upfirdn2d/upfirdn2d_simd.h"

namespace avatar {
namespace AVATAR_ISA {
namespace {

// Pixels of one row under a panel, with room for whole blocks of the resampling filter and its taps; behind
// them the last pixels of the tiles that end a segment.
constexpr int64_t kLine =
    (8 * kPanel + 1 + 2 * kWinogradTaps + kFirBlock) / kFirBlock * kFirBlock + kFirBlock;
constexpr int64_t kMostExtra = 2, kLineWithExtra = kLine + kMostExtra * kPanel + kLanes;
constexpr int64_t kMostParts = 9;
using Lines = float[kMostParts][kLineWithExtra];
// Whole vectors may end past the last tile; the room before the first is for a column that moves by a tile.
constexpr int64_t kPart = kLanes + kPanel;

// Copies `length` pixels of a row of `width` from `start` on, times `style`; 0 outside.
template <typename Pixel>
inline void copy_line(const Pixel* row, int64_t width, int64_t start, int64_t length, float style,
                      float* line) {
  const int64_t first = std::min(length, std::max<int64_t>(0, -start));
  const int64_t last = std::max(first, std::min(length, width - start));
  for (int64_t i = 0; i < first; ++i) line[i] = 0;
  for (int64_t i = last; i < length; ++i) line[i] = 0;
  const Pixel* source = row + start;
  if (last - first < kLanes) {
    store_some(line + first, load_some_floats(source + first, last - first) * style, last - first);
    return;
  }
  for (int64_t i = first; i + kLanes <= last; i += kLanes) store(line + i, load_floats(source + i) * style);
  store(line + last - kLanes, load_floats(source + last - kLanes) * style);
}

// One channel of one sample.
struct Image {
  const void* pixels;
  PixelType type;
  int64_t height, width;
  float style;
};

template <typename Pixel>
inline void copy_lines_of(const Image& image, int64_t top, int64_t left, int64_t count, int64_t length,
                          float* line, int64_t line_size) {
  const Pixel* pixels = static_cast<const Pixel*>(image.pixels);
  for (int64_t i = 0; i < count; ++i, line += line_size) {
    const bool inside = top + i >= 0 && top + i < image.height;
    copy_line(inside ? pixels + (top + i) * image.width : pixels, inside ? image.width : 0, left, length,
              image.style, line);
  }
}

// The first of `count` lines of `length` pixels is at (top, left).
inline void copy_lines(const Image& image, int64_t top, int64_t left, int64_t count, int64_t length,
                       float* line, int64_t line_size) {
  if (image.type == PixelType::bfloat16) {
    copy_lines_of<BFloat16>(image, top, left, count, length, line, line_size);
  } else if (image.type == PixelType::float16) {
    copy_lines_of<Float16>(image, top, left, count, length, line, line_size);
  } else {
    copy_lines_of<float>(image, top, left, count, length, line, line_size);
  }
}

// The same of the filtered image. Every line is filtered downwards before the first is filtered across, which
// reads what was written last in other pieces.
void filter_lines(const Image& image, const WinogradFilter& filter, int64_t top, int64_t left, int64_t count,
                  int64_t length, float* line, int64_t line_size) {
  float source[kMostParts + kWinogradTaps][kLine], filtered[kMostParts][kWinogradTaps][kLine];
  const int64_t wide = length + filter.taps - 1;
  copy_lines(image, top - filter.before, left - filter.before, count + filter.taps - 1, wide, source[0],
             kLine);
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
    fir_row(taps, num_taps, line + i * line_size, length);
  }
}

// Transforms `count` channels from `channel` on of a panel, whose lines fill(segment, channel, line) gives.
template <typename Kind, typename Fill>
void transform_panel(const WinogradConv2d& args, int64_t tile, int64_t end, int64_t channels, int64_t channel,
                     int64_t count, const Fill& fill, float* transformed) {
  constexpr int64_t kStep = Kind::kStep, kExtra = Kind::kLines - kStep, kParts = Kind::kParts;
  Segment segments[kPanel];
  const int64_t found = find_segments(args, tile, end, segments);
  const int64_t tiles = segments[found - 1].begin + segments[found - 1].count;
  const int64_t stride = winograd_image_stride(channels, kPanel);
  Lines lines = {};
  float parts[kParts][kStep + kExtra][kPart] = {};
  for (int64_t c = channel; c < channel + count; ++c) {
    for (int64_t s = 0; s < found; ++s) {
      float* line = lines[0] + segments[s].begin * kStep;
      fill(segments[s], c, line);
      // The next segment begins where the last pixels of this one are.
      for (int64_t i = 0; i < Kind::kLines && kExtra > 0; ++i) {
        const float* last = lines[i] + (segments[s].begin + segments[s].count) * kStep;
        std::copy_n(last, kExtra, lines[i] + kLine + s * kExtra);
      }
    }
    const auto transform_down = [&](int64_t p) {
      Kind::transform([&](int i) { return load(lines[i] + p); },
                      [&](int i, Floats value) { store(lines[i] + p, value); });
    };
    for (int64_t p = 0; p < tiles * kStep; p += kLanes) transform_down(p);
    for (int64_t p = 0; p < found * kExtra; p += kLanes) transform_down(kLine + p);
    for (int64_t i = 0; i < kParts; ++i) {
      float* columns = parts[i][0] + kLanes;
      for (int64_t t = 0; t < tiles; t += kLanes) {
        Floats pixels[kStep];
        for (int64_t j = 0; j < kStep; ++j) pixels[j] = load(lines[i] + t * kStep + j * kLanes);
        deinterleave(pixels);
        for (int64_t j = 0; j < kStep; ++j) store(columns + j * kPart + t, pixels[j]);
        // The first pixels of a tile are the last of the one before.
        for (int64_t j = 0; j < kExtra; ++j) store(columns + (kStep + j) * kPart + t - 1, pixels[j]);
      }
      for (int64_t s = 0; s < found && kExtra > 0; ++s) {
        const int64_t last = segments[s].begin + segments[s].count - 1;
        for (int64_t j = 0; j < kExtra; ++j) {
          columns[(kStep + j) * kPart + last] = lines[i][kLine + s * kExtra + j];
        }
      }
    }
    float* target = transformed + c * kPanel;
    for (int64_t i = 0; i < kParts; ++i) {
      for (int64_t t = 0; t < tiles; t += kLanes) {
        Kind::transform([&](int j) { return load(parts[i][j] + kLanes + t); },
                        [&](int j, Floats value) { store(target + (i * kParts + j) * stride + t, value); });
      }
    }
  }
}

// The image of one channel in `images`, (samples, channels, height, width) of this type.
inline Image channel_of(const Image& images, int64_t plane, const float* styles) {
  const int64_t bytes = images.type == PixelType::compute ? 4 : 2;
  Image image = images;
  image.pixels = static_cast<const char*>(images.pixels) + plane * images.height * images.width * bytes;
  image.style = styles ? styles[plane] : 1.f;
  return image;
}

// Tiles of `images`, as channel_of has them, without a filter; the first of them is `padding` above and to
// the left of the image.
template <typename Kind>
void transform_tiles(const WinogradConv2d& args, int64_t tile, int64_t end, const Image& images,
                     int64_t channels, int64_t channel, int64_t count, const float* styles, int64_t padding,
                     float* transformed) {
  const auto fill = [&](const Segment& segment, int64_t c, float* line) {
    copy_lines(channel_of(images, segment.sample * channels + c, styles), segment.row * Kind::kStep - padding,
               segment.column * Kind::kStep - padding, Kind::kLines,
               (segment.count - 1) * Kind::kStep + Kind::kLines, line, kLineWithExtra);
  };
  transform_panel<Kind>(args, tile, end, channels, channel, count, fill, transformed);
}

void transform_filtered(const WinogradConv2d& args, int64_t tile, int64_t end, const Image& images,
                        int64_t channels, int64_t channel, int64_t count, const float* styles,
                        float* transformed) {
  using Kind = LargeTile;
  const auto fill = [&](const Segment& segment, int64_t c, float* line) {
    filter_lines(channel_of(images, segment.sample * channels + c, styles), args.filter,
                 segment.row * Kind::kStep, segment.column * Kind::kStep, Kind::kLines,
                 (segment.count - 1) * Kind::kStep + Kind::kLines, line, kLineWithExtra);
  };
  transform_panel<Kind>(args, tile, end, channels, channel, count, fill, transformed);
}

}  // namespace

void winograd_input(const WinogradConv2d& args, int64_t tile, int64_t end, int64_t channel, int64_t count,
                    float* transformed) {
  const Image images{args.x, args.pixel, args.height, args.width, 1.f};
  const int64_t channels = args.channels;
  if (args.form == WinogradForm::plain) {
    transform_tiles<PlainInput>(args, tile, end, images, channels, channel, count, args.styles, args.padding,
                                transformed);
  } else if (args.form == WinogradForm::up) {
    transform_tiles<SmallTile>(args, tile, end, images, channels, channel, count, args.styles, 0,
                               transformed);
  } else {
    transform_filtered(args, tile, end, images, channels, channel, count, args.styles, transformed);
  }
}

void winograd_gradient(const WinogradConv2d& args, int64_t tile, float* transformed) {
  const Image images{args.y, args.pixel, args.out_height, args.out_width, 1.f};
  const int64_t end = count_tiles(args), outputs = args.outputs;
  if (args.form == WinogradForm::plain) {
    transform_tiles<PlainGradient>(args, tile, end, images, outputs, 0, outputs, args.scale, 0, transformed);
  } else if (args.form == WinogradForm::down) {
    transform_tiles<SmallTile>(args, tile, end, images, outputs, 0, outputs, args.scale, 0, transformed);
  } else {
    transform_filtered(args, tile, end, images, outputs, 0, outputs, args.scale, transformed);
  }
}

}  // namespace AVATAR_ISA
}  // namespace avatar
