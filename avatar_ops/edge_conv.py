"""EdgeConv, one linear map per edge, plain and batch-normalised: schemas, functions, fakes, autograd."""

from __future__ import annotations

from typing import NamedTuple

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
)

# Slots are bytes up to this many neighbours and int32 beyond, in rows padded to a multiple of COLUMN_PAD:
# kByteSlots and kColumnPad of the kernels.
BYTE_SLOTS = 255
COLUMN_PAD = 16

# slots (B, N, O padded): which neighbour gave the maximum; empty unless keep_slots.
define(
    "edge_conv(Tensor x, Tensor neighbors, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, "
    "float negative_slope, bool keep_slots) -> (Tensor output, Tensor slots)"
)
define(
    "edge_conv_backward(Tensor grad, Tensor output, Tensor slots, Tensor x, Tensor neighbors, Tensor weight, "
    "Tensor? bias, Tensor? scale, float negative_slope) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# count (), mean and variance (O,) of W e over the edges; center: the mean as the backward pass needs it.
define(
    "edge_conv_norm(Tensor x, Tensor neighbors, Tensor weight, Tensor gamma, Tensor beta, float eps, "
    "float negative_slope, bool keep_slots) "
    "-> (Tensor output, Tensor slots, Tensor count, Tensor mean, Tensor variance, Tensor center)"
)
define(
    "edge_conv_norm_backward(Tensor grad, Tensor output, Tensor slots, Tensor x, Tensor neighbors, "
    "Tensor weight, Tensor gamma, Tensor count, Tensor variance, Tensor center, float eps, "
    "float negative_slope) -> (Tensor, Tensor, Tensor, Tensor)"
)


class EdgeStatistics(NamedTuple):
    """Mean and biased variance (O,) over edges, and their number () int64."""

    mean: Tensor
    variance: Tensor
    count: Tensor


torch.utils._pytree._register_namedtuple(
    EdgeStatistics, serialized_type_name="avatar_ops.edge_conv.EdgeStatistics"
)


def check_edge_inputs(x: Tensor, neighbors: Tensor, weight: Tensor) -> Tensor:
    """Checks what every EdgeConv takes; returns the neighbours as int64."""
    check_floating("x", x)
    check_rank("x", x, (2, 3), "(B, N, C) or (N, C)")
    neighbors = check_neighbors(neighbors, x, rows=x.shape[-2])
    check_floating("weight", weight, like=x)
    check_shape("weight", weight, (None, 2 * x.shape[-1]), "(O, 2C)")
    check_device("weight", weight, x)
    return neighbors


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may come, so that what it needs is worth keeping."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def check_kept(op: str, kept: bool) -> None:
    """RuntimeError if the backward pass of a call of the bare op comes without what it needs."""
    if not kept:
        raise RuntimeError(f"avatar_ops::{op}: a gradient was asked for, but keep_slots was False")


def edge_conv(
    x: Tensor,
    neighbors: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    negative_slope: float = 0.2,
) -> Tensor:
    """EdgeConv with one linear map per edge and the maximum over the edges.

        output[b, i] = max_j act(scale * (weight [x_i ; x_i - x_j] + bias) + shift),  j in neighbors[b, i]

    where act is LeakyReLU. The map is split into products per point, so no edge is ever stored.

    Args:
        x: (B, N, C) or (N, C) float16, bfloat16, float32 or float64.
        neighbors: (B, N, K) or (N, K) int64 (or int32) in [0, N), or -1 for "none"; same device.
        weight: (O, 2C), for [x_i ; x_i - x_j] in that order.
        bias: (O,).
        scale, shift: (O,) a folded normalisation, of any sign.
        negative_slope: in [0, 1]; 1 is linear, 0 is ReLU.

    Returns:
        (B, N, O) in the dtype of x; 0 where a row has no neighbour; NaN wins.

    Raises:
        TypeError: unsupported or mixed dtypes.   ValueError: rank, shape, device or slope.
        IndexError: a neighbour outside [-1, N) (CPU).

    Differentiable in x, weight, bias, scale and shift (first order). Under autocast x and weight are cast.
    Source: Wang et al., Dynamic Graph CNN, TOG 2019, eq. 7 and 8. Reference: reference.edge_conv.
    """
    neighbors = check_edge_inputs(x, neighbors, weight)
    for name, value in (("bias", bias), ("scale", scale), ("shift", shift)):
        if value is not None:
            check_floating(name, value, like=x)
            check_shape(name, value, (weight.shape[0],), "(O,)")
            check_device(name, value, x)
    return apply_edge_conv(x, neighbors, weight, bias, scale, shift, check_slope(negative_slope))


def apply_edge_conv(x, neighbors, weight, bias, scale, shift, negative_slope) -> Tensor:
    """edge_conv on checked arguments; bias, scale and shift may be wider than x."""
    keep = needs_gradient(x, weight, bias, scale, shift)
    batched = x.dim() == 3
    if not batched:
        x, neighbors = x.unsqueeze(0), neighbors.unsqueeze(0)
    output, _ = torch.ops.avatar_ops.edge_conv(x, neighbors, weight, bias, scale, shift, negative_slope, keep)
    return output if batched else output.squeeze(0)


def edge_conv_norm(
    x: Tensor,
    neighbors: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    eps: float = 1e-5,
    negative_slope: float = 0.2,
) -> tuple[Tensor, EdgeStatistics]:
    """edge_conv with training-time batch normalisation over all edges that exist.

        h_ij = weight [x_i ; x_i - x_j]
        output[b, i] = max_j act(gamma * (h_ij - mean) / sqrt(variance + eps) + beta)

    with mean and variance per channel over the edges of the whole batch, centred before squaring.

    Args:
        x, neighbors, weight, negative_slope: as in edge_conv.
        gamma, beta: (O,) in the dtype of x, or float32 with half-precision x.
        eps: added to the variance.

    Returns:
        output: (B, N, O) in the dtype of x; 0 where a row has no neighbour.
        statistics: at least float32; they carry no gradient of their own, but that of output is the exact
            one, through the statistics too.

    Raises: as edge_conv.

    Differentiable in x, weight, gamma and beta (first order). Under autocast x and weight are cast.
    Source: Ioffe and Szegedy, Batch Normalization, ICML 2015. Reference: reference.edge_conv_norm.
    """
    neighbors = check_edge_inputs(x, neighbors, weight)
    for name, value in (("gamma", gamma), ("beta", beta)):
        wider = isinstance(value, Tensor) and value.dtype == torch.float32 and x.dtype.itemsize == 2
        check_floating(name, value, like=None if wider else x)
        check_shape(name, value, (weight.shape[0],), "(O,)")
        check_device(name, value, x)
    keep = needs_gradient(x, weight, gamma, beta)
    batched = x.dim() == 3
    if not batched:
        x, neighbors = x.unsqueeze(0), neighbors.unsqueeze(0)
    output, _, count, mean, variance, _ = torch.ops.avatar_ops.edge_conv_norm(
        x, neighbors, weight, gamma, beta, float(eps), check_slope(negative_slope), keep
    )
    return output if batched else output.squeeze(0), EdgeStatistics(mean, variance, count)


def _fake_output(x, neighbors, weight, keep_slots):
    channels = weight.shape[0]
    output = x.new_empty(x.shape[0], x.shape[1], channels)
    slot_type = torch.uint8 if neighbors.shape[2] <= BYTE_SLOTS else torch.int32
    padded = (channels + COLUMN_PAD - 1) // COLUMN_PAD * COLUMN_PAD
    shape = (x.shape[0], x.shape[1], padded) if keep_slots else (0,)
    return output, x.new_empty(shape, dtype=slot_type)


@torch.library.register_fake("avatar_ops::edge_conv")
def _(x, neighbors, weight, bias, scale, shift, negative_slope, keep_slots):
    return _fake_output(x, neighbors, weight, keep_slots)


@torch.library.register_fake("avatar_ops::edge_conv_backward")
def _(grad, output, slots, x, neighbors, weight, bias, scale, negative_slope):
    channels = weight.shape[0]
    of_bias = weight if bias is None else bias
    of_scale = weight if scale is None else scale
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        of_bias.new_empty(channels),
        of_scale.new_empty(channels),
        of_scale.new_empty(channels),
    )


@torch.library.register_fake("avatar_ops::edge_conv_norm")
def _(x, neighbors, weight, gamma, beta, eps, negative_slope, keep_slots):
    output, slots = _fake_output(x, neighbors, weight, keep_slots)
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, variance, center = (x.new_empty(weight.shape[0], dtype=compute) for _ in range(3))
    return output, slots, neighbors.new_empty(()), mean, variance, center


@torch.library.register_fake("avatar_ops::edge_conv_norm_backward")
def _(grad, output, slots, x, neighbors, weight, gamma, count, variance, center, eps, negative_slope):
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        gamma.new_empty(gamma.shape),
        gamma.new_empty(gamma.shape),
    )


def _setup_context(ctx, inputs, output):
    x, neighbors, weight, bias, scale, shift, ctx.negative_slope, ctx.kept = inputs
    ctx.given = [t is not None for t in (bias, scale, shift)]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, x, neighbors, weight, bias, scale)


def _backward(ctx, grad, grad_slots):
    check_kept("edge_conv", ctx.kept)
    grads = torch.ops.avatar_ops.edge_conv_backward(grad, *ctx.saved_tensors, ctx.negative_slope)
    optional = [g if given else None for g, given in zip(grads[2:], ctx.given, strict=True)]
    return grads[0], None, grads[1], *optional, None, None


torch.library.register_autograd("avatar_ops::edge_conv", _backward, setup_context=_setup_context)
forbid_second_derivative("edge_conv_backward")


def _setup_norm_context(ctx, inputs, output):
    x, neighbors, weight, gamma, _, ctx.eps, ctx.negative_slope, ctx.kept = inputs
    result, slots, count, mean, variance, center = output
    ctx.mark_non_differentiable(slots, count, mean, variance, center)
    ctx.save_for_backward(result, slots, x, neighbors, weight, gamma, count, variance, center)


def _norm_backward(ctx, grad, *_):
    check_kept("edge_conv_norm", ctx.kept)
    grad_x, grad_weight, grad_gamma, grad_beta = torch.ops.avatar_ops.edge_conv_norm_backward(
        grad, *ctx.saved_tensors, ctx.eps, ctx.negative_slope
    )
    return grad_x, None, grad_weight, grad_gamma, grad_beta, None, None, None


torch.library.register_autograd(
    "avatar_ops::edge_conv_norm", _norm_backward, setup_context=_setup_norm_context
)
forbid_second_derivative("edge_conv_norm_backward")

# Position of x and weight: a normalisation in float32 costs nothing and keeps its digits.
autocast_to_active("edge_conv", only=(0, 2))
autocast_to_active("edge_conv_norm", only=(0, 2))
