// The position network of an edge (i, j), e = [p_i ; p_j ; p_i - p_j ; |p_i - p_j|] through linear layers
// with LeakyReLU, as kernels hold it. The first layer splits into a part of the centre and one of the edge,
//   z = ((W_a + W_b) p_i + b) + (W_c - W_b) (p_i - p_j) + w_d |p_i - p_j|,
// so that differences never cancel far from the origin. Widths are padded to whole vectors.
#pragma once

#include <cstdint>

namespace avatar {

template <typename T>
struct PositionLayer {
  int64_t in, out;        // padded; the first layer's `in` is that of [p_i - p_j ; |p_i - p_j|]
  const T* weight;        // packed panels (in, out); the first layer: W_c - W_b and w_d
  const T* bias;          // (out); the first layer's is within the centre's part
  const T* transposed;    // packed panels (out, in), or null; the first layer: W_a + W_c and w_d
  int64_t gradient;       // where a block of weight gradients holds (out, in)
  int64_t bias_gradient;  // and (out)
};

template <typename T>
struct PositionMlp {
  const T* points;  // (rows, dims) of all clouds, rows point_stride apart: 4 for three dimensions
  int64_t dims, dims_padded, point_stride;
  const PositionLayer<T>* layers;
  int64_t depth;         // 0: the code itself, 3 dims + 1 numbers
  const T* center_part;  // (rows, out of the first layer): (W_a + W_b) p + b; or null
  // Of the first layer as rows (dims, out): W_a + W_b.
  const T* center_weight;
  // Of the first layer as rows (dims + 1, out), relative to the centre: W_c - W_b and w_d; relative to the
  // neighbour, whose z has its own centre's part: W_a + W_c and w_d. Null but for three dimensions and one
  // layer, the former also for two.
  const T *from_center, *from_neighbor;
  const T* to_neighbor;  // packed panels (out, dims_padded): W_b - W_c; or null
  int64_t neighbor_gradient;
  T slope;
  int64_t code_padded;  // padded widths of [p_i - p_j ; |p_i - p_j|], and with depth 0 of the code,
  int64_t out_padded;   // and of what comes out
  int64_t hidden_sum;   // sum of out over the layers, or out_padded with depth 0
  int64_t widest;       // the widest of code_padded and all out
};

// The `count` edges into each point, for gradients: see ReverseAdjacency. Edge e starts at row first_row + e
// / k.
template <typename T>
struct IncomingEdges {
  const int64_t* offsets;
  const int64_t* edges;
  int64_t count, first_row, first_point, k;
  T* edge_gradient;  // (edges, dims): what edges send to their centres, or null
  T* grad_points;    // (rows, dims): what they send to the point they lead to is added, or null
};

}  // namespace avatar
