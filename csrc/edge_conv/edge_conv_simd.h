// Inner loops of edge_conv and edge_conv_norm, built once per instruction set.
//
// The hidden vector of edge (i, j) is h = u_i + q_i - q_j with q = B (x - c), u = A (x - c) + constant: see
// edge_conv_cpu.cpp. A row of u, q and of every other array called padded holds `stride` elements, a multiple
// of kColumnPad. The slot of a channel is the position in its row of neighbours where h is largest.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace avatar {

// Slots are bytes where the number of neighbours allows it.
constexpr int64_t kByteSlots = 255;
constexpr uint8_t kNoByteSlot = 255;
constexpr int32_t kNoSlot = -1;

// One cloud.
template <typename T>
struct EdgeCloud {
  const T* q;                // padded (num_points, stride)
  const int64_t* neighbors;  // (num_points, k), -1 for none
  int64_t num_points, k, channels, stride;
  bool ordered;  // q holds no NaN
};

template <typename T>
struct EdgeGatherArgs {
  EdgeCloud<T> cloud;
  T* output;    // (num_points, channels): the activation of h, or h itself where `activate` is false
  void* slots;  // padded (num_points, stride), bytes if k <= kByteSlots, else int32; or null
  T negative_slope;
  bool activate;
  // Channels whose first neighbour is taken instead of the largest h.
  const int64_t* first_channels;
  int64_t num_first_channels;
};

// Statistics of h over some edges: mean and sum of squared deviations, padded.
template <typename T>
struct EdgeStatistics {
  T* mean;
  T* squares;
  int64_t count;
};

// Backward of the normalised form, first half: from grad (num_points, channels) of the activation.
template <typename T>
struct EdgeNormBackwardArgs {
  EdgeCloud<T> cloud;
  const T* grad;
  const T* output;
  const void* slots;
  const T* mean;     // padded
  const T* inverse;  // padded, 1 / standard deviation
  T negative_slope;
  T* grad_linear;  // padded: gradient of the activation's argument
  T* centers;      // padded: u_i + q_i - mean
  T* deviations;   // padded: sum over the row's edges of h - mean
};

// Edges that lead to a point, as ReverseAdjacency gives them; rows are those of the whole batch.
template <typename T>
struct EdgeReverseArgs {
  const int64_t* offsets;  // of the cloud's first point
  const int64_t* edges;
  int64_t k, stride;
  const T* grad_linear;  // padded, all rows of the batch
  const void* slots;     // padded, all rows of the batch
  const T* centers;      // padded, all rows of the batch, or null
  const T* q;            // padded, the cloud's, needed with centers
};

// edge_conv_center: padded rows of x - reference, of x (rows, inputs).
// edge_conv_has_nan: whether any of the values is NaN; their number is a multiple of kColumnPad.
// edge_conv_gather: rows [begin, end) of a cloud with u padded (end - begin, stride); adds to statistics
//   unless null; returns the flat position of the first neighbour out of range, or -1.
// edge_conv_norm_backward: rows [begin, end); adds to the padded sums of grad_linear and of grad_linear times
//   the normalised h.
// edge_conv_reverse: points [begin, end) of a cloud; writes the padded sums of grad_linear over the edges
//   where the point was the largest and, with centers, of h - mean over all its edges.
#define AVATAR_DECLARE_TYPE(T)                                                                              \
  bool edge_conv_has_nan(const T* values, int64_t count);                                                   \
  void edge_conv_center(const T* x, int64_t rows, int64_t inputs, const T* reference, T* centered,          \
                        int64_t stride);                                                                    \
  int64_t edge_conv_gather(const EdgeGatherArgs<T>& args, int64_t begin, int64_t end, const T* u,           \
                           EdgeStatistics<T>* statistics);                                                  \
  void edge_conv_norm_backward(const EdgeNormBackwardArgs<T>& args, int64_t begin, int64_t end, const T* u, \
                               T* sum_grad, T* sum_grad_normalized);                                        \
  void edge_conv_reverse(const EdgeReverseArgs<T>& args, int64_t begin, int64_t end, T* grad_neighbor,      \
                         T* deviations);
#define AVATAR_DECLARE(ISA)   \
  namespace ISA {             \
  AVATAR_DECLARE_TYPE(float)  \
  AVATAR_DECLARE_TYPE(double) \
  }
AVATAR_FOR_EACH_ISA(AVATAR_DECLARE)
#undef AVATAR_DECLARE
#undef AVATAR_DECLARE_TYPE

}  // namespace avatar
