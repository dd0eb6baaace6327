// Inner loops of rasterize_points, built once per instruction set.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace avatar {

// Tiles are squares of this many pixels a side.
constexpr int64_t kTile = 16;

// A point that may cover pixels.
template <typename T>
struct Splat {
  T x, y, depth;
  T limit;  // radius squared
  int64_t index;
};

template <typename T>
struct RasterizeTileArgs {
  const Splat<T>* splats;
  const int32_t* entries;  // (count,) positions in splats, by ascending (depth, index)
  int64_t count;
  int64_t first_row, end_row, first_column, end_column;  // of the tile
  int64_t width, points_per_pixel;
  int64_t* used;     // (height, width) slots filled so far
  int64_t* indices;  // (height, width, points_per_pixel), as the next two
  T* depths;
  T* distances;
};

template <typename T>
struct RasterizeBackwardArgs {
  const T* grad_depths;  // (batch, height, width, points_per_pixel), as the next
  const T* grad_distances;
  const T* points;         // (num_points, 3)
  const int64_t* offsets;  // (num_points + 1,) where each point's slots begin in slots
  const int64_t* slots;    // flat positions in (batch, height, width, points_per_pixel)
  T* grad_points;          // (num_points, 3)
  int64_t first_row;       // of this image among those of the batch
  int64_t width, points_per_pixel;
};

// rasterize_tile: appends the entries to the pixels of a tile; returns whether all its pixels are now full.
// rasterize_backward_points: gradients of the points [begin, end).
#define AVATAR_DECLARE(ISA)                                                                              \
  namespace ISA {                                                                                        \
  bool rasterize_tile(const RasterizeTileArgs<float>& args);                                             \
  bool rasterize_tile(const RasterizeTileArgs<double>& args);                                            \
  void rasterize_backward_points(const RasterizeBackwardArgs<float>& args, int64_t begin, int64_t end);  \
  void rasterize_backward_points(const RasterizeBackwardArgs<double>& args, int64_t begin, int64_t end); \
  }
AVATAR_FOR_EACH_ISA(AVATAR_DECLARE)
#undef AVATAR_DECLARE

}  // namespace avatar
