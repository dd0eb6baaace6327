"""Linear map, rows to add and LeakyReLU in one pass over points: schema, function, fake, autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._library import (
    autocast_to_active,
    check_device,
    check_floating,
    check_index,
    check_rank,
    check_shape,
    check_slope,
    define,
)

define(
    "linear_act(Tensor x, Tensor? beside, Tensor weight, Tensor? bias, Tensor? rest, Tensor? places, "
    "float negative_slope) -> Tensor"
)


def linear_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    beside: Tensor | None = None,
    rest: Tensor | None = None,
    places: Tensor | None = None,
    negative_slope: float = 1.0,
) -> Tensor:
    """A linear map of points, what other rows add to it, and LeakyReLU, without a tensor in between.

        y[b, n] = LeakyReLU(weight [x[b, n] ; beside[b, n]] + bias + rest[b, places[n]])

    Args:
        x: (B, N, C) or (N, C) float16, bfloat16, float32 or float64.
        weight: (O, C + D), D = 0 without `beside`.   bias: (O,).
        beside: (B, N, D) or (N, D).
        rest: (B, M, O) or (M, O).   places: (N,) int64 (or int32) in [0, M); without them M = N, row by row.
        negative_slope: of LeakyReLU, in [0, 1]; 1 leaves the sum as it is.

    Returns:
        (B, N, O) in the dtype of x; half types are summed in float32 on the CPU.

    Raises:
        TypeError: a dtype.   ValueError: a shape, device or option.   IndexError: a place outside [0, M) (CPU).

    Differentiable in x, weight, bias, beside and rest any number of times.
    Source: the shared layers of Hu et al., RandLA-Net, CVPR 2020. Reference: reference.linear_act.
    """
    check_floating("x", x)
    check_rank("x", x, (2, 3), "(B, N, C) or (N, C)")
    check_floating("weight", weight, x)
    inputs = x.shape[-1]
    if beside is not None:
        check_floating("beside", beside, x)
        check_shape("beside", beside, (*x.shape[:-1], None), "(B, N, D)" if x.dim() == 3 else "(N, D)")
        inputs += beside.shape[-1]
    check_shape("weight", weight, (None, inputs), "(O, C)" if beside is None else "(O, C + D)")
    outputs = weight.shape[0]
    if bias is not None:
        check_floating("bias", bias, x)
        check_shape("bias", bias, (outputs,), "(O,)")
    if rest is not None:
        check_floating("rest", rest, x)
        rows = x.shape[-2] if places is None else None
        check_shape("rest", rest, (*x.shape[:-2], rows, outputs), "(B, M, O)" if x.dim() == 3 else "(M, O)")
    if places is not None:
        if rest is None:
            raise ValueError("places: got some without rest, expected rows for them to name")
        check_index("places", places)
        check_shape("places", places, (x.shape[-2],), "(N,)")
        places = places.long()
    others = {"weight": weight, "bias": bias, "beside": beside, "rest": rest, "places": places}
    for name, value in others.items():
        if value is not None:
            check_device(name, value, x)
    slope = check_slope(negative_slope)
    if x.dim() == 3:
        return torch.ops.avatar_ops.linear_act(x, beside, weight, bias, rest, places, slope)
    beside, rest = (None if rows is None else rows.unsqueeze(0) for rows in (beside, rest))
    y = torch.ops.avatar_ops.linear_act(x.unsqueeze(0), beside, weight, bias, rest, places, slope)
    return y.squeeze(0)


@torch.library.register_fake("avatar_ops::linear_act")
def _(x, beside, weight, bias, rest, places, negative_slope):
    return x.new_empty(x.shape[0], x.shape[1], weight.shape[0])


def _linear_act_cuda(x, beside, weight, bias, rest, places, negative_slope):
    y = F.linear(x if beside is None else torch.cat([x, beside], -1), weight, bias)
    if rest is not None:
        y = y + (rest if places is None else rest.index_select(1, places))
    return F.leaky_relu(y, negative_slope, inplace=True)


torch.library.impl("avatar_ops::linear_act", "CUDA", _linear_act_cuda)


def _setup_context(ctx, inputs, output):
    x, beside, weight, bias, rest, places, ctx.slope = inputs
    ctx.has_bias, ctx.rest_rows = bias is not None, None if rest is None else rest.shape[1]
    ctx.save_for_backward(x, beside, weight, places, None if ctx.slope == 1 else output)


def _backward(ctx, grad):
    x, beside, weight, places, output = ctx.saved_tensors
    need_x, need_beside, need_weight, need_bias, need_rest = ctx.needs_input_grad[:5]
    if output is not None:
        grad = torch.where(output > 0, grad, grad * ctx.slope)
    grad_rest = grad if need_rest else None
    if need_rest and places is not None:
        zeros = grad.new_zeros(grad.shape[0], ctx.rest_rows, grad.shape[2])
        grad_rest = zeros.index_add(1, places, grad)
    own = x.shape[-1]
    parts = [x] if beside is None else [x, beside]
    rows = grad.flatten(0, 1).t()
    return (
        grad @ weight[:, :own] if need_x else None,
        grad @ weight[:, own:] if need_beside else None,
        torch.cat([rows @ part.flatten(0, 1) for part in parts], 1) if need_weight else None,
        grad.sum((0, 1)) if ctx.has_bias and need_bias else None,
        grad_rest,
        None,
        None,
    )


torch.library.register_autograd("avatar_ops::linear_act", _backward, setup_context=_setup_context)
autocast_to_active("linear_act")
