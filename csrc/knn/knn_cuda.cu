#include "knn/knn_features_device.cuh"

namespace avatar {
namespace {

constexpr int kTreeWarps = 4;

// A warp a query: nodes of one level are told apart by lanes, the nearest first; a lane each point of a leaf.
template <typename A, typename List>
__global__ void __launch_bounds__(kTreeWarps* kWarpSize, 6)
    knn_tree_kernel(KnnArgs<A> args, TreeLevels levels) {
  AVATAR_SHARED(A, all_bounds, kTreeWarps * kMaxLevels * kWarpSize);
  AVATAR_SHARED(A, all_queries, kTreeWarps * kTreeDims);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int dims = static_cast<int>(args.dims);
  A* bounds = all_bounds + warp * kMaxLevels * kWarpSize + lane;
  A* query = all_queries + warp * kTreeDims;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kTreeWarps + warp;
  const int64_t cloud = number / args.places();
  if (cloud >= args.batch) return;
  const int64_t row = query_row(args, cloud, number - cloud * args.places());
  if (row < 0) return;
  if (lane < dims) query[lane] = query_at(args, cloud, row)[lane];
  __syncwarp();
  const int64_t output = (cloud * args.num_queries + row) * args.k;
  List list(args.distances + output, args.indices + output, args.k);

  const A* boxes = args.boxes + cloud * 2 * args.leaves * 2 * dims;
  const int32_t* lowest = args.lowest + cloud * 2 * args.leaves;
  const int top = levels.count - 1;
  int level = top;
  // Of the nodes that the lanes look at: the number of the level's first, and where among its nodes they
  // begin.
  int64_t base = levels.first(top), first = 0;
  bool enter = true;
  while (true) {
    const int64_t node = base + first + lane;
    if (enter) {
      // How near a point of the node may be; negative for a node without points.
      A bound = -1;
      if (first + lane < levels.size(level) && lowest[node] >= 0) {
        bound = 0;
        const A* box = boxes + node * 2 * dims;
        for (int d = 0; d < dims; ++d) {
          const A below = box[d] - query[d], above = query[d] - box[dims + d];
          bound = add_square(bound, below > 0 ? below : (above > 0 ? above : A(0)));
        }
      }
      bounds[level * kWarpSize] = bound;
      enter = false;
    }
    const A bound = bounds[level * kWarpSize], worst = list.worst_distance();
    const bool open =
        bound >= 0 &&
        (bound < worst || (bound == worst && static_cast<uint32_t>(lowest[node]) < list.worst_row()));
    if (!__any_sync(kAllLanes, open)) {
      if (level == top) break;
      base += levels.size(level++);
      first = first / kLeaf / kLeaf * kLeaf;
      continue;
    }
    const A nearest = warp_min(open ? bound : std::numeric_limits<A>::infinity());
    const int chosen = __ffs(static_cast<int>(__ballot_sync(kAllLanes, open && bound == nearest))) - 1;
    if (lane == chosen) bounds[level * kWarpSize] = -1;
    const int64_t child = first + chosen;
    if (level > 0) {
      base -= levels.size(--level);
      first = child * kLeaf;
      enter = true;
      continue;
    }
    const int64_t leaf = cloud * args.leaves + child;
    const int32_t point = indexed_row(args, leaf * kLeaf + lane);
    const A* coordinates = args.coordinates + leaf * dims * kLeaf + lane;
    A distance = 0;
    for (int d = 0; d < dims; ++d) distance = add_square(distance, query[d] - coordinates[d * kLeaf]);
    consider(list, distance, point, point >= 0 && !(args.exclude_self && point == row));
  }
  list.store(args.distances + output, args.indices + output);
}

template <typename A, typename List>
void launch_search(const KnnArgs<A>& args, const Tensor& points, cudaStream_t stream) {
  if (args.dims > kTreeDims) return search_features<List>(args, points, stream);
  launch("knn", knn_tree_kernel<A, List>, grid_of(divide_up(args.batch * args.places(), kTreeWarps)),
         dim3(kTreeWarps * kWarpSize), 0, stream, args, TreeLevels(args.leaves));
}

template <typename A>
std::tuple<Tensor, Tensor> search(const DeviceIndex& index, const Tensor& points,
                                  const std::optional<Tensor>& queries_in, int64_t k,
                                  const std::optional<Tensor>& query_lengths_in, bool exclude_self) {
  if (k < 0) throw std::invalid_argument("knn: k: got " + std::to_string(k) + ", expected k >= 0");
  const Tensor queries = queries_in ? to_compute(*queries_in) : points;
  std::optional<Tensor> query_lengths;
  if (query_lengths_in) query_lengths = as_contiguous(*query_lengths_in);
  const int64_t batch = points.size(0), num_queries = queries.size(1);
  Tensor distances = torch::stable::new_empty(points, {batch, num_queries, k});
  Tensor indices = torch::stable::new_empty(points, {batch, num_queries, k}, ScalarType::Long);
  const cudaStream_t stream = current_stream(points);
  fill_missing(mutable_data<A>(distances), mutable_data<int64_t>(indices), distances.numel(), stream);
  KnnArgs<A> args{};
  args.coordinates = const_data<A>(index.coordinates);
  args.order = const_data<int32_t>(index.order);
  args.counts = const_data<int64_t>(index.counts);
  if (points.size(2) <= kTreeDims) {
    args.boxes = const_data<A>(index.bounds);
    args.lowest = const_data<int32_t>(index.extra);
  } else {
    args.norms = const_data<A>(index.bounds);
    args.centers = const_data<A>(index.extra);
  }
  args.num_points = points.size(1);
  args.leaves = divide_up(points.size(1), kLeaf);
  args.dims = points.size(2);
  // With lengths of their own, even the points' own rows are other queries than the index holds.
  args.queries = queries_in || query_lengths ? const_data<A>(queries) : nullptr;
  args.query_lengths = query_lengths ? const_data<int64_t>(*query_lengths) : nullptr;
  args.points = const_data<A>(points);
  args.batch = batch;
  args.num_queries = num_queries;
  args.k = k;
  args.exclude_self = exclude_self;
  args.distances = mutable_data<A>(distances);
  args.indices = mutable_data<int64_t>(indices);
  if (distances.numel() == 0 || args.leaves == 0) return {distances, indices};
  if (k <= RegisterList<A>::kMost) {
    launch_search<A, RegisterList<A>>(args, points, stream);
  } else {
    launch_search<A, MemoryList<A>>(args, points, stream);
  }
  return {distances, indices};
}

// points (B, N, D), queries (B, M, D) -> squared distances and indices (B, M, k).
std::tuple<Tensor, Tensor> knn_cuda(const Tensor& points_in, const std::optional<Tensor>& queries, int64_t k,
                                    const std::optional<Tensor>& lengths,
                                    const std::optional<Tensor>& query_lengths, bool exclude_self) {
  const torch::stable::accelerator::DeviceGuard guard(points_in.get_device_index());
  const Tensor points = to_compute(points_in);
  std::tuple<Tensor, Tensor> result;
  dispatch_compute(points.scalar_type(), "knn", [&](auto zero) {
    using A = decltype(zero);
    result = search<A>(build_index<A>(points, lengths), points, queries, k, query_lengths, exclude_self);
  });
  return {to_type(std::get<0>(result), points_in.scalar_type()), std::get<1>(result)};
}

std::vector<Tensor> knn_build_cuda(const Tensor& points_in, const std::optional<Tensor>& lengths) {
  const torch::stable::accelerator::DeviceGuard guard(points_in.get_device_index());
  const Tensor points = to_compute(points_in);
  std::vector<Tensor> parts;
  dispatch_compute(points.scalar_type(), "knn_build", [&](auto zero) {
    const DeviceIndex index = build_index<decltype(zero)>(points, lengths);
    parts = {index.coordinates, index.order, index.counts, index.bounds, index.extra};
  });
  return parts;
}

// An index of other sizes must not be read out of bounds.
void check_index(const std::vector<Tensor>& parts, const Tensor& points) {
  const int64_t batch = points.size(0), dims = points.size(2), leaves = divide_up(points.size(1), kLeaf);
  const ScalarType type = points.scalar_type();
  const bool tree = dims <= kTreeDims;
  const auto shaped = [&](size_t part, std::vector<int64_t> sizes, ScalarType expected) {
    const Tensor& tensor = parts[part];
    bool fits = tensor.scalar_type() == expected && tensor.is_contiguous() &&
                tensor.get_device_index() == points.get_device_index() &&
                tensor.dim() == static_cast<int64_t>(sizes.size());
    for (size_t d = 0; fits && d < sizes.size(); ++d) fits = tensor.size(static_cast<int64_t>(d)) == sizes[d];
    return fits;
  };
  const bool fits =
      parts.size() == 5 && shaped(0, {batch, leaves, dims, kLeaf}, type) &&
      shaped(1, {batch, leaves, kLeaf}, ScalarType::Int) && shaped(2, {batch}, ScalarType::Long) &&
      (tree ? shaped(3, {batch, 2 * leaves, 2, dims}, type) && shaped(4, {batch, 2 * leaves}, ScalarType::Int)
            : shaped(3, {batch, leaves, kLeaf}, type) && shaped(4, {batch, dims}, type));
  if (!fits) {
    throw std::invalid_argument(
        "knn_search: index: does not fit the points, expected what knn_build makes of them");
  }
}

std::tuple<Tensor, Tensor> knn_search_cuda(const std::vector<Tensor>& parts, const Tensor& points_in,
                                           const std::optional<Tensor>& queries, int64_t k,
                                           const std::optional<Tensor>& query_lengths, bool exclude_self) {
  const torch::stable::accelerator::DeviceGuard guard(points_in.get_device_index());
  const Tensor points = to_compute(points_in);
  check_index(parts, points);
  const DeviceIndex index{parts[0], parts[1], parts[2], parts[3], parts[4]};
  std::tuple<Tensor, Tensor> result;
  dispatch_compute(points.scalar_type(), "knn_search", [&](auto zero) {
    result = search<decltype(zero)>(index, points, queries, k, query_lengths, exclude_self);
  });
  return {to_type(std::get<0>(result), points_in.scalar_type()), std::get<1>(result)};
}

// What the gradient of the distances |q - p|^2 flows back along.
template <typename A>
struct KnnGradient {
  const A* grad;     // (batch, rows, k)
  const A* points;   // (batch, num_points, dims)
  const A* queries;  // (batch, rows, dims)
  NeighborList list;
  int64_t dims;

  // Coordinate d of a query's gradient.
  __device__ A of_query(int64_t row, int64_t d) const {
    const A* cloud = points + row / list.rows * list.num_points * dims + d;
    const A own = queries[row * dims + d];
    A sum = 0;
    for (int64_t e = row * list.k; e < (row + 1) * list.k; ++e) {
      const int64_t point = checked_neighbor(list, e);
      if (point >= 0) sum += 2 * grad[e] * (own - cloud[point * dims]);
    }
    return sum;
  }
};

// One thread a coordinate.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    knn_query_gradient_kernel(KnnGradient<A> gradient, A* __restrict__ grad_queries, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) grad_queries[i] = gradient.of_query(i / gradient.dims, i % gradient.dims);
}

// One thread a coordinate; where the points are the queries it is both gradients.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    knn_point_gradient_kernel(KnnGradient<A> gradient, IncomingEdgesOf incoming, bool both,
                              A* __restrict__ grad_points, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t row = i / gradient.dims, d = i - row * gradient.dims;
  const int64_t cloud = row / incoming.num_points, rows = incoming.rows;
  const IncomingEdges edges = incoming.point(cloud, row - cloud * incoming.num_points);
  const A own = gradient.points[i];
  A sum = both ? gradient.of_query(row, d) : A(0);
  for (int64_t n = 0; n < edges.count; ++n) {
    const A weight = 2 * gradient.grad[cloud * rows * incoming.k + edges.edges[n]];
    sum += weight * (own - gradient.queries[(cloud * rows + edges.row(n)) * gradient.dims + d]);
  }
  grad_points[i] = sum;
}

// As on the CPU: zero size where not needed; without queries the points' gradient holds both roles.
std::tuple<Tensor, Tensor> knn_backward_cuda(const Tensor& grad_in, const Tensor& points_in,
                                             const std::optional<Tensor>& queries_in,
                                             const Tensor& indices_in, bool need_points, bool need_queries) {
  const torch::stable::accelerator::DeviceGuard guard(points_in.get_device_index());
  const Tensor grad = to_compute(grad_in), points = to_compute(points_in);
  const Tensor queries = queries_in ? to_compute(*queries_in) : points;
  const Tensor indices = as_contiguous(indices_in);
  const int64_t batch = points.size(0), num_points = points.size(1), dims = points.size(2);
  const int64_t rows = indices.size(1), k = indices.size(2);
  const auto empty = [&](bool needed, int64_t count) {
    return needed ? torch::stable::new_empty(points, {batch, count, dims})
                  : torch::stable::new_empty(points, {0});
  };
  Tensor grad_points = empty(need_points, num_points);
  Tensor grad_queries = empty(queries_in && need_queries, rows);
  const cudaStream_t stream = current_stream(points);
  dispatch_compute(points.scalar_type(), "knn_backward", [&](auto zero) {
    using A = decltype(zero);
    const KnnGradient<A> gradient{const_data<A>(grad),
                                  const_data<A>(points),
                                  const_data<A>(queries),
                                  {"knn_backward", const_data<int64_t>(indices), rows, k, num_points},
                                  dims};
    launch("knn_backward", knn_query_gradient_kernel<A>, grid_of(divide_up(grad_queries.numel(), kThreads)),
           dim3(kThreads), 0, stream, gradient, mutable_data<A>(grad_queries), grad_queries.numel());
    if (grad_points.numel() == 0) return;
    const ReverseAdjacency reverse = reverse_adjacency("knn_backward", indices, num_points);
    launch("knn_backward", knn_point_gradient_kernel<A>, grid_of(divide_up(grad_points.numel(), kThreads)),
           dim3(kThreads), 0, stream, gradient, incoming_edges(reverse, indices, num_points), !queries_in,
           mutable_data<A>(grad_points), grad_points.numel());
  });
  return {to_type(grad_points, points_in.scalar_type()), to_type(grad_queries, points_in.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(avatar_ops, CUDA, m) {
  m.impl("knn", TORCH_BOX(&knn_cuda));
  m.impl("knn_build", TORCH_BOX(&knn_build_cuda));
  m.impl("knn_search", TORCH_BOX(&knn_search_cuda));
  m.impl("knn_backward", TORCH_BOX(&knn_backward_cuda));
}

}  // namespace avatar
