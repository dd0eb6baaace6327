// What edge_conv and edge_conv_norm share on the device: the split of the linear map, see edge_conv_plan.h,
//   A x_i + B (x_i - x_j) = u_i + q_i - q_j,   u = A (x - c) + constant,   q = B (x - c),
// the smallest q over a row's neighbours, and gradients from those of u and q. Rows of u, q and of every
// other array called padded hold `stride` elements, a multiple of kColumnPad. T is the type of x, A that of
// sums.
#pragma once

#include <algorithm>

#include "common/matrix_simd.h"
#include "common/reverse_adjacency.cuh"
#include "edge_conv/edge_conv_simd.h"

namespace avatar {
namespace {

constexpr int kRowThreads = 128;
// Rows whose sums one block leaves.
constexpr int kBlockRows = 64;
constexpr int kProductThreads = 256, kProductTile = 64, kProductDepth = 16, kProductShare = 4;
constexpr int kReferenceThreads = 256, kReferenceSamples = 9;
constexpr int kFinishThreads = 128;
// Shares of the rows whose gradients of the weight are summed apart.
constexpr int64_t kWeightParts = 64;
// Neighbours whose products are on their way at once.
constexpr int kAhead = 4;

template <typename A>
constexpr int kColumns = kPackBytes / sizeof(A);

struct EdgeSizes {
  int64_t batch, num_points, k, inputs, channels, stride;

  EdgeSizes(const Tensor& x, const Tensor& neighbors, const Tensor& weight)
      : batch(x.size(0)),
        num_points(x.size(1)),
        k(neighbors.size(2)),
        inputs(x.size(2)),
        channels(weight.size(0)),
        stride(pad_columns(channels)) {}

  __host__ __device__ int64_t rows() const { return batch * num_points; }
  int64_t row_blocks() const { return divide_up(rows(), kBlockRows); }
  // One block for each of `row_units`, times those that the columns take; at least one where there are none.
  template <typename A>
  dim3 grid(int64_t row_units) const {
    return dim3(row_units, std::max<int64_t>(1, divide_up(stride / kColumns<A>, block<A>().x)));
  }
  template <typename A>
  dim3 block() const {
    return block_for_columns(stride / kColumns<A>, kRowThreads);
  }
};

// The rows of weight (channels, 2 * inputs) follow the order [x_i ; x_i - x_j] and are multiplied by factor.
template <typename A>
struct EdgeWeight {
  const A* weight;
  const A* factor;
  int64_t inputs, channels;

  __device__ A at(int64_t o, int64_t half, int64_t c) const {
    return o < channels && c < inputs ? factor[o] * weight[(o * 2 + half) * inputs + c] : A(0);
  }
};

// c of each cloud (step = inputs) or of all (step = 0).
template <typename A>
struct EdgeReference {
  const A* values;
  int64_t step;
};

// The median, per coordinate, of a few points that are somebody's neighbour: padding and outliers do not
// reach it. One block for each `group_rows` rows.
template <typename T, typename A>
__global__ void __launch_bounds__(kReferenceThreads)
    edge_reference_kernel(const T* __restrict__ x, NeighborList list, int64_t group_rows, int64_t inputs,
                          A* __restrict__ reference) {
  AVATAR_SHARED(int, nearest, 1);
  AVATAR_SHARED(int64_t, points, kReferenceSamples);
  const int64_t begin = blockIdx.x * group_rows;
  for (int sample = 0; sample < kReferenceSamples; ++sample) {
    // The first neighbour in this share of the rows.
    const int64_t from = (begin + group_rows * sample / kReferenceSamples) * list.k;
    const int64_t to = (begin + group_rows * (sample + 1) / kReferenceSamples) * list.k;
    if (threadIdx.x == 0) points[sample] = -1;
    for (int64_t first = from; first < to; first += kReferenceThreads) {
      if (threadIdx.x == 0) nearest[0] = kReferenceThreads;
      __syncthreads();
      const int64_t mine = first + threadIdx.x;
      const int64_t point = mine < to ? list.neighbors[mine] : -1;
      if (point >= 0 && point < list.num_points) atomicMin(&nearest[0], static_cast<int>(threadIdx.x));
      __syncthreads();
      const int found = nearest[0];
      __syncthreads();
      if (found == kReferenceThreads) continue;
      if (threadIdx.x == found) points[sample] = mine / list.k / list.num_points * list.num_points + point;
      break;
    }
  }
  __syncthreads();
  for (int64_t c = threadIdx.x; c < inputs; c += kReferenceThreads) {
    // Ascending, what is not finite last.
    A sorted[kReferenceSamples];
#pragma unroll
    for (int i = 0; i < kReferenceSamples; ++i) sorted[i] = std::numeric_limits<A>::infinity();
    int finite = 0;
    for (int sample = 0; sample < kReferenceSamples; ++sample) {
      if (points[sample] < 0) continue;
      A value = static_cast<A>(x[points[sample] * inputs + c]);
      if (!(value - value == 0)) continue;
      ++finite;
#pragma unroll
      for (int i = 0; i < kReferenceSamples; ++i) {
        const A lower = value < sorted[i] ? value : sorted[i];
        value = value < sorted[i] ? sorted[i] : value;
        sorted[i] = lower;
      }
    }
    A median = 0;
#pragma unroll
    for (int i = 0; i < kReferenceSamples; ++i) {
      if (finite > 0 && i <= finite / 2) median = sorted[i];
    }
    reference[blockIdx.x * inputs + c] = median;
  }
}

// (A c)_o, summed by a warp; every lane gets it.
template <typename A>
__device__ double own_product(const EdgeWeight<A>& weight, const A* reference, int64_t o) {
  double sum = 0;
  for (int64_t c = threadIdx.x % kWarpSize; c < weight.inputs; c += kWarpSize) {
    sum += static_cast<double>(weight.at(o, 0, c)) * static_cast<double>(reference[c]);
  }
  for (int step = kWarpSize / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  return sum;
}

// sum[i][j] += sum over k in [begin, end) of left(row + i, k) right(column + j, k), where row and column are
// the thread's own kProductShare within the block's tile. Loads run along k, or across it where the flag is
// set; what lies outside the operands has to load as 0.
template <bool kLeftAcross, bool kRightAcross, typename A, typename Left, typename Right>
__device__ void tile_product(int64_t begin, int64_t end, const Left& left, const Right& right,
                             A (&sum)[kProductShare][kProductShare]) {
  constexpr int kRow = kProductTile + kColumns<A>;
  using Quad = Pack<A, kColumns<A>>;
  AVATAR_SHARED(Quad, left_quads, kProductDepth * kRow / kColumns<A>);
  AVATAR_SHARED(Quad, right_quads, kProductDepth * kRow / kColumns<A>);
  A* left_tile = left_quads[0].values;
  A* right_tile = right_quads[0].values;
  const int thread = threadIdx.x;
  const int row = thread / (kProductTile / kProductShare) * kProductShare;
  const int column = thread % (kProductTile / kProductShare) * kProductShare;
  for (int64_t first = begin; first < end; first += kProductDepth) {
#pragma unroll
    for (int part = 0; part < kProductTile * kProductDepth / kProductThreads; ++part) {
      const int n = part * kProductThreads + thread;
      const int along_k = n % kProductDepth, along = n / kProductDepth;
      const int across_k = n / kProductTile, across = n % kProductTile;
      const int left_k = kLeftAcross ? across_k : along_k, left_n = kLeftAcross ? across : along;
      const int right_k = kRightAcross ? across_k : along_k, right_n = kRightAcross ? across : along;
      left_tile[left_k * kRow + left_n] = first + left_k < end ? left(left_n, first + left_k) : A(0);
      right_tile[right_k * kRow + right_n] = first + right_k < end ? right(right_n, first + right_k) : A(0);
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kProductDepth; ++k) {
      A a[kProductShare], b[kProductShare];
#pragma unroll
      for (int i = 0; i < kProductShare; i += kColumns<A>) {
        const Quad left_quad = left_quads[(k * kRow + row + i) / kColumns<A>];
        const Quad right_quad = right_quads[(k * kRow + column + i) / kColumns<A>];
#pragma unroll
        for (int j = 0; j < kColumns<A>; ++j) {
          a[i + j] = left_quad[j];
          b[i + j] = right_quad[j];
        }
      }
#pragma unroll
      for (int i = 0; i < kProductShare; ++i) {
#pragma unroll
        for (int j = 0; j < kProductShare; ++j) sum[i][j] += a[i] * b[j];
      }
    }
    __syncthreads();
  }
}

// u and q, padded. Blocks along x are tiles of rows of a cloud, along y tiles of the columns of [u q].
template <typename T, typename A>
__global__ void __launch_bounds__(kProductThreads)
    edge_products_kernel(const T* __restrict__ x, EdgeSizes sizes, EdgeWeight<A> weight,
                         EdgeReference<A> reference, const A* __restrict__ constant, A* __restrict__ u,
                         A* __restrict__ q) {
  const int64_t tiles = (sizes.num_points + kProductTile - 1) / kProductTile;
  const int64_t cloud = blockIdx.x / tiles, first_row = (blockIdx.x - cloud * tiles) * kProductTile;
  const int64_t first_column = static_cast<int64_t>(blockIdx.y) * kProductTile;
  const T* rows = x + (cloud * sizes.num_points + first_row) * sizes.inputs;
  const A* center = reference.values + cloud * reference.step;
  A sum[kProductShare][kProductShare] = {};
  tile_product<false, false>(
      0, sizes.inputs,
      [&](int row, int64_t c) {
        return first_row + row < sizes.num_points ? static_cast<A>(rows[row * sizes.inputs + c]) - center[c]
                                                  : A(0);
      },
      [&](int column, int64_t c) {
        const int64_t n = first_column + column;
        return n < sizes.stride ? weight.at(n, 0, c) : weight.at(n - sizes.stride, 1, c);
      },
      sum);
  const int row = threadIdx.x / (kProductTile / kProductShare) * kProductShare;
  const int64_t n = first_column + threadIdx.x % (kProductTile / kProductShare) * kProductShare;
  if (n >= 2 * sizes.stride) return;
  const bool own = n < sizes.stride;
  A* target = own ? u + n : q + (n - sizes.stride);
#pragma unroll
  for (int i = 0; i < kProductShare; ++i) {
    if (first_row + row + i >= sizes.num_points) return;
    A* to = target + (cloud * sizes.num_points + first_row + row + i) * sizes.stride;
#pragma unroll
    for (int j = 0; j < kProductShare; j += kColumns<A>) {
      Pack<A, kColumns<A>> pack;
#pragma unroll
      for (int l = 0; l < kColumns<A>; ++l) {
        pack[l] = sum[i][j + l];
        if (own && constant && n + j + l < sizes.channels) {
          pack[l] += constant[cloud * sizes.channels + n + j + l];
        }
      }
      store_pack(to + j, pack);
    }
  }
}

// Of one row and pack of columns: the smallest q over its neighbours, the first on ties; NaN is smaller than
// all.
template <typename A>
struct SmallestNeighbor {
  Pack<A, kColumns<A>> q;
  int slot[kColumns<A>];
  int count = 0;  // neighbours of the row

  // q of the cloud at the first of the columns; where first_only is set the first neighbour is taken.
  __device__ SmallestNeighbor(const A* cloud, int64_t stride, const NeighborList& list, int64_t row,
                              const bool (&first_only)[kColumns<A>]) {
#pragma unroll
    for (int i = 0; i < kColumns<A>; ++i) {
      q[i] = 0;
      slot[i] = -1;
    }
    const int k = static_cast<int>(list.k);
    for (int first = 0; first < k; first += kAhead) {
      Pack<A, kColumns<A>> seen[kAhead];
      bool exists[kAhead];
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ++ahead) {
        const int64_t point = first + ahead < k ? checked_neighbor(list, row * k + first + ahead) : -1;
        exists[ahead] = point >= 0;
        if (exists[ahead]) seen[ahead] = load_pack<A, kColumns<A>>(cloud + point * stride);
      }
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ++ahead) {
        if (!exists[ahead]) continue;
        ++count;
#pragma unroll
        for (int i = 0; i < kColumns<A>; ++i) {
          const bool lower = !(seen[ahead][i] >= q[i]) && q[i] == q[i] && !first_only[i];
          if (slot[i] < 0 || lower) {
            q[i] = seen[ahead][i];
            slot[i] = first + ahead;
          }
        }
      }
    }
  }
};

// Columns [column, column + kColumns) of a row that is not padded.
template <typename T, typename A>
__device__ void store_columns(T* row, int64_t column, int64_t channels, const Pack<A, kColumns<A>>& pack) {
#pragma unroll
  for (int i = 0; i < kColumns<A>; ++i) {
    if (column + i < channels) row[column + i] = static_cast<T>(pack[i]);
  }
}

template <typename Slot, int kCount>
__device__ void store_slots(Slot* target, const int (&slots)[kCount]) {
  Pack<Slot, kCount> pack;
#pragma unroll
  for (int i = 0; i < kCount; ++i) pack[i] = static_cast<Slot>(slots[i]);
  store_pack(target, pack);
}

template <typename Slot>
constexpr Slot kNone = static_cast<Slot>(-1);

// Sum over the block's y of a value for each x; row 0 of the block gets it. partial: kRowThreads elements.
template <typename A>
__device__ A column_sum(A value, A* partial) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  partial[thread] = value;
  for (int half = blockDim.y / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.y < half) partial[thread] += partial[thread + half * blockDim.x];
  }
  const A sum = partial[thread];
  __syncthreads();
  return sum;
}

// What the gradient of the normalised form has besides, each padded or by channel.
template <typename A>
struct EdgeNormTerms {
  const A* factor;      // |gamma| / deviation
  const A* mean_grad;   // share of an edge in the gradient of the mean
  const A* slope_grad;  // and in that of the variance, by its deviation
  const A* centers;     // (rows, stride) u_i + q_i - mean
  const A* q;           // (rows, stride)
  A* own;               // (rows, stride) sum of deviations over the row's edges; then the gradient of u
  const int32_t* degrees;
};

// The gradient of q, padded, one block a point: x covers packs of columns, y takes the edges that lead to the
// point in turn. Also the cloud of each row, -1 where no edge starts or ends. For the normalised form see
// edge_conv_norm_cpu.cpp.
template <bool kNorm, typename A, typename Slot>
__global__ void __launch_bounds__(kRowThreads, 4)
    edge_reverse_kernel(IncomingEdgesOf incoming, EdgeSizes sizes, const A* __restrict__ linear,
                        const Slot* __restrict__ slots, EdgeNormTerms<A> norm, A* __restrict__ grad_q,
                        int32_t* __restrict__ cloud_of_row) {
  AVATAR_SHARED(A, partial, kRowThreads);
  const int64_t row = blockIdx.x, cloud = row / sizes.num_points, point = row - cloud * sizes.num_points;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * kColumns<A>;
  const int64_t first_row = cloud * sizes.num_points;
  const IncomingEdges edges = incoming.point(cloud, point);
  const bool inside = column < sizes.stride;
  Pack<A, kColumns<A>> own = {}, grad = {}, deviation = {};
  if (kNorm && inside) own = load_pack<A, kColumns<A>>(norm.q + row * sizes.stride + column);
  if (inside) {
    for (int64_t i = threadIdx.y; i < edges.count; i += blockDim.y) {
      const int64_t at = (first_row + edges.row(i)) * sizes.stride + column;
      const int slot = static_cast<int>(edges.slot(i));
      const Pack<Slot, kColumns<A>> chosen = load_pack<Slot, kColumns<A>>(slots + at);
      const Pack<A, kColumns<A>> flow = load_pack<A, kColumns<A>>(linear + at);
      Pack<A, kColumns<A>> center = {};
      if (kNorm) center = load_pack<A, kColumns<A>>(norm.centers + at);
#pragma unroll
      for (int c = 0; c < kColumns<A>; ++c) {
        if (chosen[c] == static_cast<Slot>(slot)) grad[c] += flow[c];
        if (kNorm) deviation[c] += center[c] - own[c];
      }
    }
  }
#pragma unroll
  for (int c = 0; c < kColumns<A>; ++c) {
    grad[c] = column_sum(grad[c], partial);
    if (kNorm) deviation[c] = column_sum(deviation[c], partial);
  }
  if (threadIdx.y > 0 || !inside) return;
  const int64_t at = row * sizes.stride + column;
  if (column == 0) {
    cloud_of_row[row] = edges.count > 0 || slots[at] != kNone<Slot> ? static_cast<int32_t>(cloud) : -1;
  }
  const Pack<A, kColumns<A>> flow = load_pack<A, kColumns<A>>(linear + at);
  if (!kNorm) {
#pragma unroll
    for (int c = 0; c < kColumns<A>; ++c) grad[c] = flow[c] - grad[c];
  } else {
    Pack<A, kColumns<A>> from = load_pack<A, kColumns<A>>(norm.own + at);
    const A in = static_cast<A>(edges.count), out = static_cast<A>(norm.degrees[row]);
#pragma unroll
    for (int c = 0; c < kColumns<A>; ++c) {
      const A mean = norm.mean_grad[column + c], slope = norm.slope_grad[column + c];
      from[c] = norm.factor[column + c] * (flow[c] - out * mean - slope * from[c]);
      grad[c] = from[c] - norm.factor[column + c] * (grad[c] - in * mean - slope * deviation[c]);
    }
    store_pack(norm.own + at, from);
  }
  store_pack(grad_q + at, grad);
}

// The gradient of x from those of u and q.
template <typename T, typename A>
__global__ void __launch_bounds__(kProductThreads)
    edge_input_gradient_kernel(const A* __restrict__ grad_u, const A* __restrict__ grad_q, EdgeSizes sizes,
                               EdgeWeight<A> weight, T* __restrict__ grad_x) {
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kProductTile;
  const int64_t first_column = static_cast<int64_t>(blockIdx.y) * kProductTile;
  A sum[kProductShare][kProductShare] = {};
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    const A* rows = (half ? grad_q : grad_u) + first_row * sizes.stride;
    tile_product<false, true>(
        0, sizes.channels,
        [&](int row, int64_t o) {
          return first_row + row < sizes.rows() ? rows[row * sizes.stride + o] : A(0);
        },
        [&](int column, int64_t o) { return weight.at(o, half, first_column + column); }, sum);
  }
  const int64_t row = first_row + threadIdx.x / (kProductTile / kProductShare) * kProductShare;
  const int64_t column = first_column + threadIdx.x % (kProductTile / kProductShare) * kProductShare;
#pragma unroll
  for (int i = 0; i < kProductShare; ++i) {
#pragma unroll
    for (int j = 0; j < kProductShare; ++j) {
      if (row + i < sizes.rows() && column + j < sizes.inputs) {
        grad_x[(row + i) * sizes.inputs + column + j] = static_cast<T>(sum[i][j]);
      }
    }
  }
}

// The gradient of the folded weight over shares of the rows: partial (parts, 2, channels, inputs); blocks
// along z are parts and halves. center_own: whether x may be centred for A's gradient too, as where the
// gradients of u sum to zero.
template <typename T, typename A>
__global__ void __launch_bounds__(kProductThreads)
    edge_weight_gradient_kernel(const T* __restrict__ x, const A* __restrict__ grad_u,
                                const A* __restrict__ grad_q, const int32_t* __restrict__ cloud_of_row,
                                EdgeSizes sizes, EdgeReference<A> reference, bool center_own,
                                A* __restrict__ partial) {
  const int64_t first_output = static_cast<int64_t>(blockIdx.x) * kProductTile;
  const int64_t first_input = static_cast<int64_t>(blockIdx.y) * kProductTile;
  const int64_t part = blockIdx.z / 2, parts = gridDim.z / 2;
  const bool own = blockIdx.z % 2 == 0;
  const A* grad = own ? grad_u : grad_q;
  A sum[kProductShare][kProductShare] = {};
  tile_product<true, true>(
      sizes.rows() * part / parts, sizes.rows() * (part + 1) / parts,
      [&](int output, int64_t row) {
        const int64_t o = first_output + output;
        return o < sizes.channels ? grad[row * sizes.stride + o] : A(0);
      },
      [&](int input, int64_t row) {
        const int64_t c = first_input + input;
        const int32_t cloud = cloud_of_row[row];
        // A point without edges adds nothing, be it NaN.
        if (c >= sizes.inputs || cloud < 0) return A(0);
        const A value = static_cast<A>(x[row * sizes.inputs + c]);
        return own && !center_own ? value : value - reference.values[cloud * reference.step + c];
      },
      sum);
  const int64_t output = first_output + threadIdx.x / (kProductTile / kProductShare) * kProductShare;
  const int64_t input = first_input + threadIdx.x % (kProductTile / kProductShare) * kProductShare;
#pragma unroll
  for (int i = 0; i < kProductShare; ++i) {
#pragma unroll
    for (int j = 0; j < kProductShare; ++j) {
      if (output + i < sizes.channels && input + j < sizes.inputs) {
        partial[(blockIdx.z * sizes.channels + output + i) * sizes.inputs + input + j] = sum[i][j];
      }
    }
  }
}

// Sum over the blocks of rows of a column of their padded sums; every thread gets it.
template <typename A>
__device__ double sum_of_blocks(const A* sums, int64_t blocks, int64_t stride, int64_t column) {
  double sum = 0;
  for (int64_t n = threadIdx.x; n < blocks; n += kFinishThreads) sum += sums[n * stride + column];
  return block_sum(sum);
}

// One block a channel: the gradient of the weight itself; returns the sum of folded gradients times weights.
template <typename A>
__device__ double finish_weight(const A* partial, int64_t parts, const EdgeWeight<A>& weight,
                                A* grad_weight) {
  const int64_t o = blockIdx.x, size = weight.channels * weight.inputs;
  double product = 0;
  for (int64_t n = threadIdx.x; n < 2 * weight.inputs; n += kFinishThreads) {
    const int64_t half = n / weight.inputs, c = n - half * weight.inputs;
    double folded = 0;
    for (int64_t part = 0; part < parts; ++part) {
      folded += partial[(part * 2 + half) * size + o * weight.inputs + c];
    }
    grad_weight[o * 2 * weight.inputs + n] = static_cast<A>(folded * static_cast<double>(weight.factor[o]));
    product += folded * static_cast<double>(weight.weight[o * 2 * weight.inputs + n]);
  }
  return product;
}

// A row of neighbours for each point.
inline NeighborList point_neighbors(const char* op, const Tensor& neighbors, const EdgeSizes& sizes) {
  return {op, const_data<int64_t>(neighbors), sizes.num_points, sizes.k, sizes.num_points};
}

inline ScalarType slot_type(int64_t k) {
  return k <= kByteSlots ? ScalarType::Byte : ScalarType::Int;
}

// Calls body with a slot of the type that rows of k neighbours have.
template <typename Body>
void dispatch_slot(int64_t k, const Body& body) {
  if (k <= kByteSlots) return body(uint8_t{});
  body(int32_t{});
}

// (0,) where slots are not kept.
inline Tensor empty_slots(const Tensor& like, const EdgeSizes& sizes, bool keep) {
  if (!keep) return torch::stable::new_empty(like, {0}, slot_type(sizes.k));
  return torch::stable::new_empty(like, {sizes.batch, sizes.num_points, sizes.stride}, slot_type(sizes.k));
}

template <typename T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// c of each cloud, or of the whole batch.
template <typename T>
Tensor find_reference(const char* op, const Tensor& x, const NeighborList& list, const EdgeSizes& sizes,
                      bool of_batch) {
  using A = typename Accumulate<T>::type;
  const int64_t groups = of_batch ? 1 : sizes.batch;
  Tensor reference = torch::stable::new_empty(x, {groups, sizes.inputs}, compute_type(x.scalar_type()));
  launch(op, edge_reference_kernel<T, A>, dim3(groups), dim3(kReferenceThreads), 0, current_stream(x),
         data_of<T>(x), list, of_batch ? sizes.rows() : sizes.num_points, sizes.inputs,
         data_of<A>(reference));
  return reference;
}

template <typename T, typename A>
void edge_products(const char* op, const Tensor& x, const EdgeSizes& sizes, const EdgeWeight<A>& weight,
                   const EdgeReference<A>& reference, const A* constant, const Tensor& u, const Tensor& q) {
  launch(op, edge_products_kernel<T, A>,
         grid_of(sizes.batch * divide_up(sizes.num_points, kProductTile),
                 divide_up(2 * sizes.stride, kProductTile)),
         dim3(kProductThreads), 0, current_stream(x), data_of<T>(x), sizes, weight, reference, constant,
         data_of<A>(u), data_of<A>(q));
}

// Gradients of x and, in shares, of the folded weight: partial (parts, 2, channels, inputs).
template <typename T, typename A>
Tensor edge_gradients(const char* op, const Tensor& x, const EdgeSizes& sizes, const EdgeWeight<A>& weight,
                      const EdgeReference<A>& reference, const Tensor& grad_u, const Tensor& grad_q,
                      const Tensor& cloud_of_row, bool center_own, const Tensor& grad_x) {
  launch(op, edge_input_gradient_kernel<T, A>,
         grid_of(divide_up(sizes.rows(), kProductTile), divide_up(sizes.inputs, kProductTile)),
         dim3(kProductThreads), 0, current_stream(x), data_of<A>(grad_u), data_of<A>(grad_q), sizes, weight,
         data_of<T>(grad_x));
  // Together the parts take no more memory than x and u.
  const int64_t part_size = std::max<int64_t>(1, 2 * sizes.channels * sizes.inputs);
  const int64_t fitting = sizes.rows() * (sizes.inputs + sizes.channels) / part_size;
  const int64_t parts = std::clamp<int64_t>(std::min(fitting, sizes.row_blocks()), 1, kWeightParts);
  Tensor partial = torch::stable::new_empty(grad_u, {parts, 2, sizes.channels, sizes.inputs});
  launch(op, edge_weight_gradient_kernel<T, A>,
         grid_of(divide_up(sizes.channels, kProductTile), divide_up(sizes.inputs, kProductTile), 2 * parts),
         dim3(kProductThreads), 0, current_stream(x), data_of<T>(x), data_of<A>(grad_u), data_of<A>(grad_q),
         data_of<int32_t>(cloud_of_row), sizes, reference, center_own, data_of<A>(partial));
  return partial;
}

}  // namespace
}  // namespace avatar
