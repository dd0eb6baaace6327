"""Sums of modulated_conv2d and of its gradients: norms of filters, images times others, with their scaling."""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import define, forbid_second_derivative

define("modulated_conv2d_scale(Tensor images, Tensor others, Tensor factors) -> (Tensor scaled, Tensor sums)")
define(
    "modulated_conv2d_scale_backward(Tensor images, Tensor others, Tensor factors, Tensor grad_scaled, "
    "Tensor grad_sums) -> (Tensor grad_images, Tensor grad_others, Tensor grad_factors)"
)
# The same with images, contiguous, for the result, and the sums alone: for first derivatives on the CPU.
define("modulated_conv2d_styles_backward(Tensor(a!) images, Tensor others, Tensor factors) -> Tensor")
define("modulated_conv2d_sums_backward(Tensor images, Tensor others) -> Tensor")

# weight (O, I, k, k) -> (O, I)
define("modulated_conv2d_energy(Tensor weight) -> Tensor")


def filter_energy(weight: Tensor) -> Tensor:
    """(O, I): the sum of the squares of each filter of weight (O, I, k, k), float32 or float64."""
    if weight.device.type == "cpu":
        return torch.ops.avatar_ops.modulated_conv2d_energy(weight)
    return weight.square().sum((2, 3))


def scale_and_sum(images: Tensor, others: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """images (B, C, H, W) times factors (B, C), and the sums (B, C) over pixels of images * others.

    images and others may be narrower than factors. Differentiable any number of times.
    """
    if images.device.type == "cpu" and images.dtype == factors.dtype:
        return torch.ops.avatar_ops.modulated_conv2d_scale(images, others, factors)
    return images * per_channel(factors).to(images.dtype), pixel_products(images, others).to(factors.dtype)


def per_channel(values: Tensor) -> Tensor:
    return values.unsqueeze(-1).unsqueeze(-1)


def scale_and_sum_in_place(images: Tensor, others: Tensor, factors: Tensor) -> Tensor:
    """Multiplies images (B, C, H, W) by factors (B, C), and returns the sums (B, C) over pixels of images * others."""
    if images.device.type == "cpu" and images.dtype == factors.dtype and images.is_contiguous():
        return torch.ops.avatar_ops.modulated_conv2d_styles_backward(images, others, factors)
    sums = pixel_products(images, others).to(factors.dtype)
    images.mul_(per_channel(factors).to(images.dtype))
    return sums


def pixel_products(a: Tensor, b: Tensor) -> Tensor:
    """(B, C): sums over the pixels of a * b, without that product in memory."""
    native = a.device.type == "cpu" and a.dtype == b.dtype and a.dtype in (torch.float32, torch.float64)
    if native and not torch.is_grad_enabled():
        return torch.ops.avatar_ops.modulated_conv2d_sums_backward(a, b)
    return (a.flatten(2).unsqueeze(2) @ b.flatten(2).unsqueeze(3)).flatten(1)


@torch.library.register_fake("avatar_ops::modulated_conv2d_scale")
def _(images, others, factors):
    return images.new_empty(images.shape), factors.new_empty(factors.shape)


@torch.library.register_fake("avatar_ops::modulated_conv2d_scale_backward")
def _(images, others, factors, grad_scaled, grad_sums):
    return images.new_empty(images.shape), images.new_empty(images.shape), factors.new_empty(factors.shape)


@torch.library.register_fake("avatar_ops::modulated_conv2d_styles_backward")
def _(images, others, factors):
    return factors.new_empty(factors.shape)


@torch.library.register_fake("avatar_ops::modulated_conv2d_sums_backward")
def _(images, others):
    return images.new_empty(images.shape[:2])


forbid_second_derivative("modulated_conv2d_sums_backward")


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_scaled, grad_sums):
    images, others, factors = ctx.saved_tensors
    # The pass over all at once has no derivative of its own.
    if not (torch.is_grad_enabled() or grad_scaled is None or grad_sums is None):
        return torch.ops.avatar_ops.modulated_conv2d_scale_backward(
            images, others, factors, grad_scaled, grad_sums
        )
    grad_images = grad_others = grad_factors = None
    if grad_scaled is not None:
        grad_images, grad_factors = scale_and_sum(grad_scaled, images, factors)
    if grad_sums is not None:
        through = others * per_channel(grad_sums)
        grad_images = through if grad_images is None else grad_images + through
        grad_others = images * per_channel(grad_sums)
    return grad_images, grad_others, grad_factors


torch.library.register_autograd("avatar_ops::modulated_conv2d_scale", _backward, setup_context=_setup_context)


@torch.library.register_fake("avatar_ops::modulated_conv2d_energy")
def _(weight):
    return weight.new_empty(weight.shape[:2])


def _setup_energy_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _energy_backward(ctx, grad):
    (weight,) = ctx.saved_tensors
    return weight * per_channel(2 * grad)


torch.library.register_autograd(
    "avatar_ops::modulated_conv2d_energy", _energy_backward, setup_context=_setup_energy_context
)
