// Inner loops of edge_moments, built once per instruction set.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/position_mlp.h"

namespace avatar {

// Count, mean (width) and sum of outer products of deviations (width, width) of some edges; width is the
// position network's out_padded.
struct EdgeMoments {
  double count;
  double* mean;
  double* scatter;
};

template <typename T>
struct EdgeMomentsArgs {
  PositionMlp<T> position;
  const int64_t* neighbors;  // (rows, k) within the cloud, -1 for none
  int64_t k, cloud;          // rows per cloud
};

template <typename T>
struct EdgeMomentsBackwardArgs {
  PositionMlp<T> position;
  IncomingEdges<T> incoming;
  const T* mean;      // (width)
  const T* constant;  // (width): gradient of every edge's numbers ...
  const T* slope;     // packed panels (width, width): ... and its part proportional to their deviations
};

// edge_moments_rows: merges the edges of rows [begin, end) into `moments`; returns the flat position of the
// first neighbour out of range, or -1.
// edge_moments_backward_points: the edges into points [begin, end); adds weight gradients to `weights`.
#define AVATAR_DECLARE_TYPE(T)                                                                          \
  int64_t edge_moments_rows(const EdgeMomentsArgs<T>& args, int64_t begin, int64_t end,                 \
                            EdgeMoments& moments);                                                      \
  void edge_moments_backward_points(const EdgeMomentsBackwardArgs<T>& args, int64_t begin, int64_t end, \
                                    T* weights);
#define AVATAR_DECLARE(ISA)                                                            \
  namespace ISA {                                                                      \
  AVATAR_DECLARE_TYPE(float)                                                           \
  AVATAR_DECLARE_TYPE(double)                                                          \
  void merge_edge_moments(const EdgeMoments& part, int64_t width, EdgeMoments& total); \
  }
AVATAR_FOR_EACH_ISA(AVATAR_DECLARE)
#undef AVATAR_DECLARE
#undef AVATAR_DECLARE_TYPE

}  // namespace avatar
