"""Mean and covariance of the position network's output over all edges: what batch normalisation of a next
layer needs, without a tensor over edges. Schema, function, fake, autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._library import (
    autocast_to_float32,
    check_floating,
    check_neighbors,
    check_rank,
    check_slope,
    define,
    forbid_second_derivative,
    launch_with_triton,
)
from .local_attention_pool import check_position_layers

define(
    "edge_moments(Tensor points, Tensor neighbors, Tensor[] position_weight, Tensor[] position_bias,"
    " float negative_slope) -> (Tensor mean, Tensor covariance, Tensor count)"
)
define(
    "edge_moments_backward(Tensor grad_mean, Tensor grad_covariance, Tensor points, Tensor neighbors,"
    " Tensor[] position_weight, Tensor[] position_bias, Tensor mean, Tensor count, float negative_slope,"
    " bool points_gradient) -> (Tensor, Tensor[])"
)


def edge_moments(
    points: Tensor,
    neighbors: Tensor,
    position_weight: Sequence[Tensor] = (),
    position_bias: Sequence[Tensor] = (),
    *,
    negative_slope: float = 0.2,
) -> tuple[Tensor, Tensor, Tensor]:
    """First and second moments, over all edges, of the position network of `local_attention_pool`.

    The input of a linear layer `w` on those numbers has mean `w mean + b` and, per channel, variance
    `w covariance w`, whatever the number of edges.

    Args:
        points: (B, N, D) or (N, D) float16, bfloat16, float32 or float64, any D >= 1.
        neighbors: (B, N, K) or (N, K) int64 (or int32) in [0, N), or -1 for "none".
        position_weight, position_bias: as in `local_attention_pool`; without layers the numbers are the
            3 D + 1 of the code itself.
        negative_slope: of every LeakyReLU, in [0, 1].

    Returns:
        mean (P,), covariance (P, P) divided by the number of edges, and that number (), all float64; zeros
        where there is no edge. Deviations are taken before they are squared.

    Raises:
        ValueError: as local_attention_pool; on CUDA, more than 128 of the numbers, or outputs of a layer.

    Differentiable (first order) in points, weights and biases, through mean and covariance.
    Reference: reference.edge_moments.
    """
    check_floating("points", points)
    check_rank("points", points, (2, 3), "(B, N, D) or (N, D)")
    neighbors = check_neighbors(neighbors, points, rows=points.shape[-2])
    weights, biases = check_position_layers(position_weight, position_bias, points)
    check_slope(negative_slope)
    if points.dim() == 2:
        points, neighbors = points.unsqueeze(0), neighbors.unsqueeze(0)
    return torch.ops.avatar_ops.edge_moments(points, neighbors, weights, biases, negative_slope)


@torch.library.register_fake("avatar_ops::edge_moments")
def _(points, neighbors, weights, biases, negative_slope):
    width = weights[-1].shape[0] if weights else 3 * points.shape[2] + 1

    def empty(*shape):
        return points.new_empty(shape, dtype=torch.float64)

    return empty(width), empty(width, width), empty()


@torch.library.register_fake("avatar_ops::edge_moments_backward")
def _(grad_mean, grad_covariance, points, neighbors, weights, biases, mean, count, slope, points_gradient):
    batch, rows, dims = points.shape
    grad_points = points.new_empty(batch if points_gradient else 0, rows, dims)
    return grad_points, [t.new_empty(t.shape) for t in (*weights, *biases)]


def _setup_context(ctx, inputs, output):
    points, neighbors, weights, biases, ctx.slope = inputs
    mean, _, count = output
    ctx.depth = len(weights)
    ctx.mark_non_differentiable(count)
    ctx.save_for_backward(points, neighbors, mean, count, *weights, *biases)


def _backward(ctx, grad_mean, grad_covariance, grad_count):
    points, neighbors, mean, count, *layers = ctx.saved_tensors
    wants_points = ctx.needs_input_grad[0]
    grad_points, grad_layers = torch.ops.avatar_ops.edge_moments_backward(
        grad_mean,
        grad_covariance,
        points,
        neighbors,
        layers[: ctx.depth],
        layers[ctx.depth :],
        mean,
        count,
        ctx.slope,
        wants_points,
    )
    return (
        grad_points if wants_points else None,
        None,
        grad_layers[: ctx.depth],
        grad_layers[ctx.depth :],
        None,
    )


torch.library.register_autograd("avatar_ops::edge_moments", _backward, setup_context=_setup_context)
forbid_second_derivative("edge_moments_backward")
autocast_to_float32("edge_moments")
launch_with_triton("edge_moments", "edge_moments", "edge_moments_backward")
