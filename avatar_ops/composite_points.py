"""Front-to-back compositing of the points at each pixel: schema, public function, fake, autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._library import (
    autocast_to_float32,
    check_device,
    check_floating,
    check_index,
    check_rank,
    check_shape,
    define,
    describe,
    forbid_second_derivative,
)
from .rasterize_points import Fragments

define("composite_points(Tensor indices, Tensor features, Tensor alphas) -> (Tensor image, Tensor opacity)")
define(
    "composite_points_backward_features(Tensor grad_image, Tensor indices, Tensor alphas, SymInt num_points) "
    "-> Tensor"
)
define(
    "composite_points_backward_alphas(Tensor grad_image, Tensor grad_opacity, Tensor indices, "
    "Tensor features, Tensor alphas) -> Tensor"
)


def composite_points(
    fragments: Fragments | Sequence[Tensor], features: Tensor, alphas: Tensor
) -> tuple[Tensor, Tensor]:
    """Composites the features of the points at each pixel, front to back.

        image[b, :, y, x] = sum_l a_l prod_{m<l} (1 - a_m) features[b, indices[b, y, x, l]]

    with a = alphas[b, y, x]; the accumulated opacity is the same sum with features 1. Empty slots count
    nothing, whatever their alpha; alphas outside [0, 1] follow the formula.

    Args:
        fragments: what rasterize_points returned, or (indices, depths, distances); only indices are read,
            (B, H, W, K) or (H, W, K) int64 (or int32) in [0, N), or -1 for "none".
        features: (B, N, C) or (N, C) float16, bfloat16, float32 or float64.
        alphas: (B, H, W, K) or (H, W, K) opacity of each slot, in the dtype of features.

    Returns:
        image: (B, C, H, W) in the dtype of features.
        opacity: (B, 1, H, W) in the dtype of features.

    Raises:
        TypeError: unsupported or mixed dtypes (under autocast all but float64 may mix).
        ValueError: rank, batch or device mismatch.   IndexError: an index outside [-1, N) (CPU).

    Differentiable in features and alphas (first order), also at alpha = 1.
    Source: Porter and Duff, Compositing Digital Images, SIGGRAPH 1984. Reference:
    reference.composite_points.
    """
    if not isinstance(fragments, tuple | list) or len(fragments) != 3:
        raise TypeError(f"fragments: got {describe(fragments)}, expected (indices, depths, distances)")
    indices = fragments[0]
    check_floating("features", features)
    check_rank("features", features, (2, 3), "(B, N, C) or (N, C)")
    check_index("fragments.indices", indices)
    slots, meaning = ((None,) * 3, "(H, W, K)")
    if features.dim() == 3:
        slots, meaning = ((features.shape[0], *slots), "(B, H, W, K)")
    check_shape("fragments.indices", indices, slots, meaning)
    check_device("fragments.indices", indices, features)
    check_floating("alphas", alphas, features)
    check_shape("alphas", alphas, indices.shape, meaning)
    check_device("alphas", alphas, features)
    indices = indices.long()
    if features.dim() == 3:
        return torch.ops.avatar_ops.composite_points(indices, features, alphas)
    image, opacity = torch.ops.avatar_ops.composite_points(
        indices.unsqueeze(0), features.unsqueeze(0), alphas.unsqueeze(0)
    )
    return image.squeeze(0), opacity.squeeze(0)


@torch.library.register_fake("avatar_ops::composite_points")
def _(indices, features, alphas):
    batch, height, width, _ = indices.shape
    image = features.new_empty(batch, features.shape[2], height, width)
    return image, features.new_empty(batch, 1, height, width)


@torch.library.register_fake("avatar_ops::composite_points_backward_features")
def _(grad_image, indices, alphas, num_points):
    return grad_image.new_empty(grad_image.shape[0], num_points, grad_image.shape[1])


@torch.library.register_fake("avatar_ops::composite_points_backward_alphas")
def _(grad_image, grad_opacity, indices, features, alphas):
    return alphas.new_empty(alphas.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_image, grad_opacity):
    indices, features, alphas = ctx.saved_tensors
    grad_features = grad_alphas = None
    if ctx.needs_input_grad[1]:
        grad_features = torch.ops.avatar_ops.composite_points_backward_features(
            grad_image, indices, alphas, features.shape[1]
        )
    if ctx.needs_input_grad[2]:
        grad_alphas = torch.ops.avatar_ops.composite_points_backward_alphas(
            grad_image, grad_opacity, indices, features, alphas
        )
    return None, grad_features, grad_alphas


torch.library.register_autograd("avatar_ops::composite_points", _backward, setup_context=_setup_context)
forbid_second_derivative("composite_points_backward_features")
forbid_second_derivative("composite_points_backward_alphas")
autocast_to_float32("composite_points")
