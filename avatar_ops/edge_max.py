"""Per-channel maximum over neighbours: schema, public function, fake, autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import (
    check_device,
    check_floating,
    check_index,
    check_neighbors,
    check_rank,
    check_shape,
    define,
    forbid_second_derivative,
)

define("edge_max(Tensor features, Tensor neighbors) -> (Tensor values, Tensor argmax)")
define("edge_max_values(Tensor features, Tensor neighbors, Tensor? rows) -> Tensor")
define("edge_max_backward(Tensor grad, Tensor argmax, Tensor neighbors, SymInt num_points) -> Tensor")


def edge_max(features: Tensor, neighbors: Tensor) -> tuple[Tensor, Tensor]:
    """Per-channel maximum over each point's neighbours.

        values[b, m, c] = max_k features[b, neighbors[b, m, k], c]

    Args:
        features: (B, N, C) or (N, C) float16, bfloat16, float32 or float64.
        neighbors: (B, M, K) or (M, K) int64 (or int32) in [0, N), or -1 for "none"; same device.

    Returns:
        values: (B, M, C) in the dtype of features; 0 where a row has no neighbour; NaN wins.
        argmax: (B, M, C) int64 point indices, the smallest k on ties; -1 where a row has no neighbour.

    Raises:
        TypeError: unsupported dtype.   ValueError: rank, batch or device mismatch.
        IndexError: a neighbour outside [-1, N) (CPU).

    Differentiable in features (first order).
    Source: Wang et al., Dynamic Graph CNN, TOG 2019, eq. 7. Reference: reference.edge_max.
    """
    check_floating("features", features)
    check_rank("features", features, (2, 3), "(B, N, C) or (N, C)")
    neighbors = check_neighbors(neighbors, features)
    if features.dim() == 3:
        return torch.ops.avatar_ops.edge_max(features, neighbors)
    values, argmax = torch.ops.avatar_ops.edge_max(features.unsqueeze(0), neighbors.unsqueeze(0))
    return values.squeeze(0), argmax.squeeze(0)


def edge_max_values(features: Tensor, neighbors: Tensor, rows: Tensor | None = None) -> Tensor:
    """The values of `edge_max` alone; faster where no gradient is wanted.

    Args:
        features, neighbors: as for `edge_max`.
        rows: (M',) int64 (or int32) in [0, M), the rows of neighbors, of every cloud, that count; all if None.

    Returns:
        (B, M', C) or (M', C).

    Raises:
        What `edge_max` does.   IndexError: a row outside [0, M) (CPU).
    """
    check_floating("features", features)
    check_rank("features", features, (2, 3), "(B, N, C) or (N, C)")
    neighbors = check_neighbors(neighbors, features)
    if rows is not None:
        check_index("rows", rows)
        check_shape("rows", rows, (None,), "(M',)")
        check_device("rows", rows, features)
        rows = rows.long()
    if torch.is_grad_enabled() and features.requires_grad:
        return edge_max(features, neighbors if rows is None else neighbors.index_select(-2, rows))[0]
    if features.dim() == 3:
        return torch.ops.avatar_ops.edge_max_values(features, neighbors, rows)
    features, neighbors = features.unsqueeze(0), neighbors.unsqueeze(0)
    return torch.ops.avatar_ops.edge_max_values(features, neighbors, rows).squeeze(0)


@torch.library.register_fake("avatar_ops::edge_max_values")
def _(features, neighbors, rows):
    count = neighbors.shape[1] if rows is None else rows.shape[0]
    return features.new_empty(features.shape[0], count, features.shape[2])


def _edge_max_values_cuda(features, neighbors, rows):
    chosen = neighbors if rows is None else neighbors.index_select(1, rows)
    return torch.ops.avatar_ops.edge_max(features, chosen)[0]


torch.library.impl("avatar_ops::edge_max_values", "CUDA", _edge_max_values_cuda)


@torch.library.register_fake("avatar_ops::edge_max")
def _(features, neighbors):
    shape = (neighbors.shape[0], neighbors.shape[1], features.shape[2])
    return features.new_empty(shape), neighbors.new_empty(shape)


@torch.library.register_fake("avatar_ops::edge_max_backward")
def _(grad, argmax, neighbors, num_points):
    return grad.new_empty(grad.shape[0], num_points, grad.shape[2])


def _setup_context(ctx, inputs, output):
    ctx.num_points = inputs[0].shape[1]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], inputs[1])


def _backward(ctx, grad_values, grad_argmax):
    return torch.ops.avatar_ops.edge_max_backward(grad_values, *ctx.saved_tensors, ctx.num_points), None


torch.library.register_autograd("avatar_ops::edge_max", _backward, setup_context=_setup_context)
forbid_second_derivative("edge_max_backward")
