// What edge_conv and edge_conv_norm share: the split of the linear map and passes over blocks of rows.
//
// With W = [A | B] and a reference point c the linear map of edge (i, j) splits into per-point products,
//   A x_i + B (x_i - x_j) = u_i + q_i - q_j,   u = A (x - c) + A c,   q = B (x - c),
// and since c lies inside the cloud, q_i - q_j loses no digits to an offset of the whole cloud.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>

#include "common/adjacency.h"
#include "common/matrix_simd.h"
#include "common/tensor.h"
#include "edge_conv/edge_conv_simd.h"

namespace avatar {

constexpr int64_t kBlockRows = 48;

template <typename T>
std::vector<T> to_vector(const Tensor& tensor) {
  const Tensor values = to_compute(tensor);
  return {const_data<T>(values), const_data<T>(values) + values.numel()};
}

template <typename T>
struct EdgePlan {
  int64_t batch, num_points, k, inputs, channels;
  int64_t input_stride, stride;  // padded rows of x and of channels
  const T* x;                    // (batch, num_points, inputs)
  const int64_t* neighbors;      // (batch, num_points, k)
  // A and B, rows times the factors: (channels, input_stride), and transposed (inputs, stride).
  std::vector<T> own, neighbor, own_transposed, neighbor_transposed;
  std::vector<T> reference;  // c of each cloud (batch, input_stride)
  std::vector<T> constant;   // added to u of each cloud (batch, stride)

  int64_t blocks_per_cloud() const { return (num_points + kBlockRows - 1) / kBlockRows; }
  int64_t blocks() const { return batch * blocks_per_cloud(); }
  int64_t rows() const { return batch * num_points; }
};

// Rows [begin, end) of cloud b.
struct EdgeBlock {
  int64_t cloud, begin, end;
  int64_t rows() const { return end - begin; }
};

template <typename T>
EdgeBlock edge_block(const EdgePlan<T>& plan, int64_t block) {
  const int64_t begin = block % plan.blocks_per_cloud() * kBlockRows;
  return {block / plan.blocks_per_cloud(), begin, std::min(begin + kBlockRows, plan.num_points)};
}

// The factors multiply the rows of weight (channels, 2 * inputs), which follow the order [x_i ; x_i - x_j].
template <typename T>
EdgePlan<T> edge_plan(const Tensor& x, const Tensor& neighbors, const std::vector<T>& weight,
                      const std::vector<T>& factors) {
  EdgePlan<T> plan;
  plan.batch = x.size(0);
  plan.num_points = x.size(1);
  plan.inputs = x.size(2);
  plan.k = neighbors.size(2);
  plan.channels = int64_t(factors.size());
  plan.input_stride = pad_columns(plan.inputs);
  plan.stride = pad_columns(plan.channels);
  plan.x = const_data<T>(x);
  plan.neighbors = const_data<int64_t>(neighbors);
  plan.own.assign(plan.channels * plan.input_stride, 0);
  plan.neighbor.assign(plan.channels * plan.input_stride, 0);
  plan.own_transposed.assign(plan.inputs * plan.stride, 0);
  plan.neighbor_transposed.assign(plan.inputs * plan.stride, 0);
  for (int64_t o = 0; o < plan.channels; ++o) {
    for (int64_t c = 0; c < plan.inputs; ++c) {
      const T own = factors[o] * weight[o * 2 * plan.inputs + c];
      const T neighbor = factors[o] * weight[o * 2 * plan.inputs + plan.inputs + c];
      plan.own[o * plan.input_stride + c] = plan.own_transposed[c * plan.stride + o] = own;
      plan.neighbor[o * plan.input_stride + c] = plan.neighbor_transposed[c * plan.stride + o] = neighbor;
    }
  }
  plan.reference.assign(plan.batch * plan.input_stride, 0);
  plan.constant.assign(plan.batch * plan.stride, 0);
  return plan;
}

// The median, per coordinate, of a few points that are somebody's neighbour: padding and outliers do not
// reach it. Rows [begin, end) are those of one cloud or of the whole batch.
template <typename T>
void find_reference(const EdgePlan<T>& plan, int64_t begin, int64_t end, T* reference) {
  constexpr int64_t kSamples = 9;
  std::array<const T*, kSamples> points;
  int64_t found = 0;
  for (int64_t sample = 0; sample < kSamples; ++sample) {
    // The first neighbour in this share of the rows.
    const int64_t* from = plan.neighbors + (begin + (end - begin) * sample / kSamples) * plan.k;
    const int64_t* to = plan.neighbors + (begin + (end - begin) * (sample + 1) / kSamples) * plan.k;
    const int64_t* point = std::find_if(from, to, [&](int64_t n) { return n >= 0 && n < plan.num_points; });
    if (point == to) continue;
    const int64_t cloud = (point - plan.neighbors) / plan.k / plan.num_points;
    points[found++] = plan.x + (cloud * plan.num_points + *point) * plan.inputs;
  }
  for (int64_t c = 0; c < plan.inputs; ++c) {
    std::array<T, kSamples> values;
    int64_t finite = 0;
    for (int64_t n = 0; n < found; ++n) {
      if (std::isfinite(points[n][c])) values[finite++] = points[n][c];
    }
    std::sort(values.begin(), values.begin() + finite);
    reference[c] = finite > 0 ? values[finite / 2] : T(0);
  }
}

// A c of one cloud.
template <typename T>
std::vector<double> own_product(const EdgePlan<T>& plan, const T* reference) {
  std::vector<double> product(plan.channels, 0);
  for (int64_t o = 0; o < plan.channels; ++o) {
    for (int64_t c = 0; c < plan.inputs; ++c) {
      product[o] += double(plan.own[o * plan.input_stride + c]) * double(reference[c]);
    }
  }
  return product;
}

// Calls body(block index, block, scratch) for every block; scratch holds `scratch_size` elements.
template <typename T, typename Body>
void for_each_block(const EdgePlan<T>& plan, int64_t scratch_size, const Body& body) {
  torch::stable::parallel_for(0, plan.blocks(), 1, [&](int64_t begin, int64_t end) {
    std::vector<T> scratch(scratch_size);
    for (int64_t block = begin; block < end; ++block) body(block, edge_block(plan, block), scratch.data());
  });
}

// Padded rows of x of a block.
template <typename T>
void copy_rows(const EdgePlan<T>& plan, const EdgeBlock& block, T* tile) {
  for (int64_t row = block.begin; row < block.end; ++row, tile += plan.input_stride) {
    std::copy_n(plan.x + (block.cloud * plan.num_points + row) * plan.inputs, plan.inputs, tile);
    std::fill(tile + plan.inputs, tile + plan.input_stride, T(0));
  }
}

template <typename T>
void copy_centered_rows(const EdgePlan<T>& plan, const EdgeBlock& block, T* tile) {
  const T* x = plan.x + (block.cloud * plan.num_points + block.begin) * plan.inputs;
  const T* reference = plan.reference.data() + block.cloud * plan.input_stride;
  AVATAR_ISA_CALL(edge_conv_center, x, block.rows(), plan.inputs, reference, tile, plan.input_stride);
}

// q of all points, padded; returns whether it is free of NaN.
template <typename T>
bool neighbor_products(const EdgePlan<T>& plan, T* q) {
  std::atomic<bool> ordered{true};
  for_each_block(plan, kBlockRows * plan.input_stride, [&](int64_t, const EdgeBlock& block, T* tile) {
    copy_centered_rows(plan, block, tile);
    const MatrixProduct<T> product{
        tile,        plan.input_stride,
        1,           plan.neighbor_transposed.data(),
        plan.stride, q + (block.cloud * plan.num_points + block.begin) * plan.stride,
        plan.stride, block.rows(),
        plan.inputs, plan.stride,
        false};
    AVATAR_ISA_CALL(matrix_product, product);
    if (AVATAR_ISA_CALL(edge_conv_has_nan, product.c, block.rows() * plan.stride)) {
      ordered.store(false, std::memory_order_relaxed);
    }
  });
  return ordered;
}

// u of a block, padded, from its centred rows.
template <typename T>
void own_products(const EdgePlan<T>& plan, const EdgeBlock& block, const T* tile, T* u) {
  const T* constant = plan.constant.data() + block.cloud * plan.stride;
  for (int64_t row = 0; row < block.rows(); ++row) std::copy_n(constant, plan.stride, u + row * plan.stride);
  const MatrixProduct<T> product{tile,        plan.input_stride,
                                 1,           plan.own_transposed.data(),
                                 plan.stride, u,
                                 plan.stride, block.rows(),
                                 plan.inputs, plan.stride,
                                 true};
  AVATAR_ISA_CALL(matrix_product, product);
}

template <typename T>
EdgeCloud<T> edge_cloud(const EdgePlan<T>& plan, const T* q, bool ordered, int64_t cloud) {
  return {q + cloud * plan.num_points * plan.stride,
          plan.neighbors + cloud * plan.num_points * plan.k,
          plan.num_points,
          plan.k,
          plan.channels,
          plan.stride,
          ordered};
}

inline ScalarType slot_type(int64_t k) {
  return k <= kByteSlots ? ScalarType::Byte : ScalarType::Int;
}

// Where the slots of a row begin; null stays null.
template <typename T>
void* slots_at(const EdgePlan<T>& plan, void* slots, int64_t row) {
  const int64_t bytes = plan.k <= kByteSlots ? sizeof(uint8_t) : sizeof(int32_t);
  return slots == nullptr ? nullptr : static_cast<char*>(slots) + row * plan.stride * bytes;
}

template <typename T>
bool is_empty_row(const EdgePlan<T>& plan, int64_t row) {
  const int64_t* neighbors = plan.neighbors + row * plan.k;
  return std::all_of(neighbors, neighbors + plan.k, [](int64_t point) { return point < 0; });
}

// Sums the padded rows (blocks, stride) that blocks left, in order.
template <typename T>
std::vector<double> sum_blocks(const EdgePlan<T>& plan, const std::vector<T>& parts) {
  std::vector<double> sums(plan.stride, 0);
  for (int64_t block = 0; block < plan.blocks(); ++block) {
    for (int64_t c = 0; c < plan.stride; ++c) sums[c] += parts[block * plan.stride + c];
  }
  return sums;
}

// Gradients in x and in the folded weight from those of u and q. For each block `combine(block, row, sums,
// deviations, grad_own)` turns the padded sums over incoming edges into the gradient of q, in place, and
// writes that of u.
//   weight_grads: (channels, 2 * inputs) in double, grad_x: (batch, num_points, inputs).
//   center_own: whether x may be centred for A's gradient too, as where the gradients of u sum to zero.
template <typename T, typename Combine>
std::vector<double> edge_gradients(const EdgePlan<T>& plan, const ReverseAdjacency& reverse,
                                   const T* grad_linear, void* slots, const T* centers, const T* q, T* grad_x,
                                   bool center_own, const Combine& combine) {
  // A fixed number of parts keeps the order of sums; together they take no more memory than x and u.
  const int64_t part_size = plan.channels * plan.input_stride;
  const int64_t fitting = plan.rows() * (plan.inputs + plan.channels) / std::max<int64_t>(1, 2 * part_size);
  const int64_t parts = std::clamp<int64_t>(std::min(fitting, plan.blocks()), 1, 32);
  std::vector<T> weight_parts(parts * 2 * part_size, 0);
  const int64_t tile_size = kBlockRows * plan.stride, input_tile_size = kBlockRows * plan.input_stride;
  parallel_tasks(parts, [&](int64_t part) {
    std::vector<T> scratch(3 * tile_size + 3 * input_tile_size);
    T* grad_own = scratch.data();
    T* grad_neighbor = grad_own + tile_size;
    T* deviations = grad_neighbor + tile_size;
    T* centered = deviations + tile_size;
    T* raw = centered + input_tile_size;
    T* grad_tile = raw + input_tile_size;
    for (int64_t n = plan.blocks() * part / parts; n < plan.blocks() * (part + 1) / parts; ++n) {
      const EdgeBlock block = edge_block(plan, n);
      const int64_t first_row = block.cloud * plan.num_points;
      const int64_t* offsets = reverse.offsets.data() + first_row;
      const EdgeReverseArgs<T> args{offsets,     reverse.edges.data(),
                                    plan.k,      plan.stride,
                                    grad_linear, slots,
                                    centers,     q == nullptr ? nullptr : q + first_row * plan.stride};
      AVATAR_ISA_CALL(edge_conv_reverse, args, block.begin, block.end, grad_neighbor, deviations);
      combine(block, offsets, grad_neighbor, deviations, grad_own);

      const MatrixProduct<T> from_own{grad_own,
                                      plan.stride,
                                      1,
                                      plan.own.data(),
                                      plan.input_stride,
                                      grad_tile,
                                      plan.input_stride,
                                      block.rows(),
                                      plan.channels,
                                      plan.input_stride,
                                      false};
      const MatrixProduct<T> from_neighbor{grad_neighbor,
                                           plan.stride,
                                           1,
                                           plan.neighbor.data(),
                                           plan.input_stride,
                                           grad_tile,
                                           plan.input_stride,
                                           block.rows(),
                                           plan.channels,
                                           plan.input_stride,
                                           true};
      AVATAR_ISA_CALL(matrix_product, from_own);
      AVATAR_ISA_CALL(matrix_product, from_neighbor);
      copy_centered_rows(plan, block, centered);
      if (!center_own) copy_rows(plan, block, raw);
      for (int64_t row = block.begin; row < block.end; ++row) {
        const int64_t at = (row - block.begin) * plan.input_stride;
        std::copy_n(grad_tile + at, plan.inputs, grad_x + (first_row + row) * plan.inputs);
        // A point without edges adds nothing, be it NaN.
        if (offsets[row] == offsets[row + 1] && is_empty_row(plan, first_row + row)) {
          std::fill_n(centered + at, plan.inputs, T(0));
          std::fill_n(raw + at, plan.inputs, T(0));
        }
      }
      T* own_part = weight_parts.data() + part * 2 * part_size;
      const MatrixProduct<T> to_own{grad_own,
                                    1,
                                    plan.stride,
                                    center_own ? centered : raw,
                                    plan.input_stride,
                                    own_part,
                                    plan.input_stride,
                                    plan.channels,
                                    block.rows(),
                                    plan.input_stride,
                                    true};
      const MatrixProduct<T> to_neighbor{grad_neighbor,
                                         1,
                                         plan.stride,
                                         centered,
                                         plan.input_stride,
                                         own_part + part_size,
                                         plan.input_stride,
                                         plan.channels,
                                         block.rows(),
                                         plan.input_stride,
                                         true};
      AVATAR_ISA_CALL(matrix_product, to_own);
      AVATAR_ISA_CALL(matrix_product, to_neighbor);
    }
  });
  std::vector<double> weight_grads(plan.channels * 2 * plan.inputs, 0);
  for (int64_t part = 0; part < parts; ++part) {
    const T* own = weight_parts.data() + part * 2 * part_size;
    for (int64_t o = 0; o < plan.channels; ++o) {
      for (int64_t c = 0; c < plan.inputs; ++c) {
        weight_grads[o * 2 * plan.inputs + c] += own[o * plan.input_stride + c];
        weight_grads[o * 2 * plan.inputs + plan.inputs + c] += own[part_size + o * plan.input_stride + c];
      }
    }
  }
  return weight_grads;
}

// A tensor of the dtype of `like` from values in double.
template <typename T>
Tensor from_double(const std::vector<double>& values, const std::vector<int64_t>& shape, const Tensor& like,
                   ScalarType type) {
  Tensor result = torch::stable::new_empty(like, shape, compute_type(type));
  std::copy(values.begin(), values.end(), mutable_data<T>(result));
  return to_type(result, type);
}

}  // namespace avatar
