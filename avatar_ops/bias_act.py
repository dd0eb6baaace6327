"""Bias, activation, gain and clamp in one pass: schema, public function, fakes, autograd."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

from ._library import (
    autocast_to_input,
    check_device,
    check_floating,
    check_option,
    check_shape,
    define,
)

# Slopes of the activations for negative values; gains that keep the variance of normal values.
SLOPES = {"linear": 1.0, "lrelu": 0.2}
DEFAULT_GAINS = {"linear": 1.0, "lrelu": 2**0.5}

define("bias_act(Tensor x, Tensor? bias, float slope, float gain, float? clamp) -> Tensor")
define(
    "bias_act_backward(Tensor grad, Tensor? saved, Tensor? bias, bool sum_bias, float slope, float gain, "
    "float? clamp) -> (Tensor grad_x, Tensor grad_bias)"
)


def bias_act(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str,
    gain: float | None = None,
    clamp: float | None = None,
) -> Tensor:
    """Adds a bias per channel, activates, multiplies by a gain and clamps, in one pass.

        y[b, c, ...] = clip(activation(x[b, c, ...] + bias[c]) * gain, -clamp, clamp)

    Args:
        x: (B, C, ...) float16, bfloat16, float32 or float64, of any rank from 2 on.
        bias: (C,) in the dtype of x, or None.
        activation: "linear" or "lrelu" (leaky ReLU with slope 0.2).
        gain: default sqrt(2) for lrelu, else 1.
        clamp: the largest magnitude, >= 0, or None. NaN stays NaN.

    Returns:
        A tensor of the shape and dtype of x.

    Raises:
        TypeError: unsupported or mixed dtype.   ValueError: rank, shape, device or option.

    Differentiable in x and bias, any number of times; where |y| = clamp the gradient is 0.
    Source: Karras et al., Analyzing and Improving the Image Quality of StyleGAN, CVPR 2020.
    Reference: reference.bias_act.
    """
    check_floating("x", x)
    if x.dim() < 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (B, C, ...)")
    check_bias(bias, x, x.shape[1])
    slope, gain, clamp = activation_options(activation, gain, clamp)
    return torch.ops.avatar_ops.bias_act(x, bias, slope, gain, clamp)


def check_bias(bias: Tensor | None, x: Tensor, channels: int) -> None:
    """Checks a bias (channels,) against x."""
    if bias is None:
        return
    check_floating("bias", bias, x)
    check_shape("bias", bias, (channels,), "(C,)")
    check_device("bias", bias, x)


def activation_options(
    activation: str, gain: float | None, clamp: float | None
) -> tuple[float, float, float | None]:
    """Checks the options and returns (slope, gain, clamp) as the ops take them."""
    check_option("activation", activation, tuple(SLOPES))
    if gain is None:
        gain = DEFAULT_GAINS[activation]
    elif not isinstance(gain, numbers.Real):
        raise ValueError(f"gain: got {gain!r}, expected a number or None")
    if clamp is not None and not (isinstance(clamp, numbers.Real) and clamp >= 0):
        raise ValueError(f"clamp: got {clamp!r}, expected a number >= 0 or None")
    return SLOPES[activation], float(gain), None if clamp is None else float(clamp)


def sign_from_output(gain: float, clamp: float | None) -> bool:
    """Whether outputs show the signs of what was activated: no clamp, and no underflow or change of sign."""
    return clamp is None and gain >= 1


@torch.library.register_fake("avatar_ops::bias_act")
def _(x, bias, slope, gain, clamp):
    return x.new_empty(x.shape)


@torch.library.register_fake("avatar_ops::bias_act_backward")
def _(grad, saved, bias, sum_bias, slope, gain, clamp):
    return grad.new_empty(grad.shape), grad.new_empty(grad.shape[1] if sum_bias else 0)


def _setup_context(ctx, inputs, output):
    x, bias, ctx.slope, ctx.gain, ctx.clamp = inputs
    if ctx.slope == 1 and ctx.clamp is None:
        saved = bias = None
    elif sign_from_output(ctx.gain, ctx.clamp):
        saved, bias = output, None
    else:
        saved = x
    ctx.save_for_backward(saved, bias)


def _backward(ctx, grad):
    saved, bias = ctx.saved_tensors
    sum_bias = ctx.needs_input_grad[1]
    grad_x, grad_bias = torch.ops.avatar_ops.bias_act_backward(
        grad, saved, bias, sum_bias, ctx.slope, ctx.gain, ctx.clamp
    )
    return grad_x, grad_bias if sum_bias else None, None, None, None


def _setup_backward_context(ctx, inputs, output):
    _, saved, bias, ctx.sum_bias, ctx.slope, ctx.gain, ctx.clamp = inputs
    ctx.save_for_backward(saved, bias)


def _backward_backward(ctx, grad_grad_x, grad_grad_bias):
    # The gradient is linear in `grad`, and piecewise constant in the rest.
    saved, bias = ctx.saved_tensors
    total = grad_grad_x
    if ctx.sum_bias:
        total = total + grad_grad_bias.view(1, -1, *[1] * (total.dim() - 2))
    grad, _ = torch.ops.avatar_ops.bias_act_backward(
        total, saved, bias, False, ctx.slope, ctx.gain, ctx.clamp
    )
    return grad, *[None] * 6


torch.library.register_autograd("avatar_ops::bias_act", _backward, setup_context=_setup_context)
torch.library.register_autograd(
    "avatar_ops::bias_act_backward", _backward_backward, setup_context=_setup_backward_context
)
autocast_to_input("bias_act")
