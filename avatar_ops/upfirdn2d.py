"""Up-sampling, FIR filter and down-sampling in one pass: schema, public function, fake, autograd."""

from __future__ import annotations

import numbers

import torch
import torch.nn.functional as F
from torch import Tensor

from ._library import autocast_to_input, check_device, check_floating, check_rank, define

# flip reverses f first. f may be of the dtype that x accumulates in.
define(
    "upfirdn2d(Tensor x, Tensor f, int up, int down, SymInt x0, SymInt x1, SymInt y0, SymInt y1, bool flip, "
    "float gain) -> Tensor"
)


def upfirdn2d(
    x: Tensor,
    f: Tensor,
    *,
    up: int = 1,
    down: int = 1,
    padding: int | tuple[int, int, int, int] = 0,
    gain: float = 1,
) -> Tensor:
    """Inserts zeros, pads, convolves with a FIR filter and keeps every down-th sample, per channel.

        z = x with up - 1 zeros after each sample (also after the last), padded
        y[b, c, i, j] = gain * sum_{u, v} f[u, v] * z[b, c, down * i + fh - 1 - u, down * j + fw - 1 - v]

    Args:
        x: (B, C, H, W) float16, bfloat16, float32 or float64.
        f: (fh, fw), or (n,) for the separable filter outer(f, f); of the dtype of x, also for half inputs.
        up, down: integers >= 1, for both axes.
        padding: what is added on all sides, or (left, right, top, bottom), after the zeros went in; negative
            values crop.
        gain: factor of the result.

    Returns:
        (B, C, H', W') with H' = (H * up + top + bottom - fh) // down + 1, and W' likewise.

    Raises:
        TypeError: unsupported or mixed dtype.   ValueError: rank, device or option; nothing left to return.

    Differentiable in x and f, any number of times.
    Source: Karras et al., Analyzing and Improving the Image Quality of StyleGAN, CVPR 2020 (its resampling
    layers); polyphase form after Vaidyanathan, Multirate Systems and Filter Banks, 1993.
    Reference: reference.upfirdn2d.
    """
    check_floating("x", x)
    check_floating("f", f, x)
    check_rank("x", x, (4,), "(B, C, H, W)")
    check_rank("f", f, (1, 2), "(fh, fw) or (n,)")
    check_device("f", f, x)
    if f.numel() == 0:
        raise ValueError(f"f: got shape {tuple(f.shape)}, expected at least one tap")
    for name, factor in (("up", up), ("down", down)):
        if not isinstance(factor, int) or factor < 1:
            raise ValueError(f"{name}: got {factor!r}, expected an integer >= 1")
    if not isinstance(gain, numbers.Real):
        raise ValueError(f"gain: got {gain!r}, expected a number")
    sides = [padding] * 4 if isinstance(padding, int | torch.SymInt) else padding
    if (
        not isinstance(sides, list | tuple)
        or len(sides) != 4
        or not all(isinstance(side, int | torch.SymInt) for side in sides)
    ):
        raise ValueError(f"padding: got {padding!r}, expected an int or (left, right, top, bottom)")
    x0, x1, y0, y1 = sides
    for axis, size, around, taps in (
        ("height", x.shape[2], y0 + y1, f.shape[0]),
        ("width", x.shape[3], x0 + x1, f.shape[-1]),
    ):
        if size * up + around < taps:
            raise ValueError(
                f"padding: got {padding!r}, with which the {axis} is {size} * {up} + {around} = "
                f"{size * up + around}, expected at least the {taps} taps of f"
            )
    return torch.ops.avatar_ops.upfirdn2d(x, f, up, down, x0, x1, y0, y1, False, gain)


@torch.library.register_fake("avatar_ops::upfirdn2d")
def _(x, f, up, down, x0, x1, y0, y1, flip, gain):
    height = (x.shape[2] * up + y0 + y1 - f.shape[0]) // down + 1
    width = (x.shape[3] * up + x0 + x1 - f.shape[-1]) // down + 1
    return x.new_empty(x.shape[0], x.shape[1], height, width)


def transposed(grad: Tensor, f: Tensor, size, up: int, down: int, sides, flip: bool, gain: float) -> Tensor:
    """Gradient of the op in its input, of spatial `size`: the reversed filter with up and down swapped."""
    x0, _, y0, _ = sides
    taps = (f.shape[-1], f.shape[0])
    before = (taps[0] - 1 - x0, taps[1] - 1 - y0)
    after = (
        size[1] * up - grad.shape[3] * down + x0 - up + 1,
        size[0] * up - grad.shape[2] * down + y0 - up + 1,
    )
    return torch.ops.avatar_ops.upfirdn2d(
        grad, f, down, up, before[0], after[0], before[1], after[1], not flip, gain
    )


def filter_gradient(
    grad: Tensor, x: Tensor, f: Tensor, up: int, down: int, sides, flip: bool, gain: float
) -> Tensor:
    """Gradient of the op in f, from differentiable ops; unlike the op it forms the padded image."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    one = torch.ones(1, 1, dtype=accumulate, device=x.device)
    padded = torch.ops.avatar_ops.upfirdn2d(x.to(accumulate), one, up, 1, *sides, False, gain)
    planes = x.shape[0] * x.shape[1]
    if planes == 0:
        return torch.zeros_like(f) + 0 * (x.sum() + grad.sum()).to(f.dtype)
    products = F.conv2d(
        padded.reshape(1, planes, *padded.shape[2:]),
        grad.to(accumulate).reshape(1, planes, *grad.shape[2:]),
        dilation=down,
    )
    total = products[0, 0, : f.shape[0], : f.shape[-1]]
    if not flip:
        total = total.flip(0, 1)
    if f.dim() == 1:
        taps = f.to(accumulate)
        total = total @ taps + total.t() @ taps
    return total.to(f.dtype)


def _setup_context(ctx, inputs, output):
    x, f, ctx.up, ctx.down, *sides, ctx.flip, ctx.gain = inputs
    ctx.sides, ctx.size = tuple(sides), x.shape[2:]
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, f)


def _backward(ctx, grad):
    x, f = ctx.saved_tensors
    options = (ctx.up, ctx.down, ctx.sides, ctx.flip, ctx.gain)
    with torch.autocast(grad.device.type, enabled=False):
        grad_x = transposed(grad, f, ctx.size, *options) if ctx.needs_input_grad[0] else None
        grad_f = filter_gradient(grad, x, f, *options) if ctx.needs_input_grad[1] else None
    return grad_x, grad_f, *[None] * 8


torch.library.register_autograd("avatar_ops::upfirdn2d", _backward, setup_context=_setup_context)
autocast_to_input("upfirdn2d")
