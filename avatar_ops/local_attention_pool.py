"""Attentive pooling over neighbours and their positions: schema, public function, fake, autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._library import (
    autocast_to_active,
    check_device,
    check_floating,
    check_neighbors,
    check_rank,
    check_shape,
    check_slope,
    define,
    forbid_second_derivative,
    launch_with_triton,
)

define(
    "local_attention_pool(Tensor points, Tensor features, Tensor neighbors, Tensor[] position_weight,"
    " Tensor[] position_bias, Tensor score_weight, float negative_slope, bool save_statistics)"
    " -> (Tensor pooled, Tensor statistics)"
)
define(
    "local_attention_pool_backward(Tensor grad, Tensor points, Tensor features, Tensor neighbors,"
    " Tensor[] position_weight, Tensor[] position_bias, Tensor score_weight, Tensor pooled,"
    " Tensor statistics, float negative_slope, bool points_gradient) -> (Tensor, Tensor, Tensor, Tensor[])"
)


def local_attention_pool(
    points: Tensor,
    features: Tensor,
    neighbors: Tensor,
    position_weight: Tensor | Sequence[Tensor],
    position_bias: Tensor | Sequence[Tensor],
    score_weight: Tensor,
    *,
    negative_slope: float = 0.2,
) -> Tensor:
    """Attention over each point's neighbours, weighed per channel, with a learned code of their positions.

        e = [p_i ; p_j ; p_i - p_j ; |p_i - p_j|]    of the edge to neighbour j
        r = LeakyReLU(position_weight e + position_bias), once per layer
        h = [f_j ; r],   s = softmax over the neighbours of (score_weight h),   result = sum s * h

    No tensor of channels over edges is formed, forward or backward: memory is O(N (C + P)), besides the
    neighbours and, on CUDA, their order by the point that they lead to. Fastest where points near each other
    follow each other, as `PointIndex.arranged` orders them.

    Args:
        points: (B, N, D) or (N, D) float16, bfloat16, float32 or float64, any D >= 1.
        features: (B, N, C) or (N, C), same dtype.
        neighbors: (B, N, K) or (N, K) int64 (or int32) in [0, N), or -1 for "none"; same device.
        position_weight, position_bias: (P, 3 D + 1) and (P,), or equally long sequences of layers
            (P1, 3 D + 1), (P2, P1), ..., (P, ...) and (P1,), (P2,), ..., (P,).
        score_weight: (C + P, C + P).
        negative_slope: of every LeakyReLU, in [0, 1].

    Returns:
        (B, N, C + P) in the dtype of points; 0 where a point has no neighbour.

    Raises:
        TypeError: unsupported or mixed dtypes.   ValueError: rank, shape, batch or device mismatch, slope;
        on CUDA, a position layer of more than 128 outputs.
        IndexError: a neighbour outside [-1, N) (CPU).

    Differentiable (first order) in everything floating; the gradient of the distance at 0 is 0.
    Source: Hu et al., RandLA-Net, CVPR 2020, section 3.3. Reference: reference.local_attention_pool.
    """
    check_floating("points", points)
    check_rank("points", points, (2, 3), "(B, N, D) or (N, D)")
    if points.shape[-1] < 1:
        raise ValueError(f"points: got shape {tuple(points.shape)}, expected at least one dimension D")
    check_floating("features", features, points)
    lead = (*points.shape[:-1],)
    check_shape("features", features, (*lead, None), "(B, N, C)" if len(lead) == 2 else "(N, C)")
    check_device("features", features, points)
    neighbors = check_neighbors(neighbors, points, rows=lead[-1])
    weights, biases = check_position_layers(position_weight, position_bias, points)
    if not weights:
        raise ValueError("position_weight: got an empty sequence, expected at least one layer")
    width = features.shape[-1] + weights[-1].shape[0]
    check_floating("score_weight", score_weight, points)
    check_shape("score_weight", score_weight, (width, width), "(C + P, C + P)")
    check_device("score_weight", score_weight, points)
    check_slope(negative_slope)
    differentiated = (points, features, score_weight, *weights, *biases)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in differentiated)
    if points.dim() == 2:
        points, features, neighbors = points.unsqueeze(0), features.unsqueeze(0), neighbors.unsqueeze(0)
    pooled, _ = torch.ops.avatar_ops.local_attention_pool(
        points, features, neighbors, weights, biases, score_weight, negative_slope, save
    )
    return pooled if len(lead) == 2 else pooled.squeeze(0)


def check_position_layers(weight, bias, points: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The layers of a position network on `points` as lists, checked."""
    weights = [weight] if isinstance(weight, Tensor) else list(weight)
    biases = [bias] if isinstance(bias, Tensor) else list(bias)
    if len(weights) != len(biases):
        raise ValueError(
            f"position_bias: got {len(biases)} layers, expected {len(weights)} as position_weight has"
        )
    columns = 3 * points.shape[-1] + 1
    for layer, (w, b) in enumerate(zip(weights, biases, strict=True)):
        place = "" if isinstance(weight, Tensor) else f"[{layer}]"
        check_floating(f"position_weight{place}", w, points)
        check_floating(f"position_bias{place}", b, points)
        meaning = "(P, 3 D + 1)" if layer == 0 else "(out, out of the layer before)"
        check_shape(f"position_weight{place}", w, (None, columns), meaning)
        columns = w.shape[0]
        check_shape(f"position_bias{place}", b, (columns,), "(P,)")
        check_device(f"position_weight{place}", w, points)
        check_device(f"position_bias{place}", b, points)
    return weights, biases


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


@torch.library.register_fake("avatar_ops::local_attention_pool")
def _(points, features, neighbors, weights, biases, score_weight, negative_slope, save_statistics):
    batch, rows = points.shape[:2]
    width = score_weight.shape[0]
    saved = points.new_empty(
        batch, rows, width if save_statistics else 0, dtype=_accumulation_dtype(points.dtype)
    )
    return points.new_empty(batch, rows, width), saved


@torch.library.register_fake("avatar_ops::local_attention_pool_backward")
def _(
    grad,
    points,
    features,
    neighbors,
    weights,
    biases,
    score_weight,
    pooled,
    statistics,
    negative_slope,
    points_gradient,
):
    batch, rows, dims = points.shape
    return (
        points.new_empty(batch if points_gradient else 0, rows, dims),
        features.new_empty(features.shape),
        score_weight.new_empty(score_weight.shape),
        [t.new_empty(t.shape) for t in (*weights, *biases)],
    )


def _setup_context(ctx, inputs, output):
    points, features, neighbors, weights, biases, score_weight, ctx.slope, ctx.saved_statistics = inputs
    ctx.depth = len(weights)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(points, features, neighbors, score_weight, *output, *weights, *biases)


def _backward(ctx, grad, grad_statistics):
    if not ctx.saved_statistics:
        raise RuntimeError("local_attention_pool: called with save_statistics=False, which has no derivative")
    points, features, neighbors, score_weight, pooled, statistics, *layers = ctx.saved_tensors
    weights, biases = layers[: ctx.depth], layers[ctx.depth :]
    wants_points = ctx.needs_input_grad[0]
    grad_points, grad_features, grad_score, grad_layers = torch.ops.avatar_ops.local_attention_pool_backward(
        grad,
        points,
        features,
        neighbors,
        weights,
        biases,
        score_weight,
        pooled,
        statistics,
        ctx.slope,
        wants_points,
    )
    return (
        grad_points if wants_points else None,
        grad_features,
        None,
        grad_layers[: ctx.depth],
        grad_layers[ctx.depth :],
        grad_score,
        None,
        None,
    )


torch.library.register_autograd("avatar_ops::local_attention_pool", _backward, setup_context=_setup_context)
forbid_second_derivative("local_attention_pool_backward")
autocast_to_active("local_attention_pool")
launch_with_triton("local_attention_pool", "local_attention_pool", "local_attention_pool_backward")
