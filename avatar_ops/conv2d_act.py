"""Convolution, bias and activation in one: what modulated_conv2d is without styles, for plain layers on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ._library import define, reached_inputs, tensor_inputs
from ._shared_conv2d import Geometry, convolve, convolve_backward, winograd_pays
from ._small_conv2d import small_convolve, small_pays
from .bias_act import activation_options, bias_act, sign_from_output
from .modulated_conv2d import _geometry, filter_padding, output_size
from .upfirdn2d import upfirdn2d

# f sums to 1; the geometry is that of Geometry.
define(
    "conv2d_act(Tensor x, Tensor weight, Tensor? f, Tensor? bias, int up, int down, int before, bool flip, "
    "float filter_gain, int height, int width, float slope, float gain) -> Tensor"
)


def conv2d_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int | None = None,
    f: Tensor | None = None,
    activation: str = "linear",
    gain: float | None = None,
) -> Tensor:
    """A convolution and bias_act, the former with a filter as modulated_conv2d with down=2.

    It takes Winograd's form where modulated_conv2d does, and so do its gradients, any number of times.

    Args:
        x: (B, I, H, W).
        weight: (O, I, k, k), k odd.
        bias: (O,).
        stride: 2 with f.
        padding: of x, default k // 2; f adds what keeps the size.
        f: (n,), separable and summing to 1, applied to x first; not differentiated.
        activation, gain: as in bias_act.

    Returns:
        (B, O, H', W').
    """
    slope, factor, _ = activation_options(activation, gain, None)
    k, taps = weight.shape[2], 0 if f is None else f.shape[0]
    padding = k // 2 if padding is None else padding
    fits = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and k == 3
    fits = fits and stride == (1 if f is None else 2)
    fits = fits and (slope == 1 or sign_from_output(factor, None))
    if fits and not torch.is_autocast_enabled("cpu"):
        size = output_size(x.shape[2:], k, taps, padding, 1, stride)
        geometry = _geometry(k, f, padding, 1, stride)
        return torch.ops.avatar_ops.conv2d_act(x, weight, f, bias, *geometry, *size, slope, factor)
    if f is not None:
        x, padding = upfirdn2d(x, f, padding=filter_padding(k, taps, padding, 1)), 0
    return bias_act(
        F.conv2d(x, weight, stride=stride, padding=padding), bias, activation=activation, gain=gain
    )


def _composed(x, weight, f, bias, up, down, before, flip, filter_gain, height, width, slope, gain):
    geometry, size = Geometry(up, down, before, flip, filter_gain), (height, width)
    is_small = small_pays(x, weight, geometry)
    if x.numel() and not is_small and winograd_pays(x, weight, f, geometry, size):
        y = x.new_empty(x.shape[0], weight.shape[0], *size)
        torch.ops.avatar_ops.modulated_conv2d_winograd(
            x.contiguous(), weight.contiguous(), None, None, None, bias, y, None,
            None if f is None else f.contiguous(), *geometry, slope, gain, None,
        )  # fmt: skip
        return y
    convolution = small_convolve(x, weight, None, f, geometry, size) if is_small else None
    y = convolve(x, weight, f, geometry, size).contiguous() if convolution is None else convolution
    torch.ops.avatar_ops.modulated_conv2d_epilogue(y, None, None, None, bias, slope, gain, None)
    return y


torch.library.impl("avatar_ops::conv2d_act", "CPU", _composed)


@torch.library.register_fake("avatar_ops::conv2d_act")
def _(x, weight, f, bias, up, down, before, flip, filter_gain, height, width, slope, gain):
    return x.new_empty(x.shape[0], weight.shape[0], height, width)


@register_flop_formula(torch.ops.avatar_ops.conv2d_act)
def _(x_shape, weight_shape, *_, out_shape=None, **__) -> int:
    """As torch counts its convolutions; the filter is not counted."""
    batch, outputs, height, width = out_shape
    return 2 * batch * outputs * height * width * weight_shape[1] * weight_shape[2] * weight_shape[3]


def _setup_context(ctx, inputs, output):
    x, weight, f, _, *geometry, _, _, ctx.slope, ctx.gain = inputs
    ctx.geometry, ctx.tensors = Geometry(*geometry), tensor_inputs(inputs)
    ctx.save_for_backward(x, weight, f, None if ctx.slope == 1 else output)


def _backward(ctx, grad):
    x, weight, f, saved = ctx.saved_tensors
    need_x, need_weight, _, need_bias = reached_inputs(ctx, ctx.tensors)[:4]
    grad, grad_bias = torch.ops.avatar_ops.bias_act_backward(
        grad, saved, None, need_bias, ctx.slope, ctx.gain, None
    )
    grad_x, grad_weight, _ = convolve_backward(
        grad, None, x, None, weight, f, ctx.geometry, (need_x, need_weight, False)
    )
    return grad_x, grad_weight, None, grad_bias if need_bias else None, *[None] * 9


torch.library.register_autograd("avatar_ops::conv2d_act", _backward, setup_context=_setup_context)
