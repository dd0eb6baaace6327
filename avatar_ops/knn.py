"""Exact nearest neighbours: schemas, public functions, fakes, autograd."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._library import (
    HAS_CUDA_KERNELS,
    autocast_to_float32,
    check_device,
    check_floating,
    check_index,
    check_option,
    check_rank,
    check_shape,
    define,
    forbid_second_derivative,
)

define(
    "knn(Tensor points, Tensor? queries, SymInt k, Tensor? lengths, Tensor? query_lengths, bool exclude_self)"
    " -> (Tensor distances, Tensor indices)"
)
define("knn_build(Tensor points, Tensor? lengths) -> Tensor[]")
define("knn_arrange(Tensor points, Tensor? lengths) -> (Tensor order, Tensor[] index)")
define(
    "knn_search(Tensor[] index, Tensor points, Tensor? queries, SymInt k, Tensor? query_lengths,"
    " bool exclude_self) -> (Tensor distances, Tensor indices)"
)
define(
    "knn_backward(Tensor grad, Tensor points, Tensor? queries, Tensor indices, bool need_points,"
    " bool need_queries) -> (Tensor, Tensor)"
)
define(
    "knn_graph(Tensor x, SymInt k, Tensor? batch, bool loop, bool neighbors_first, SymInt? batch_size) -> Tensor"
)


class KNN(NamedTuple):
    """Squared distances and int64 indices, both (B, M, k) or (M, k), nearest first."""

    distances: Tensor
    indices: Tensor


torch.utils._pytree._register_namedtuple(KNN, serialized_type_name="avatar_ops.KNN")


def knn(
    points: Tensor,
    k: int,
    *,
    queries: Tensor | None = None,
    lengths: Tensor | None = None,
    query_lengths: Tensor | None = None,
    exclude_self: bool = False,
) -> KNN:
    """Exact k nearest neighbours of each query among the points of its cloud.

    Args:
        points: (B, N, D) or (N, D) float16, bfloat16, float32 or float64, D >= 1. A point with a NaN or
            infinite coordinate is nobody's neighbour.
        k: neighbours per query, as many as wanted.
        queries: (B, M, D) or (M, D) like points; the points themselves where None.
        lengths: (B,) int64 in [0, N], the rows of points in use; all where None.
        query_lengths: (B,) int64 in [0, M], the rows of queries in use; where None all, or `lengths` when
            queries is None too.
        exclude_self: drop the neighbour whose index is the query's own; only where queries is None.

    Returns:
        distances: (B, M, k) squared Euclidean, ascending, equal ones by index; in the dtype of points, ordered
            before rounding to it; +inf where missing.
        indices: (B, M, k) int64; -1 where missing: fewer than k points, padding rows and queries that are not
            finite.

    Raises:
        TypeError: dtypes.   ValueError: rank, sizes, device, k < 0, a length out of range (CPU).

    Differentiable in points and queries through distances (first order). Memory O(N (D + k)).
    Reference: reference.knn.
    """
    _check_points(points)
    _check_queries(points, k, queries, exclude_self)
    batched = points.dim() == 3
    lengths = _check_lengths("lengths", lengths, points)
    query_lengths = _check_lengths("query_lengths", query_lengths, points)
    if not batched:
        points = points.unsqueeze(0)
        queries = None if queries is None else queries.unsqueeze(0)
    result = torch.ops.avatar_ops.knn(points, queries, k, lengths, query_lengths, exclude_self)
    return _result(result, batched)


class PointIndex:
    """A spatial index of points, built once for many searches.

    Args:
        points: as for `knn`; not to be changed in place while the index is in use.
        lengths: as for `knn`.

    `knn(k, queries=..., query_lengths=..., exclude_self=...)` gives what `avatar_ops.knn` gives for these
    points, gradients included. Building and searching may be compiled.
    """

    def __init__(self, points: Tensor, lengths: Tensor | None = None):
        self._take(points, lengths)
        self.index = torch.ops.avatar_ops.knn_build(self._batched_points().detach(), self.lengths)

    @classmethod
    def arranged(cls, points: Tensor, lengths: Tensor | None = None) -> tuple[PointIndex, Tensor]:
        """An index of the points in an order in which those near each other follow each other, and the order.

        What gathers rows of neighbours finds them near in memory then.

        Args:
            points, lengths: as for the class; rows that are not finite or not in use come last.

        Returns:
            index: its `points` are those given, their rows in the order (the same on every CPU).
            order: (B, N) or (N,) int64, the row that each was before.
        """
        given = cls.__new__(cls)
        given._take(points, lengths)
        rows = given._batched_points()
        order, parts = torch.ops.avatar_ops.knn_arrange(rows.detach(), given.lengths)
        if given.batched:
            given.points = points.take_along_dim(order.unsqueeze(2), 1)
        else:
            order = order.squeeze(0)
            given.points = points.index_select(0, order)
        given.index = parts
        return given, order

    def _take(self, points: Tensor, lengths: Tensor | None) -> None:
        _check_points(points)
        self.batched = points.dim() == 3
        self.points = points
        self.lengths = _check_lengths("lengths", lengths, points)

    def knn(
        self,
        k: int,
        *,
        queries: Tensor | None = None,
        query_lengths: Tensor | None = None,
        exclude_self: bool = False,
    ) -> KNN:
        """Nearest neighbours among the indexed points: see `avatar_ops.knn`."""
        _check_queries(self.points, k, queries, exclude_self)
        query_lengths = _check_lengths("query_lengths", query_lengths, self.points)
        if queries is not None and not self.batched:
            queries = queries.unsqueeze(0)
        result = torch.ops.avatar_ops.knn_search(
            self.index, self._batched_points(), queries, k, query_lengths, exclude_self
        )
        return _result(result, self.batched)

    def to(self, device: torch.device | str) -> PointIndex:
        """An index of the same points on another device."""
        lengths = None if self.lengths is None else self.lengths.to(device)
        return PointIndex(self.points.to(device), lengths)

    def _batched_points(self) -> Tensor:
        return self.points if self.batched else self.points.unsqueeze(0)


def knn_graph(
    x: Tensor,
    k: int,
    batch: Tensor | None = None,
    loop: bool = False,
    flow: str = "source_to_target",
    cosine: bool = False,
    num_workers: int = 1,
    batch_size: int | None = None,
) -> Tensor:
    """Edges from each point to its k nearest within its cloud, as in torch_cluster and PyG.

    Args:
        x: (N, D) or (N,) floating points of all clouds together.
        k: neighbours per point, without itself unless `loop`.
        batch: (N,) int64 cloud of each point, ascending; one cloud where None.
        loop: whether a point may be its own neighbour.
        flow: "source_to_target" puts neighbours in the first row, "target_to_source" in the second.
        cosine: rank by the cosine of the angle; a zero vector has none, hence no edges.
        num_workers: ignored.
        batch_size: number of clouds; only checked.

    Returns:
        (2, E) int64, grouped by query, nearest first, equal distances by index; fewer than k for a point
        whose cloud is too small or that is not finite.

    Raises:
        TypeError: dtypes.   ValueError: shape, device, k < 0, flow, a batch that is not sorted (CPU).
    """
    check_floating("x", x)
    check_rank("x", x, (1, 2), "(N, D) or (N,)")
    _check_k(k)
    check_option("flow", flow, ("source_to_target", "target_to_source"))
    if x.dim() == 1:
        x = x.unsqueeze(1)
    _check_dims("x", x)
    if batch is not None:
        check_index("batch", batch)
        check_shape("batch", batch, (x.shape[0],), "(N,)")
        check_device("batch", batch, x)
        batch = batch.long()
    if cosine:
        x = _directions(x.detach())
    first = flow == "source_to_target"
    return torch.ops.avatar_ops.knn_graph(x, k, batch, bool(loop), first, batch_size)


def _directions(x: Tensor) -> Tensor:
    """Unit vectors, whose squared distance is twice one minus the cosine; NaN for zero vectors."""
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    # Scaled first, so that squares neither overflow nor vanish.
    x = x / x.abs().amax(1, keepdim=True)
    return x / x.square().sum(1, keepdim=True).sqrt()


def _check_points(points) -> None:
    check_floating("points", points)
    check_rank("points", points, (2, 3), "(B, N, D) or (N, D)")
    _check_dims("points", points)


def _check_dims(name: str, points: Tensor) -> None:
    if points.shape[-1] < 1:
        raise ValueError(f"{name}: got shape {tuple(points.shape)}, expected at least one coordinate")


def _check_k(k) -> None:
    if not isinstance(k, int | torch.SymInt) or isinstance(k, bool):
        raise TypeError(f"k: got {k!r} ({type(k).__name__}), expected an int")
    if k < 0:
        raise ValueError(f"k: got {k}, expected k >= 0")


def _check_queries(points: Tensor, k, queries, exclude_self: bool) -> None:
    _check_k(k)
    if queries is None:
        return
    if exclude_self:
        raise ValueError(
            "exclude_self: got True with queries, expected queries=None: queries have no own index"
        )
    check_floating("queries", queries, points)
    sizes = (points.shape[0], None, points.shape[2]) if points.dim() == 3 else (None, points.shape[1])
    check_shape("queries", queries, sizes, "(B, M, D)" if points.dim() == 3 else "(M, D)")
    check_device("queries", queries, points)


def _check_lengths(name: str, lengths, points: Tensor) -> Tensor | None:
    """(B,) int64; a single cloud without batch dimension may also have a scalar."""
    if lengths is None:
        return None
    check_index(name, lengths)
    if points.dim() == 2 and lengths.dim() == 0:
        lengths = lengths.unsqueeze(0)
    check_shape(name, lengths, (points.shape[0] if points.dim() == 3 else 1,), "(B,)")
    check_device(name, lengths, points)
    return lengths.long()


def _result(result: tuple[Tensor, Tensor], batched: bool) -> KNN:
    return KNN(*result) if batched else KNN(result[0].squeeze(0), result[1].squeeze(0))


# Constants of csrc/knn/knn_simd.h, for the sizes of an index.
_LEAF = 32
_TREE_DIMS = 10


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _fake_result(points, queries, k):
    shape = (points.shape[0], (points if queries is None else queries).shape[1], k)
    return points.new_empty(shape), points.new_empty(shape, dtype=torch.int64)


def knn_graph_by_clouds(x, k, batch, loop, neighbors_first, batch_size) -> Tensor:
    """The op knn_graph by knn, which wants clouds of one length: those of like length are padded together.

    Clouds are padded to powers of two, so that this takes at most twice the memory of the points.
    """
    rows = x.shape[0]
    _check_batch(batch, batch_size)
    if batch is None:
        lengths = torch.full((min(rows, 1),), rows, dtype=torch.int64, device=x.device)
    else:
        lengths = torch.unique_consecutive(batch, return_counts=True)[1]
    largest = int(lengths.max()) if rows else 0
    k = max(0, min(k, largest if loop else largest - 1))
    starts = lengths.cumsum(0) - lengths
    sizes = 2 ** torch.arange(largest.bit_length() + 1, device=x.device)
    widths = sizes[torch.searchsorted(sizes, lengths)]
    neighbors = torch.full((rows, k), -1, dtype=torch.int64, device=x.device)
    for width in widths.unique().tolist():
        chosen = widths == width
        first, length = starts[chosen].unsqueeze(1), lengths[chosen]
        places = torch.arange(width, device=x.device)
        members = (first + places).clamp(max=rows - 1)
        found = torch.ops.avatar_ops.knn(x[members], None, k, length, None, not loop)[1]
        found = torch.where(found >= 0, found + first.unsqueeze(2), -1)
        inside = places < length.unsqueeze(1)
        neighbors[members[inside]] = found[inside]
    query, slot = (neighbors >= 0).nonzero(as_tuple=True)
    neighbor = neighbors[query, slot]
    return torch.stack([neighbor, query] if neighbors_first else [query, neighbor])


def _check_batch(batch: Tensor | None, batch_size: int | None) -> None:
    """ValueError unless the values are sorted and in range; waits for the device."""
    if batch is None or batch.numel() == 0:
        return
    before = torch.cat([batch.new_zeros(1), batch[:-1]])
    unsorted = batch < before
    beyond = torch.zeros_like(unsorted) if batch_size is None else batch >= batch_size
    bad = (unsorted | beyond).nonzero()
    if bad.numel() == 0:
        return
    row = int(bad[0, 0])
    expected = (
        f" after {int(before[row])}; expected sorted values >= 0"
        if unsorted[row]
        else f"; expected values below batch_size = {batch_size}"
    )
    raise ValueError(f"knn_graph: batch[{row}] = {int(batch[row])}{expected}")


def arrange_by_build(points: Tensor, lengths: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """The op knn_arrange by knn_build."""
    batch, rows = points.shape[:2]
    indexed = torch.ops.avatar_ops.knn_build(points, lengths)[1].flatten(1)
    # Rows that are not in the index have the last place; what no row fills takes the place of row `rows`.
    places = torch.full((batch, rows + 1), indexed.shape[1], dtype=torch.int64, device=points.device)
    numbers = torch.arange(indexed.shape[1], device=points.device).expand(batch, -1)
    places.scatter_(1, torch.where(indexed < 0, rows, indexed).long(), numbers)
    order = places[:, :rows].argsort(dim=1, stable=True)
    return order, torch.ops.avatar_ops.knn_build(points.take_along_dim(order.unsqueeze(2), 1), lengths)


if HAS_CUDA_KERNELS:
    torch.library.impl("avatar_ops::knn_graph", "CUDA", knn_graph_by_clouds)
    torch.library.impl("avatar_ops::knn_arrange", "CUDA", arrange_by_build)


@torch.library.register_fake("avatar_ops::knn")
def _(points, queries, k, lengths, query_lengths, exclude_self):
    return _fake_result(points, queries, k)


@torch.library.register_fake("avatar_ops::knn_build")
def _fake_index(points, lengths):
    batch, rows, dims = points.shape
    leaves = (rows + _LEAF - 1) // _LEAF
    dtype = _accumulation_dtype(points.dtype)
    coordinates = points.new_empty((batch, leaves, dims, _LEAF), dtype=dtype)
    order = points.new_empty((batch, leaves, _LEAF), dtype=torch.int32)
    counts = points.new_empty((batch,), dtype=torch.int64)
    if dims <= _TREE_DIMS:
        bounds = points.new_empty((batch, 2 * leaves, 2, dims), dtype=dtype)
        extra = points.new_empty((batch, 2 * leaves), dtype=torch.int32)
    else:
        bounds = points.new_empty((batch, leaves, _LEAF), dtype=dtype)
        extra = points.new_empty((batch, dims), dtype=dtype)
    return [coordinates, order, counts, bounds, extra]


@torch.library.register_fake("avatar_ops::knn_arrange")
def _(points, lengths):
    return points.new_empty(points.shape[:2], dtype=torch.int64), _fake_index(points, lengths)


@torch.library.register_fake("avatar_ops::knn_search")
def _(index, points, queries, k, query_lengths, exclude_self):
    return _fake_result(points, queries, k)


@torch.library.register_fake("avatar_ops::knn_backward")
def _(grad, points, queries, indices, need_points, need_queries):
    grad_points = points.new_empty(points.shape if need_points else (0,))
    return grad_points, points.new_empty(queries.shape if queries is not None and need_queries else (0,))


@torch.library.register_fake("avatar_ops::knn_graph")
def _(x, k, batch, loop, neighbors_first, batch_size):
    return x.new_empty((2, torch.library.get_ctx().new_dynamic_size()), dtype=torch.int64)


def _save(ctx, points, queries, indices):
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(points, queries, indices)


def _gradients(ctx, grad, need_points: bool, need_queries: bool):
    points, queries, indices = ctx.saved_tensors
    grad_points, grad_queries = torch.ops.avatar_ops.knn_backward(
        grad, points, queries, indices, need_points, need_queries
    )
    return grad_points if need_points else None, grad_queries if need_queries else None


def _setup_knn(ctx, inputs, output):
    _save(ctx, inputs[0], inputs[1], output[1])


def _backward_knn(ctx, grad_distances, grad_indices):
    need = ctx.needs_input_grad
    return *_gradients(ctx, grad_distances, need[0], need[1]), None, None, None, None


def _setup_search(ctx, inputs, output):
    ctx.num_parts = len(inputs[0])
    _save(ctx, inputs[1], inputs[2], output[1])


def _backward_search(ctx, grad_distances, grad_indices):
    need = ctx.needs_input_grad
    return [None] * ctx.num_parts, *_gradients(ctx, grad_distances, need[1], need[2]), None, None, None


torch.library.register_autograd("avatar_ops::knn", _backward_knn, setup_context=_setup_knn)
torch.library.register_autograd("avatar_ops::knn_search", _backward_search, setup_context=_setup_search)
forbid_second_derivative("knn_backward")
for _name in ("knn", "knn_build", "knn_arrange", "knn_search", "knn_graph"):
    autocast_to_float32(_name)
