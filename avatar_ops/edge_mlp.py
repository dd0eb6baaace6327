"""EdgeConv with several layers per edge: schemas, functions, kernels, fakes, autograd.

The first layer is split into products per point, which torch computes. What follows, edge_layers and its
kin, runs over tiles of edges: those of a few tiles exist at a time, and the backward pass computes them
again, so memory is O(N * (C + O)).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._library import (
    autocast_to_active,
    check_device,
    check_floating,
    check_shape,
    check_slope,
    define,
    forbid_second_derivative,
    launch_with_triton,
)
from .edge_conv import EdgeStatistics, check_edge_inputs, check_kept, needs_gradient

# slots (B, N, O) int32: which neighbour gave the maximum, -1 for none; empty unless keep_slots.
define(
    "edge_mlp(Tensor x, Tensor neighbors, Tensor[] weights, Tensor[] scales, Tensor[] shifts, "
    "float negative_slope, bool keep_slots) -> (Tensor output, Tensor slots)"
)
define(
    "edge_mlp_backward(Tensor grad, Tensor slots, Tensor x, Tensor neighbors, Tensor[] weights, "
    "Tensor[] scales, Tensor[] shifts, float negative_slope) -> (Tensor, Tensor[], Tensor[], Tensor[])"
)
define(
    "edge_mlp_statistics(Tensor x, Tensor neighbors, Tensor[] weights, Tensor[] scales, Tensor[] shifts, "
    "float negative_slope) -> (Tensor mean, Tensor variance, Tensor count)"
)
define(
    "edge_mlp_statistics_backward(Tensor grad_mean, Tensor grad_variance, Tensor count, Tensor mean, "
    "Tensor x, Tensor neighbors, Tensor[] weights, Tensor[] scales, Tensor[] shifts, float negative_slope) "
    "-> (Tensor, Tensor[], Tensor[], Tensor[])"
)
# The layers on tiles of edges, from p and q (R, O_1), the first layer of an edge being p_i - q_j, and points
# (R, K) int64 rows of q or -1; weights are those after the first, all in the compute dtype.
define(
    "edge_layers(Tensor p, Tensor q, Tensor points, Tensor[] weights, Tensor[] scales, Tensor[] shifts, "
    "float negative_slope, bool keep_slots) -> (Tensor output, Tensor slots)"
)
define(
    "edge_layers_statistics(Tensor p, Tensor q, Tensor points, Tensor[] weights, Tensor[] scales, "
    "Tensor[] shifts, float negative_slope) -> (Tensor mean, Tensor variance, Tensor count)"
)
# Of the maximum, from its gradient and slots, or of the last linear layer, whose gradient on every edge is
# constant + factor times the layer.
define(
    "edge_layers_backward(Tensor? grad, Tensor? slots, Tensor? constant, Tensor? factor, Tensor p, Tensor q, "
    "Tensor points, Tensor[] weights, Tensor[] scales, Tensor[] shifts, float negative_slope) "
    "-> (Tensor, Tensor, Tensor[], Tensor[], Tensor[])"
)
launch_with_triton("edge_mlp", "edge_layers", "edge_layers_statistics", "edge_layers_backward")


def edge_mlp(
    x: Tensor,
    neighbors: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    *,
    negative_slope: float = 0.2,
) -> Tensor:
    """EdgeConv with an MLP per edge and the maximum over the edges.

        h = [x_i ; x_i - x_j];  for each layer: h = act(scale * (weight h) + shift);  output = max_j h

    where act is LeakyReLU. The first layer is split into products per point, as in edge_conv.

    Args:
        x: (B, N, C) or (N, C) float16, bfloat16, float32 or float64.
        neighbors: (B, N, K) or (N, K) int64 (or int32) in [0, N), or -1 for "none"; same device.
        weights: (O_1, 2C), then (O_l, O_{l-1}), in the dtype of x.
        scales, shifts: (O_l,) for every layer, in the dtype of x, or float32 with half-precision x.
        negative_slope: in [0, 1].

    Returns:
        (B, N, O_last) in the dtype of x; 0 where a row has no neighbour; NaN wins.

    Raises:
        TypeError: unsupported or mixed dtypes.   ValueError: rank, shape, number of layers, device or slope.
        IndexError: a neighbour outside [-1, N) (CPU).

    Differentiable in x, weights, scales and shifts (first order). Under autocast x and weights are cast.
    Source: Wang et al., Dynamic Graph CNN, TOG 2019. Reference: reference.edge_mlp.
    """
    neighbors = _check(x, neighbors, weights, scales, shifts, normalized=len(weights))
    keep = needs_gradient(x, *weights, *scales, *shifts)
    batched = x.dim() == 3
    if not batched:
        x, neighbors = x.unsqueeze(0), neighbors.unsqueeze(0)
    output, _ = torch.ops.avatar_ops.edge_mlp(
        x, neighbors, list(weights), list(scales), list(shifts), check_slope(negative_slope), keep
    )
    return output if batched else output.squeeze(0)


def edge_mlp_statistics(
    x: Tensor,
    neighbors: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    *,
    negative_slope: float = 0.2,
) -> EdgeStatistics:
    """Statistics over all edges of the last linear layer of edge_mlp, before its scale.

    Args: as edge_mlp, with one scale and shift fewer than weights.

    Returns:
        mean and biased variance (O_last,), centred before squaring, at least float32; count () int64.

    Raises: as edge_mlp.

    Differentiable in x, weights, scales and shifts (first order). Under autocast x and weights are cast.
    Source: Ioffe and Szegedy, Batch Normalization, ICML 2015. Reference: reference.edge_mlp_statistics.
    """
    neighbors = _check(x, neighbors, weights, scales, shifts, normalized=len(weights) - 1)
    if x.dim() == 2:
        x, neighbors = x.unsqueeze(0), neighbors.unsqueeze(0)
    return EdgeStatistics(
        *torch.ops.avatar_ops.edge_mlp_statistics(
            x, neighbors, list(weights), list(scales), list(shifts), check_slope(negative_slope)
        )
    )


def _check(x, neighbors, weights, scales, shifts, normalized: int) -> Tensor:
    if len(weights) == 0:
        raise ValueError("weights: got none, expected at least one layer")
    neighbors = check_edge_inputs(x, neighbors, weights[0])
    for depth, weight in enumerate(weights[1:], 1):
        check_floating(f"weights[{depth}]", weight, like=x)
        check_shape(f"weights[{depth}]", weight, (None, weights[depth - 1].shape[0]), "(O, previous O)")
        check_device(f"weights[{depth}]", weight, x)
    for name, values in (("scales", scales), ("shifts", shifts)):
        if len(values) != normalized:
            raise ValueError(f"{name}: got {len(values)}, expected {normalized} for {len(weights)} weights")
        for depth, value in enumerate(values):
            wider = isinstance(value, Tensor) and value.dtype == torch.float32 and x.dtype.itemsize == 2
            check_floating(f"{name}[{depth}]", value, like=None if wider else x)
            check_shape(f"{name}[{depth}]", value, (weights[depth].shape[0],), "(O,)")
            check_device(f"{name}[{depth}]", value, x)
    return neighbors


class _Layers:
    """The layers in the compute dtype, with the first one split: its output on edge (i, j) is p_i - q_j.

    With weight = [A | B] and a reference point c inside the cloud, p = A x + q and q = B (x - c), so that the
    difference loses no digits to an offset of the whole cloud.
    """

    def __init__(self, x, neighbors, weights, scales, shifts, negative_slope):
        _check_indices(neighbors, x.shape[1])
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        wide_weights, wide_scales, wide_shifts = (
            [t.to(dtype) for t in part] for part in (weights, scales, shifts)
        )
        batch, num_points, inputs = x.shape
        first = torch.arange(batch, device=x.device).view(-1, 1, 1) * num_points
        self.points = torch.where(neighbors >= 0, neighbors + first, -1).flatten(0, 1)
        wide = x.to(dtype)
        self.x = wide.reshape(-1, inputs)
        self.centered = (wide - _reference_points(wide, neighbors)).reshape(-1, inputs)
        self.own, self.neighbor = wide_weights[0][:, :inputs], wide_weights[0][:, inputs:]
        q = self.centered @ self.neighbor.T
        p = self.x @ self.own.T + q
        # What the ops on edges are given, from p on, and what narrow() goes by.
        self.edges = p, q, self.points, wide_weights[1:], wide_scales, wide_shifts, negative_slope
        self.given = x, weights, scales, shifts

    def gradients(self, *seed: Tensor | None) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        """Those of the op's inputs, in their dtypes, from the first arguments of edge_layers_backward."""
        of_p, of_q, of_weights, *grads = torch.ops.avatar_ops.edge_layers_backward(*seed, *self.edges)
        of_q = of_p + of_q
        # A point without edges adds nothing, be it NaN. The last place takes what -1 points to.
        used = torch.zeros(len(self.x) + 1, dtype=torch.bool, device=self.x.device)
        used.index_fill_(0, self.points.flatten(), True)
        used = (used[:-1] | (self.points >= 0).any(1)).unsqueeze(1)
        own = of_p.T @ torch.where(used, self.x, 0)
        neighbor = of_q.T @ torch.where(used, self.centered, 0)
        x, *given = self.given
        grads = [[torch.cat([own, neighbor], 1), *of_weights], *grads]
        return (of_p @ self.own + of_q @ self.neighbor).view(x.shape).to(x.dtype), *(
            [grad.to(like.dtype) for grad, like in zip(part, likes, strict=True)]
            for part, likes in zip(grads, given, strict=True)
        )


def _check_indices(neighbors: Tensor, num_points: int) -> None:
    bad = (neighbors < -1) | (neighbors >= num_points)
    if neighbors.device.type != "cpu":
        torch._assert_async(~bad.any())
    elif bad.any():
        b, row, slot = bad.nonzero()[0].tolist()
        raise IndexError(
            f"edge_mlp: neighbors[{b}, {row}, {slot}] = {neighbors[b, row, slot].item()}; "
            f"expected -1 (none) or an index in [0, {num_points})"
        )


def _reference_points(x: Tensor, neighbors: Tensor) -> Tensor:
    """(B, 1, C): the median of a few points of each cloud that are somebody's neighbour."""
    batch, num_points, inputs = x.shape
    if batch * num_points * inputs * neighbors.shape[2] == 0:
        return x.new_zeros(batch, 1, inputs)
    valid = neighbors >= 0
    present = valid.any(2).cumsum(1)
    wanted = present[:, -1:] * torch.arange(9, device=x.device) // 9 + 1
    rows = torch.searchsorted(present, wanted).clamp(max=num_points - 1)
    slots = valid.byte().argmax(2).gather(1, rows)
    points = neighbors.flatten(1).gather(1, rows * neighbors.shape[2] + slots)
    samples = x.gather(1, points.clamp(min=0).unsqueeze(-1).expand(-1, -1, inputs))
    usable = (points >= 0).unsqueeze(-1) & samples.isfinite()
    median = torch.where(usable, samples, float("nan")).nanmedian(1, keepdim=True).values
    return torch.where(median.isnan(), 0, median)


def _kernel(function):
    """Registers the kernel of the op of this name for any device; it runs in the dtypes that it is given."""

    def run(*args):
        device_type = next(t for t in args if isinstance(t, Tensor)).device.type
        with torch.autocast(device_type, enabled=False):
            return function(*args)

    torch.library.impl(f"avatar_ops::{function.__name__.lstrip('_')}", "default", run)
    return function


@_kernel
def _edge_mlp(x, neighbors, weights, scales, shifts, negative_slope, keep_slots):
    layers = _Layers(x, neighbors, weights, scales, shifts, negative_slope)
    output, slots = torch.ops.avatar_ops.edge_layers(*layers.edges, keep_slots)
    shape = (*x.shape[:2], output.shape[1])
    return output.view(shape).to(x.dtype), slots.view(shape if keep_slots else (0,))


@_kernel
def _edge_mlp_backward(grad, slots, x, neighbors, weights, scales, shifts, negative_slope):
    layers = _Layers(x, neighbors, weights, scales, shifts, negative_slope)
    grad = grad.flatten(0, 1).to(layers.x.dtype)
    return layers.gradients(grad.contiguous(), slots.flatten(0, 1).contiguous(), None, None)


@_kernel
def _edge_mlp_statistics(x, neighbors, weights, scales, shifts, negative_slope):
    layers = _Layers(x, neighbors, weights, scales, shifts, negative_slope)
    return torch.ops.avatar_ops.edge_layers_statistics(*layers.edges)


@_kernel
def _edge_mlp_statistics_backward(
    grad_mean, grad_variance, count, mean, x, neighbors, weights, scales, shifts, negative_slope
):
    layers = _Layers(x, neighbors, weights, scales, shifts, negative_slope)
    edges = count.clamp(min=1)
    factor = 2 * grad_variance / edges
    return layers.gradients(None, None, grad_mean / edges - factor * mean, factor)


def _fake_gradients(x, weights, scales, shifts):
    def like(tensors):
        return [t.new_empty(t.shape) for t in tensors]

    return x.new_empty(x.shape), like(weights), like(scales), like(shifts)


@torch.library.register_fake("avatar_ops::edge_mlp")
def _(x, neighbors, weights, scales, shifts, negative_slope, keep_slots):
    shape = (x.shape[0], x.shape[1], weights[-1].shape[0])
    return x.new_empty(shape), x.new_empty(shape if keep_slots else (0,), dtype=torch.int32)


@torch.library.register_fake("avatar_ops::edge_mlp_backward")
def _(grad, slots, x, neighbors, weights, scales, shifts, negative_slope):
    return _fake_gradients(x, weights, scales, shifts)


@torch.library.register_fake("avatar_ops::edge_mlp_statistics")
def _(x, neighbors, weights, scales, shifts, negative_slope):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, variance = (x.new_empty(weights[-1].shape[0], dtype=dtype) for _ in range(2))
    return mean, variance, neighbors.new_empty(())


@torch.library.register_fake("avatar_ops::edge_mlp_statistics_backward")
def _(grad_mean, grad_variance, count, mean, x, neighbors, weights, scales, shifts, negative_slope):
    return _fake_gradients(x, weights, scales, shifts)


def _setup_context(ctx, inputs, output):
    x, neighbors, weights, scales, shifts, ctx.negative_slope, ctx.kept = inputs
    ctx.layers = len(weights)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], x, neighbors, *weights, *scales, *shifts)


def _backward(ctx, grad, grad_slots):
    check_kept("edge_mlp", ctx.kept)
    slots, x, neighbors, *lists = ctx.saved_tensors
    n = ctx.layers
    grad_x, *grads = torch.ops.avatar_ops.edge_mlp_backward(
        grad, slots, x, neighbors, lists[:n], lists[n : 2 * n], lists[2 * n :], ctx.negative_slope
    )
    return grad_x, None, *grads, None, None


torch.library.register_autograd("avatar_ops::edge_mlp", _backward, setup_context=_setup_context)
forbid_second_derivative("edge_mlp_backward")


def _setup_statistics_context(ctx, inputs, output):
    x, neighbors, weights, scales, shifts, ctx.negative_slope = inputs
    mean, _, count = output
    ctx.layers = len(weights)
    ctx.mark_non_differentiable(count)
    ctx.save_for_backward(count, mean, x, neighbors, *weights, *scales, *shifts)


def _statistics_backward(ctx, grad_mean, grad_variance, grad_count):
    count, mean, x, neighbors, *lists = ctx.saved_tensors
    n = ctx.layers
    weights, scales, shifts = lists[:n], lists[n : 2 * n - 1], lists[2 * n - 1 :]
    grad_x, *grads = torch.ops.avatar_ops.edge_mlp_statistics_backward(
        grad_mean, grad_variance, count, mean, x, neighbors, weights, scales, shifts, ctx.negative_slope
    )
    return grad_x, None, *grads, None


torch.library.register_autograd(
    "avatar_ops::edge_mlp_statistics", _statistics_backward, setup_context=_setup_statistics_context
)
forbid_second_derivative("edge_mlp_statistics_backward")

# Positions of x and the weights, as in edge_conv.
autocast_to_active("edge_mlp", only=(0, 2))
autocast_to_active("edge_mlp_statistics", only=(0, 2))
