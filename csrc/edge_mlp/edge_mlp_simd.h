// Inner loops of edge_mlp, built once per instruction set: the layers on the edges of a few rows at a time.
//
// The first linear layer on edge (i, j) is p_i - q_j; every further one is a product with the activations of
// the one before. Rows of what belongs to layer l hold `stride` elements, a multiple of kColumnPad, 0 beyond
// `width`.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace avatar {

template <typename T>
struct EdgeMlpLayer {
  int64_t width, stride;
  // From the layer before, none for the first: (width, previous stride) and (previous stride, stride).
  const T* weight;
  const T* transposed;
  // Of the activation, null where the layer is left linear.
  const T* scale;
  const T* shift;
};

template <typename T>
struct EdgeMlpArgs {
  const T* p;             // (rows, width of the first layer)
  const T* q;             // likewise
  const int64_t* points;  // (rows, k) rows of q, -1 for none
  int64_t k;
  const EdgeMlpLayer<T>* layers;
  int64_t count;
  T negative_slope;
};

// Working memory of one tile of up to `edges` edges.
template <typename T>
struct EdgeMlpScratch {
  int64_t edges;
  int64_t* rows;    // (edges) row within the tile
  int32_t* slots;   // (edges) place in the row of neighbours
  T** linears;      // for each layer (edges, stride)
  T** activations;  // likewise
  T* gradients[2];  // (edges, largest stride), backward only
};

// What the last linear layer's gradient comes from: either the gradient of its activation's maximum with the
// places of the maxima, or `constant` + `factor` times the layer itself on every edge.
template <typename T>
struct EdgeMlpSeed {
  const T* grad;         // (rows, width)
  const int32_t* slots;  // (rows, width), -1 for none
  const T* constant;     // padded
  const T* factor;       // padded
};

// For each layer; they are added to.
template <typename T>
struct EdgeMlpGradients {
  T** weights;  // (width, previous stride)
  T** scales;   // padded
  T** shifts;   // padded
};

// edge_mlp_forward: writes output (rows, width) and, unless null, slots for rows [begin, end).
// edge_mlp_statistics: mean and sum of squared deviations, padded, of the last linear layer over the edges of
// rows
//   [begin, end); returns how many these are.
// edge_mlp_backward: adds the gradients of rows [begin, end), leaves that of the first linear layer for each
// edge
//   in `edges` (edges that exist, stride) and their sum over a row in grad_p (rows, width); returns their
//   number.
#define AVATAR_DECLARE_TYPE(T)                                                            \
  void edge_mlp_forward(const EdgeMlpArgs<T>& args, int64_t begin, int64_t end,           \
                        const EdgeMlpScratch<T>& scratch, T* output, int32_t* slots);     \
  int64_t edge_mlp_statistics(const EdgeMlpArgs<T>& args, int64_t begin, int64_t end,     \
                              const EdgeMlpScratch<T>& scratch, T* mean, T* squares);     \
  int64_t edge_mlp_backward(const EdgeMlpArgs<T>& args, int64_t begin, int64_t end,       \
                            const EdgeMlpScratch<T>& scratch, const EdgeMlpSeed<T>& seed, \
                            const EdgeMlpGradients<T>& gradients, T* edges, T* grad_p);
#define AVATAR_DECLARE(ISA)   \
  namespace ISA {             \
  AVATAR_DECLARE_TYPE(float)  \
  AVATAR_DECLARE_TYPE(double) \
  }
AVATAR_FOR_EACH_ISA(AVATAR_DECLARE)
#undef AVATAR_DECLARE
#undef AVATAR_DECLARE_TYPE

}  // namespace avatar
