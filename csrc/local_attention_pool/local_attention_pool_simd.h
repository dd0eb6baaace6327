// Inner loops of local_attention_pool, built once per instruction set.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/isa.h"
#include "common/position_mlp.h"

namespace avatar {

// Rows are the points of all clouds. Inside, a hidden vector h is [features ; position], each part padded to
// whole vectors, `hidden` numbers together; buffers called padded have rows of that layout.
template <typename T>
struct PoolArgs {
  PositionMlp<T> position;
  const int64_t* neighbors;  // (rows, k) within the cloud, -1 for none
  const int64_t* order;      // (rows,): the rows one after the other; null for 0, 1, ...
  int64_t k, cloud;          // rows per cloud
  bool by_tiles;             // whether edges of near centres share products: AVX-512
  int64_t channels, channels_padded, position_channels, hidden;
  const T* features;  // (rows, channels_padded)
  // Packed panels (channels_padded, hidden) and (position, hidden): score_weight transposed, its upper and
  // its lower part, forward times log2(e), so that weights of the softmax are powers of two.
  const T *feature_weight, *position_weight;
  const T* scores;  // (rows, hidden): the features' share of the scores
  T* pooled;        // (rows, channels + position_channels)
  T* statistics;    // the same: logarithm of the softmax's denominator; or null
};

// Whether features and position channels, each padded to 8, share one vector of AVX-512. Internal linkage, as
// every instruction set compiles its own.
template <typename T>
static bool is_narrow(const PoolArgs<T>& args) {
  const PositionMlp<T>& mlp = args.position;
  bool narrow = sizeof(T) == 4 && args.channels_padded == 8 && mlp.dims == 3;
  narrow = narrow && (mlp.depth == 1 || mlp.depth == 2);
  for (int64_t l = 0; l < mlp.depth; ++l) narrow = narrow && mlp.layers[l].out == 8;
  return narrow;
}

// Rows of a tile. Results depend on which rows share one, so threads take whole tiles.
template <typename T>
static int64_t rows_of_tile(const PoolArgs<T>& args) {
  // Wide codes of two layers take large matrices for each tile.
  const bool is_large = args.position.depth > 1 && args.hidden >= 256;
  const int64_t edges = !args.by_tiles ? 48 : is_large ? 320 : 192;
  return std::max<int64_t>(1, edges / std::max<int64_t>(1, args.k));
}

template <typename T>
struct PoolBackwardArgs {
  PoolArgs<T> pool;  // without scores, pooled and statistics
  IncomingEdges<T> incoming;
  const T* grad;  // padded, as are the next two
  const T* pooled;
  const T* statistics;
  const T* feature_score;   // packed panels (hidden, channels_padded): score_weight's left part
  const T* position_score;  // packed panels (hidden, position): its right part
  int64_t score_gradient;   // where a block of weight gradients holds (hidden, hidden)
  T* grad_features;         // (rows, channels_padded), added to
};

// local_attention_pool_rows: places [begin, end) of the order, `begin` a multiple of rows_of_tile; returns
// the flat position of a neighbour out of range, or -1. With AVX-512, what is_narrow is laid out for vectors
// of 8 all the same, and wants no order. local_attention_pool_backward_points: the edges into points [begin,
// end); adds weight gradients to `weights`.
#define AVATAR_DECLARE_TYPE(T)                                                                           \
  int64_t local_attention_pool_rows(const PoolArgs<T>& args, int64_t begin, int64_t end);                \
  void local_attention_pool_backward_points(const PoolBackwardArgs<T>& args, int64_t begin, int64_t end, \
                                            T* weights);
#define AVATAR_DECLARE(ISA)   \
  namespace ISA {             \
  AVATAR_DECLARE_TYPE(float)  \
  AVATAR_DECLARE_TYPE(double) \
  }
AVATAR_FOR_EACH_ISA(AVATAR_DECLARE)
#undef AVATAR_DECLARE
#undef AVATAR_DECLARE_TYPE

}  // namespace avatar
