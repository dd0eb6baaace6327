"""Linear map, rows to add and LeakyReLU in one pass over points: schema, function, fake, autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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
define(
    "linear_act_layers(Tensor x, Tensor? beside, Tensor[] weights, Tensor[] biases, Tensor? rest, "
    "Tensor? places, Tensor? targets, float[] negative_slopes) -> Tensor"
)
define("linear_norm_fold(Tensor[] parts, float[] eps) -> Tensor[]")


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
    inputs = x.shape[-1] + _check_beside(x, beside)
    check_shape("weight", weight, (None, inputs), "(O, C)" if beside is None else "(O, C + D)")
    check_device("weight", weight, x)
    if bias is not None:
        check_floating("bias", bias, x)
        check_shape("bias", bias, (weight.shape[0],), "(O,)")
        check_device("bias", bias, x)
    places = _check_rest(x, rest, places, weight.shape[0])
    slope = check_slope(negative_slope)
    if x.dim() == 3:
        return torch.ops.avatar_ops.linear_act(x, beside, weight, bias, rest, places, slope)
    beside, rest = (None if rows is None else rows.unsqueeze(0) for rows in (beside, rest))
    y = torch.ops.avatar_ops.linear_act(x.unsqueeze(0), beside, weight, bias, rest, places, slope)
    return y.squeeze(0)


def linear_act_layers(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    negative_slopes: Sequence[float],
    *,
    beside: Tensor | None = None,
    rest: Tensor | None = None,
    places: Tensor | None = None,
    targets: Tensor | None = None,
) -> Tensor:
    """One `linear_act` after the other, on the CPU without the tensors in between where no gradient is wanted.

    `rest` with `places` goes with the first layer, `beside` with the last; at least one layer.

    Args:
        x: (B, N, C).   weights: (O_l, I_l) each.   biases: (O_l,) each.   negative_slopes: of each layer.
        beside, rest, places: as for `linear_act`, in three dimensions.
        targets: (N,) int64, the row of the result that each row becomes, every one once; its own if None.

    Returns:
        (B, N, O) of the last layer; half types keep float32 between the layers on the CPU.

    Raises:
        What `linear_act` does, of the arguments of one layer.   IndexError: targets of another kind (CPU).
    """
    slopes = [check_slope(slope) for slope in negative_slopes]
    check_floating("x", x)
    check_rank("x", x, (3,), "(B, N, C)")
    if not len(weights) == len(biases) == len(slopes) > 0:
        raise ValueError(
            f"weights: got {len(weights)} with {len(biases)} biases and {len(slopes)} slopes, expected as "
            "many of each, at least one"
        )
    if targets is not None:
        check_index("targets", targets)
        check_shape("targets", targets, (x.shape[1],), "(N,)")
        check_device("targets", targets, x)
        targets = targets.long()
    tensors = [x, beside, rest, *weights, *biases]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        last = len(slopes) - 1
        for n, (weight, bias, slope) in enumerate(zip(weights, biases, slopes, strict=True)):
            first = {"rest": rest, "places": places} if n == 0 else {}
            x = linear_act(
                x, weight, bias, negative_slope=slope, beside=beside if n == last else None, **first
            )
        return x if targets is None else _move_rows(x, targets)
    inputs = x.shape[-1]
    for n, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if n == len(slopes) - 1:
            inputs += _check_beside(x, beside)
        for name, value, shape, meaning in (
            (f"weights[{n}]", weight, (None, inputs), "(O, I)"),
            (f"biases[{n}]", bias, (weight.shape[0],), "(O,)"),
        ):
            check_floating(name, value, x)
            check_shape(name, value, shape, meaning)
            check_device(name, value, x)
        inputs = weight.shape[0]
    places = _check_rest(x, rest, places, weights[0].shape[0])
    return torch.ops.avatar_ops.linear_act_layers(
        x, beside, list(weights), list(biases), rest, places, targets, slopes
    )


def _move_rows(x: Tensor, targets: Tensor) -> Tensor:
    numbers = torch.arange(len(targets), device=targets.device)
    return x.index_select(1, torch.empty_like(numbers).scatter_(0, targets, numbers))


class NormedLayer(NamedTuple):
    """A linear map and the batch normalisation after it."""

    weight: Tensor  # (O, I)
    bias: Tensor  # (O,), as all below
    norm_weight: Tensor
    norm_bias: Tensor
    mean: Tensor
    variance: Tensor

    def fold(self, eps: float) -> tuple[Tensor, Tensor]:
        """Weight and bias that do both at once, in the dtypes of those of the linear map."""
        # Half weights are folded in float32; statistics that come in float64 stay so.
        variance = self.variance if self.variance.dtype == torch.float64 else self.variance.float()
        scale = self.norm_weight * (variance + eps).rsqrt()
        weight = self.weight * scale.unsqueeze(1)
        bias = (self.bias - self.mean) * scale + self.norm_bias
        return weight.to(self.weight.dtype), bias.to(self.bias.dtype)


def linear_norm_folds(layers: Sequence[NormedLayer], eps: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
    """`fold` of every layer, by one op where no gradient is wanted; all tensors on one device."""
    parts = [part for layer in layers for part in layer]
    wanted = torch.is_grad_enabled() and any(part.requires_grad for part in parts)
    # The op computes in one dtype.
    wide = any((part.dtype == torch.float64) != (parts[0].dtype == torch.float64) for part in parts)
    if wanted or wide or not parts:
        return [layer.fold(each) for layer, each in zip(layers, eps, strict=True)]
    folded = torch.ops.avatar_ops.linear_norm_fold(parts, list(eps))
    return list(zip(folded[::2], folded[1::2], strict=True))


def _check_beside(x: Tensor, beside: Tensor | None) -> int:
    """The columns beside those of x."""
    if beside is None:
        return 0
    check_floating("beside", beside, x)
    check_shape("beside", beside, (*x.shape[:-1], None), "(B, N, D)" if x.dim() == 3 else "(N, D)")
    check_device("beside", beside, x)
    return beside.shape[-1]


def _check_rest(x: Tensor, rest: Tensor | None, places: Tensor | None, outputs: int) -> Tensor | None:
    """The places as int64."""
    if rest is not None:
        check_floating("rest", rest, x)
        rows = x.shape[-2] if places is None else None
        check_shape("rest", rest, (*x.shape[:-2], rows, outputs), "(B, M, O)" if x.dim() == 3 else "(M, O)")
        check_device("rest", rest, x)
    if places is None:
        return None
    if rest is None:
        raise ValueError("places: got some without rest, expected rows for them to name")
    check_index("places", places)
    check_shape("places", places, (x.shape[-2],), "(N,)")
    check_device("places", places, x)
    return places.long()


@torch.library.register_fake("avatar_ops::linear_act_layers")
def _(x, beside, weights, biases, rest, places, targets, negative_slopes):
    return x.new_empty(x.shape[0], x.shape[1], weights[-1].shape[0])


def _linear_act_layers_cuda(x, beside, weights, biases, rest, places, targets, negative_slopes):
    last = len(weights) - 1
    for n, (weight, bias, slope) in enumerate(zip(weights, biases, negative_slopes, strict=True)):
        first = (rest, places) if n == 0 else (None, None)
        x = _linear_act_cuda(x, beside if n == last else None, weight, bias, *first, slope)
    return x if targets is None else _move_rows(x, targets)


torch.library.impl("avatar_ops::linear_act_layers", "CUDA", _linear_act_layers_cuda)


@torch.library.register_fake("avatar_ops::linear_norm_fold")
def _(parts, eps):
    return [part.new_empty(part.shape) for n, part in enumerate(parts) if n % 6 < 2]


def _linear_norm_fold_cuda(parts, eps):
    layers = [NormedLayer(*parts[n : n + 6]) for n in range(0, len(parts), 6)]
    return [part for layer, each in zip(layers, eps, strict=True) for part in layer.fold(each)]


torch.library.impl("avatar_ops::linear_norm_fold", "CUDA", _linear_norm_fold_cuda)


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
for _name in ("linear_act", "linear_act_layers"):
    autocast_to_active(_name)
