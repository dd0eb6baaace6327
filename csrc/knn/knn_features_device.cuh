// Search in feature space. Float32 goes through products on matrix units: |p|^2 - 2 q.p of centred points,
// with a bound of its rounding, is a lower bound of the distance up to a constant of the query. Each query
// keeps the least bounds of more points than it looks for, measures those by direct differences, and is done
// if the largest bound that it kept is farther than its last neighbour: then nothing that it dropped is
// nearer. The others, where ties or clusters are finer than the rounding, are left open for direct
// differences with all points, which are also the way of float64 and of small clouds. So distances are always
// those of direct differences.
#pragma once

#include <mma.h>

#include <cfloat>
#include <type_traits>

#include "common/pack.cuh"
#include "knn/knn_search_device.cuh"

namespace avatar {
namespace {

namespace wmma = nvcuda::wmma;

constexpr int kFeatureWarps = 8, kFeatureThreads = kFeatureWarps * kWarpSize;
// Queries whose neighbours a warp looks for at once; a block's queries are as many as a leaf has points.
constexpr int kFeatureQueries = kLeaf / kFeatureWarps;
// Coordinates in shared memory at once.
constexpr int kFeatureDepth = 32;

// One in so many queries of a cloud is few.
constexpr int64_t kFewShare = 64;

// Queries that are left for direct differences, in no order: for each cloud their number and rows.
struct OpenQueries {
  unsigned long long* counts = nullptr;  // (batch)
  int64_t* rows = nullptr;               // (batch, num_queries); null for all queries
  // Up to so many of a cloud are few.
  unsigned few = 0;
};

// Leaves of a cloud with points in them.
template <typename A>
__device__ int64_t filled_leaves(const KnnArgs<A>& args, int64_t cloud) {
  const int64_t filled = (args.counts[cloud] + kLeaf - 1) / kLeaf;
  return filled < args.leaves ? filled : args.leaves;
}

// By direct differences: a block takes as many queries as a leaf has points and goes through all leaves, in
// pieces of kFeatureDepth coordinates; a lane each point of the leaf, a warp kFeatureQueries queries. All
// queries, or those that are open and not few.
template <typename A, typename List>
__global__ void __launch_bounds__(kFeatureWarps* kWarpSize, 2)
    knn_feature_kernel(KnnArgs<A> args, OpenQueries open) {
  using Queries = Pack<A, kPackBytes / sizeof(A)>;
  constexpr int kPack = kPackBytes / sizeof(A), kPitch = kLeaf + kPack;
  AVATAR_SHARED(A, points, kFeatureDepth * kLeaf);
  AVATAR_SHARED(Queries, query_packs, kFeatureDepth * kPitch / kPack);
  AVATAR_SHARED(int64_t, rows, kLeaf);
  A* queries = query_packs[0].values;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t blocks = (args.places() + kLeaf - 1) / kLeaf;
  const int64_t cloud = blockIdx.x / blocks, first = (blockIdx.x - cloud * blocks) * kLeaf;
  const int64_t count = open.rows ? static_cast<int64_t>(open.counts[cloud]) : args.places();
  if (first >= count || count <= open.few) return;
  for (int i = 0; i < kFeatureQueries; ++i) {
    const int64_t place = first + warp * kFeatureQueries + i;
    int64_t row = -1;
    if (!open.rows) {
      row = query_row(args, cloud, place);
    } else if (place < count) {
      row = open.rows[cloud * args.num_queries + place];
    }
    if (lane == 0) rows[warp * kFeatureQueries + i] = row;
  }
  __syncthreads();
  const auto output = [&](int i) {
    const int64_t row = rows[warp * kFeatureQueries + i];
    return (cloud * args.num_queries + (row < 0 ? 0 : row)) * args.k;
  };
  // Without a query there is no memory of its own to look at.
  const auto list_of = [&](int i) {
    const bool exists = rows[warp * kFeatureQueries + i] >= 0;
    return List(args.distances + output(i), args.indices + output(i), exists ? args.k : 0);
  };
  List lists[kFeatureQueries] = {list_of(0), list_of(1), list_of(2), list_of(3)};
  static_assert(kFeatureQueries == 4, "one list each");

  const int64_t leaves = filled_leaves(args, cloud);
  for (int64_t leaf = cloud * args.leaves; leaf < cloud * args.leaves + leaves; ++leaf) {
    A distances[kFeatureQueries] = {};
    for (int64_t begin = 0; begin < args.dims; begin += kFeatureDepth) {
      const int64_t rest = args.dims - begin;
      const int depth = static_cast<int>(rest < kFeatureDepth ? rest : kFeatureDepth);
      __syncthreads();
      for (int i = threadIdx.x; i < depth * kLeaf; i += kFeatureWarps * kWarpSize) {
        points[i] = args.coordinates[(leaf * args.dims + begin) * kLeaf + i];
      }
      for (int i = threadIdx.x; i < kFeatureDepth * kLeaf; i += kFeatureWarps * kWarpSize) {
        const int d = i % kFeatureDepth, n = i / kFeatureDepth;
        if (d < depth && rows[n] >= 0) queries[d * kPitch + n] = query_at(args, cloud, rows[n])[begin + d];
      }
      __syncthreads();
      for (int d = 0; d < depth; ++d) {
        const A point = points[d * kLeaf + lane];
#pragma unroll
        for (int i = 0; i < kFeatureQueries; i += kPack) {
          const Queries pack = query_packs[(d * kPitch + warp * kFeatureQueries + i) / kPack];
#pragma unroll
          for (int j = 0; j < kPack; ++j) distances[i + j] = add_square(distances[i + j], pack[j] - point);
        }
      }
    }
    const int32_t point = indexed_row(args, leaf * kLeaf + lane);
#pragma unroll
    for (int i = 0; i < kFeatureQueries; ++i) {
      const int64_t row = rows[warp * kFeatureQueries + i];
      consider(lists[i], distances[i], point, point >= 0 && row >= 0 && !(args.exclude_self && point == row));
    }
  }
#pragma unroll
  for (int i = 0; i < kFeatureQueries; ++i) {
    if (rows[warp * kFeatureQueries + i] < 0) continue;
    lists[i].store(args.distances + output(i), args.indices + output(i));
  }
}

// A few open queries, which would keep one block busy: a block each, whose warps share the leaves.
__global__ void __launch_bounds__(kFeatureThreads) knn_open_kernel(KnnArgs<float> args, OpenQueries open) {
  AVATAR_SHARED(float, distances, kFeatureThreads);
  AVATAR_SHARED(int32_t, rows, kFeatureThreads);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t cloud = blockIdx.x / open.few, place = blockIdx.x % open.few;
  const int64_t count = static_cast<int64_t>(open.counts[cloud]);
  if (count > open.few || place >= count) return;
  const int64_t row = open.rows[cloud * args.num_queries + place];
  const int64_t output = (cloud * args.num_queries + row) * args.k;
  const float* query = query_at(args, cloud, row);
  RegisterList<float> list(distances, rows, args.k);
  const int64_t end = cloud * args.leaves + filled_leaves(args, cloud);
  for (int64_t leaf = cloud * args.leaves + warp; leaf < end; leaf += kFeatureWarps) {
    const float* coordinates = args.coordinates + leaf * args.dims * kLeaf + lane;
    float distance = 0;
#pragma unroll 8
    for (int64_t d = 0; d < args.dims; ++d) {
      distance = add_square(distance, query[d] - coordinates[d * kLeaf]);
    }
    const int32_t point = indexed_row(args, leaf * kLeaf + lane);
    consider(list, distance, point, point >= 0 && !(args.exclude_self && point == row));
  }
  list.store(distances + warp * kWarpSize, rows + warp * kWarpSize);
  __syncthreads();
  if (warp > 0) return;
  for (int other = kWarpSize; other < kFeatureThreads; other += kWarpSize) {
    const bool exists = lane < args.k && rows[other + lane] >= 0;
    consider(list, distances[other + lane], rows[other + lane], exists);
  }
  list.store(args.distances + output, args.indices + output);
}

// A block multiplies tiles of queries and points; each warp 32 x 32 of them, and then looks through the rows
// of as many queries.
constexpr int kTileQueries = 64, kTilePoints = 128, kTileLeaves = kTilePoints / kLeaf;
constexpr int kWarpColumns = kTilePoints / 32, kWarpQueries = kTileQueries / kFeatureWarps;
static_assert(kTileQueries / 32 * kWarpColumns == kFeatureWarps, "one part each");
// Pitches for which no two lanes load from the same bank.
constexpr int kQueryPitch = kFeatureDepth + 4, kPointPitch = kTilePoints + 8, kStagePitch = kWarpSize + 1;
static_assert(kWarpQueries * kPointPitch >= kWarpSize * kStagePitch, "a warp's products hold its stage");

// Points that a query keeps, to find k: whole warps, and some to spare.
constexpr int64_t kSpare = 8;
inline int64_t candidates_of(int64_t k) {
  return divide_up(k + kSpare, kWarpSize) * kWarpSize;
}

template <bool kOnChip>
struct alignas(32) ProductMemory {
  float queries[kTileQueries * kQueryPitch];
  float points[kFeatureDepth * kPointPitch];
  float products[kTileQueries * kPointPitch];
  float terms[kTilePoints];
  int32_t order[kTilePoints];
  int64_t rows[kTileQueries];
  float norms[kTileQueries];   // +inf where there is no query
  float limits[kTileQueries];  // the largest bound kept
  // The candidates, where they are few.
  float bounds[kOnChip ? kTileQueries * kWarpSize : 1];
  int32_t candidates[kOnChip ? kTileQueries * kWarpSize : 1];
};

// Rounding of the product form. With u = 2^-24, norms |q|, |p| after centring, n = |q|^2 + |p|^2, which is at
// least 2 |q| |p|, and the distance t measured directly, n - 2 q.p as computed differs from t by at most
// (dims + 2) u t, and u n times
//   2 dims + 6 for the norms and the last sums;
//   48 for splitting: a number is two of TensorFloat-32 and a rest of less than 2^-20 of it, and rests and
//      products of two low parts are left out;
//   12 dims for adding up: each of 3 dims products is cut at 2u of the sum, and the sum itself at most three
//      times every four products (Fasi, Higham, Mikaitis and Pranesh, Numerical behavior of NVIDIA tensor
//      cores, PeerJ Computer Science 2021);
//   8 for centring
// (Higham, Accuracy and Stability of Numerical Algorithms, 3.1). `relative` covers that with room to spare
// for the arithmetic of the bound itself, `absolute` what underflow loses.
struct ProductBound {
  explicit ProductBound(int64_t dims)
      : relative(static_cast<float>(8 * dims + 64) * FLT_EPSILON),
        absolute(static_cast<float>(16 * dims + 64) * FLT_MIN) {}

  // Below it, no product overflows.
  static constexpr float kLimit = FLT_MAX / 64;
  bool is_useful() const { return relative < 0.25f; }

  // p is a neighbour of q only if point_term(|p|^2) - 2 q.p <= query_term(|q|^2, worst distance).
  __device__ float point_term(float norm) const {
    if (!(norm < kLimit)) return -std::numeric_limits<float>::infinity();
    return norm - relative * norm - absolute;
  }
  __device__ float query_term(float norm, float worst) const {
    if (!(norm < kLimit && worst < kLimit)) return std::numeric_limits<float>::infinity();
    return worst + relative * worst - norm + relative * norm + absolute;
  }

  float relative, absolute;
};

// The leading 11 bits: a number of TensorFloat-32.
__device__ inline float leading_bits(float value) {
  return __uint_as_float(__float_as_uint(value) & 0xffffe000u);
}

// A part of a matrix as the sum of two.
template <typename Use>
struct SplitFragment {
  using Fragment = wmma::fragment<Use, 16, 16, 8, wmma::precision::tf32, wmma::row_major>;
  Fragment high, low;

  __device__ void load(const float* memory, int pitch) {
    wmma::load_matrix_sync(high, memory, pitch);
#pragma unroll
    for (int i = 0; i < static_cast<int>(Fragment::num_elements); ++i) {
      const float value = high.x[i];
      high.x[i] = leading_bits(value);
      low.x[i] = leading_bits(value - high.x[i]);
    }
  }
};

// The warp's part of the products of what is in shared memory, from its queries and points on.
class WarpProduct {
 public:
  __device__ WarpProduct() {
#pragma unroll
    for (int i = 0; i < 4; ++i) wmma::fill_fragment(sums_[i / 2][i % 2], 0.f);
  }
  __device__ void add(const float* queries, const float* points, int depth) {
#pragma unroll 1
    for (int d = 0; d < depth; d += 8) {
      SplitFragment<wmma::matrix_a> rows[2];
      SplitFragment<wmma::matrix_b> columns[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        rows[i].load(queries + i * 16 * kQueryPitch + d, kQueryPitch);
        columns[i].load(points + d * kPointPitch + i * 16, kPointPitch);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          wmma::mma_sync(sums_[i][j], rows[i].low, columns[j].high, sums_[i][j]);
          wmma::mma_sync(sums_[i][j], rows[i].high, columns[j].low, sums_[i][j]);
          wmma::mma_sync(sums_[i][j], rows[i].high, columns[j].high, sums_[i][j]);
        }
      }
    }
  }
  __device__ void store(float* products) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      wmma::store_matrix_sync(products + i / 2 * 16 * kPointPitch + i % 2 * 16, sums_[i / 2][i % 2],
                              kPointPitch, wmma::mem_row_major);
    }
  }

 private:
  wmma::fragment<wmma::accumulator, 16, 16, 8, float> sums_[2][2];
};

// The lanes' distances to a query as the direct form measures them, of points given by row or -1; their
// coordinates pass through `stage`, memory of the warp.
__device__ inline float measure(const float* query, const float* points, int32_t row, int64_t dims,
                                float* stage) {
  const int lane = threadIdx.x % kWarpSize;
  float distance = 0;
  for (int64_t begin = 0; begin < dims; begin += kWarpSize) {
    const int depth = static_cast<int>(dims - begin < kWarpSize ? dims - begin : kWarpSize);
    __syncwarp();
    for (int other = 0; other < kWarpSize; ++other) {
      const int32_t point = __shfl_sync(kAllLanes, row, other);
      if (point >= 0 && lane < depth) {
        stage[other * kStagePitch + lane] = points[point * dims + begin + lane];
      }
    }
    const float own = lane < depth ? query[begin + lane] : 0.f;
    __syncwarp();
    for (int d = 0; d < depth; ++d) {
      distance = add_square(distance, __shfl_sync(kAllLanes, own, d) - stage[lane * kStagePitch + d]);
    }
  }
  return distance;
}

// What the candidates of all queries take where they are too many for the chip: (batch, num_queries, count).
struct CandidateMemory {
  float* bounds = nullptr;
  int32_t* rows = nullptr;
  int64_t count = kWarpSize;
};

// kOnChip: the candidates of a query are a warp's width.
template <bool kOnChip>
__global__ void __launch_bounds__(kFeatureThreads, 2)
    knn_product_kernel(KnnArgs<float> args, ProductBound bound, CandidateMemory memory, OpenQueries open) {
  using Candidates = std::conditional_t<kOnChip, RegisterList<float>, MemoryList<float, int32_t>>;
  using Nearest = std::conditional_t<kOnChip, RegisterList<float>, MemoryList<float>>;
  AVATAR_DYNAMIC_SHARED(ProductMemory<kOnChip>, shared);
  const float infinity = std::numeric_limits<float>::infinity();
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t blocks = (args.places() + kTileQueries - 1) / kTileQueries;
  const int64_t cloud = blockIdx.x / blocks, first = (blockIdx.x - cloud * blocks) * kTileQueries;
  const float* center = args.centers + cloud * args.dims;
  const auto bounds_at = [&](int n) {
    return kOnChip ? shared->bounds + n * kWarpSize
                   : memory.bounds + (cloud * args.num_queries + shared->rows[n]) * memory.count;
  };
  const auto candidates_at = [&](int n) {
    return kOnChip ? shared->candidates + n * kWarpSize
                   : memory.rows + (cloud * args.num_queries + shared->rows[n]) * memory.count;
  };

  for (int n = warp * kWarpQueries; n < (warp + 1) * kWarpQueries; ++n) {
    const int64_t row = query_row(args, cloud, first + n);
    float norm = 0;
    for (int64_t d = lane; row >= 0 && d < args.dims; d += kWarpSize) {
      const float value = query_at(args, cloud, row)[d] - center[d];
      norm = add_square(norm, value);
    }
    for (int step = kWarpSize / 2; step > 0; step /= 2) norm += __shfl_xor_sync(kAllLanes, norm, step);
    if (lane == 0) {
      shared->rows[n] = row;
      shared->norms[n] = row < 0 ? infinity : norm;
      shared->limits[n] = infinity;
    }
    if (kOnChip) {
      shared->bounds[n * kWarpSize + lane] = infinity;
      shared->candidates[n * kWarpSize + lane] = -1;
    }
  }

  const int64_t leaves = filled_leaves(args, cloud);
  for (int64_t leaf = 0; leaf < leaves; leaf += kTileLeaves) {
    WarpProduct product;
    for (int64_t begin = 0; begin < args.dims; begin += kFeatureDepth) {
      const int64_t rest = args.dims - begin;
      const int depth = static_cast<int>(rest < kFeatureDepth ? rest : kFeatureDepth);
      // Whole steps of the product; what is beyond the last coordinate counts 0.
      const int padded = (depth + 7) / 8 * 8;
      __syncthreads();
      // Queries stay where all their coordinates fit.
      if (lane < padded && (leaf == 0 || args.dims > kFeatureDepth)) {
        const float origin = lane < depth ? center[begin + lane] : 0.f;
#pragma unroll
        for (int n = warp; n < kTileQueries; n += kFeatureWarps) {
          const int64_t row = shared->rows[n];
          float value = 0;
          if (row >= 0 && lane < depth) value = query_at(args, cloud, row)[begin + lane] - origin;
          shared->queries[n * kQueryPitch + lane] = value;
        }
      }
      using Points = Pack<float, 4>;
      const int64_t own_leaf = leaf + lane / (kLeaf / 4);
      for (int d = warp; d < padded; d += kFeatureWarps) {
        Points pack = {};
        if (d < depth && own_leaf < leaves) {
          const int64_t row = (cloud * args.leaves + own_leaf) * args.dims + begin + d;
          pack = load_pack<float, 4>(args.coordinates + row * kLeaf + lane % (kLeaf / 4) * 4);
          const float origin = center[begin + d];
#pragma unroll
          for (int j = 0; j < 4; ++j) pack[j] -= origin;
        }
        store_pack(shared->points + d * kPointPitch + lane * 4, pack);
      }
      if (begin == 0 && threadIdx.x < kTilePoints) {
        const int64_t place = (cloud * args.leaves + leaf) * kLeaf + threadIdx.x;
        const bool exists = leaf + threadIdx.x / kLeaf < leaves;
        const int32_t row = exists ? indexed_row(args, place) : -1;
        shared->order[threadIdx.x] = row;
        shared->terms[threadIdx.x] = row < 0 ? infinity : bound.point_term(args.norms[place]);
      }
      __syncthreads();
      product.add(shared->queries + warp / kWarpColumns * 32 * kQueryPitch,
                  shared->points + warp % kWarpColumns * 32, padded);
    }
    product.store(shared->products + warp / kWarpColumns * 32 * kPointPitch + warp % kWarpColumns * 32);
    __syncthreads();
    const Pack<float, 4> terms = load_pack<float, 4>(shared->terms + lane * 4);
    for (int n = warp * kWarpQueries; n < (warp + 1) * kWarpQueries; ++n) {
      if (!(shared->norms[n] < ProductBound::kLimit)) continue;
      const float limit = shared->limits[n];
      Pack<float, 4> lower = load_pack<float, 4>(shared->products + n * kPointPitch + lane * 4);
      bool enters = false;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        lower[j] = terms[j] - 2 * lower[j];
        // NaN is of a product that overflowed, about which nothing is known.
        enters |= !(lower[j] >= limit);
      }
      if (!__any_sync(kAllLanes, enters)) continue;
      Candidates list(bounds_at(n), candidates_at(n), memory.count);
      list.load(bounds_at(n), candidates_at(n));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int32_t row = shared->order[lane * 4 + j];
        consider(list, lower[j] == lower[j] ? lower[j] : -infinity, row,
                 row >= 0 && !(args.exclude_self && row == shared->rows[n]));
      }
      list.store(bounds_at(n), candidates_at(n));
      if (lane == 0) shared->limits[n] = list.worst_distance();
      __syncwarp();
    }
  }
  __syncwarp();

  for (int n = warp * kWarpQueries; n < (warp + 1) * kWarpQueries; ++n) {
    const int64_t row = shared->rows[n];
    if (row < 0) continue;
    const int64_t output = (cloud * args.num_queries + row) * args.k;
    bool closed = shared->norms[n] < ProductBound::kLimit;
    if (closed) {
      Nearest list(args.distances + output, args.indices + output, args.k);
      const int32_t* candidates = candidates_at(n);
      for (int64_t begin = 0; begin < memory.count; begin += kWarpSize) {
        const int32_t point = candidates[begin + lane];
        const float distance =
            measure(query_at(args, cloud, row), args.points + cloud * args.num_points * args.dims, point,
                    args.dims, shared->products + warp * kWarpQueries * kPointPitch);
        consider(list, distance, point, point >= 0);
      }
      const bool is_full = candidates[memory.count - 1] >= 0;
      closed = !is_full || shared->limits[n] > bound.query_term(shared->norms[n], list.worst_distance());
      if (closed) list.store(args.distances + output, args.indices + output);
    }
    if (closed) continue;
    for (int64_t slot = lane; slot < args.k; slot += kWarpSize) {
      args.distances[output + slot] = infinity;
      args.indices[output + slot] = -1;
    }
    if (lane == 0) {
      const int64_t place = static_cast<int64_t>(atomicAdd(open.counts + cloud, 1ull));
      open.rows[cloud * args.num_queries + place] = row;
    }
  }
}

// Leaves the queries in `open` that the products do not settle.
template <bool kOnChip>
void launch_products(const KnnArgs<float>& args, const CandidateMemory& memory, const OpenQueries& open,
                     cudaStream_t stream) {
  launch("knn", knn_product_kernel<kOnChip>, grid_of(args.batch * divide_up(args.places(), kTileQueries)),
         dim3(kFeatureThreads), sizeof(ProductMemory<kOnChip>), stream, args, ProductBound(args.dims), memory,
         open);
}

// Whether products find the neighbours with less work. A pair takes about dims / 13 instructions of a warp by
// direct differences and a fifth of that by products, but each candidate about 10 dims / 32 to be measured,
// and 40 to be kept and put in order.
inline bool by_products(const KnnArgs<float>& args) {
  return args.num_points * args.dims >= candidates_of(args.k) * (4 * args.dims + 512) &&
         ProductBound(args.dims).is_useful() && is_aligned(args.coordinates);
}

template <typename List, typename A>
void launch_differences(const KnnArgs<A>& args, const OpenQueries& open, cudaStream_t stream) {
  launch("knn", knn_feature_kernel<A, List>, grid_of(args.batch * divide_up(args.places(), kLeaf)),
         dim3(kFeatureThreads), 0, stream, args, open);
}

// `points` is what new tensors are like.
template <typename List>
void search_features(const KnnArgs<float>& args, const Tensor& points, cudaStream_t stream) {
  if (!by_products(args)) return launch_differences<List>(args, {}, stream);
  const int64_t queries = args.batch * args.num_queries, count = candidates_of(args.k);
  Tensor counts = torch::stable::new_zeros(points, {args.batch}, ScalarType::Long);
  Tensor rows = torch::stable::new_empty(points, {queries}, ScalarType::Long);
  OpenQueries open;
  open.counts = reinterpret_cast<unsigned long long*>(mutable_data<int64_t>(counts));
  open.rows = mutable_data<int64_t>(rows);
  if (args.k <= RegisterList<float>::kMost) {
    open.few = grid_of(divide_up(args.num_queries, kFewShare)).x;
  }
  if (count == kWarpSize) {
    launch_products<true>(args, {}, open, stream);
  } else {
    Tensor bounds = torch::stable::new_empty(points, {queries, count});
    Tensor candidates = torch::stable::new_empty(points, {queries, count}, ScalarType::Int);
    const CandidateMemory memory{mutable_data<float>(bounds), mutable_data<int32_t>(candidates), count};
    fill_missing(memory.bounds, memory.rows, queries * count, stream);
    launch_products<false>(args, memory, open, stream);
  }
  launch("knn", knn_open_kernel, grid_of(args.batch * open.few), dim3(kFeatureThreads), 0, stream, args,
         open);
  launch_differences<List>(args, open, stream);
}

template <typename List>
void search_features(const KnnArgs<double>& args, const Tensor&, cudaStream_t stream) {
  launch_differences<List>(args, {}, stream);
}

}  // namespace
}  // namespace avatar
