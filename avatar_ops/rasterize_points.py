"""Nearest points per pixel: schema, public function, fake, autograd."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree

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

define(
    "rasterize_points(Tensor points, Tensor radius, SymInt height, SymInt width, SymInt points_per_pixel, "
    "Tensor? lengths) -> (Tensor depths, Tensor distances, Tensor indices)"
)
define(
    "rasterize_points_backward(Tensor grad_depths, Tensor grad_distances, Tensor indices, Tensor points) "
    "-> Tensor"
)


class Fragments(NamedTuple):
    """What rasterize_points finds in each pixel, front to back; each (B, H, W, points_per_pixel)."""

    indices: Tensor
    depths: Tensor
    distances: Tensor


# For torch.export, and for saving and loading without trust in the file.
_pytree._register_namedtuple(Fragments, serialized_type_name="avatar_ops.Fragments")
torch.serialization.add_safe_globals([Fragments])


def rasterize_points(
    points: Tensor,
    image_size: tuple[int, int],
    radius: float | Tensor,
    points_per_pixel: int = 10,
    *,
    lengths: Tensor | None = None,
) -> Fragments:
    """The points nearest in depth at each pixel.

    A point covers a pixel when its z is positive and its distance to the pixel's centre, in pixels, is below
    its radius (both squared in the accumulation type). Of those that cover it, a pixel keeps the first
    points_per_pixel by ascending (depth, index). A point whose x, y, z or radius is NaN, whose x or y is
    infinite or whose radius is not positive covers nothing.

    Args:
        points: (B, N, 3) or (N, 3) float16, bfloat16, float32 or float64: x and y in pixels, x to the right
            and y downwards, the centre of pixel [row, column] at (column + 0.5, row + 0.5); depth z.
        image_size: (H, W).
        radius: in pixels; a number, or (B, N) or (N,) of the dtype of points.
        points_per_pixel: slots per pixel, any number from 0.
        lengths: (B,) int64 (or int32), of unbatched points (): later points are padding.

    Returns:
        Fragments of indices (int64), depths and distances (squared, in pixels; both in the dtype of points),
        each (B, H, W, points_per_pixel). Empty slots come last, with -1, +inf and +inf.

    Raises:
        TypeError: unsupported or mixed dtypes.
        ValueError: rank, batch or device mismatch; a negative size; a negative or NaN radius given as a
            number; a length outside [0, N] (CPU).

    Differentiable in points through depths and distances (first order). Radius and lengths only select: the
    derivative in radius is zero wherever it exists, and none flows to it.
    Source: Zwicker et al., Surface Splatting, SIGGRAPH 2001, with hard discs. Reference:
    reference.rasterize_points.
    """
    check_floating("points", points)
    check_rank("points", points, (2, 3), "(B, N, 3) or (N, 3)")
    check_shape("points", points, (*points.shape[:-1], 3), "(B, N, 3)" if points.dim() == 3 else "(N, 3)")
    height, width = _check_image_size(image_size)
    _check_size("points_per_pixel", points_per_pixel)
    if isinstance(radius, Tensor):
        check_floating("radius", radius, points)
        check_shape("radius", radius, points.shape[:-1], "(B, N)" if points.dim() == 3 else "(N,)")
        check_device("radius", radius, points)
    else:
        radius = _radius_tensor(radius, points)
    if lengths is not None:
        check_index("lengths", lengths)
        check_shape("lengths", lengths, points.shape[:-2], "(B,)" if points.dim() == 3 else "()")
        check_device("lengths", lengths, points)
        lengths = lengths.long()
    batched = points.dim() == 3
    if not batched:
        points = points.unsqueeze(0)
        radius = radius.unsqueeze(0) if radius.dim() else radius
        lengths = None if lengths is None else lengths.unsqueeze(0)
    depths, distances, indices = torch.ops.avatar_ops.rasterize_points(
        points, radius, height, width, points_per_pixel, lengths
    )
    if batched:
        return Fragments(indices, depths, distances)
    return Fragments(indices.squeeze(0), depths.squeeze(0), distances.squeeze(0))


def _check_size(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name}: got {describe(value)}, expected an int")
    if value < 0:
        raise ValueError(f"{name}: got {value}, expected 0 or more")


def _check_image_size(image_size) -> tuple[int, int]:
    if not isinstance(image_size, tuple | list):
        raise TypeError(f"image_size: got {describe(image_size)}, expected (H, W)")
    if len(image_size) != 2:
        raise ValueError(f"image_size: got {tuple(image_size)}, expected (H, W)")
    for size in image_size:
        _check_size("image_size", size)
    return tuple(image_size)


def _radius_tensor(radius, points: Tensor) -> Tensor:
    """A tensor of no dimension, from a product: a graph that fills one is compiled for that number alone."""
    if isinstance(radius, bool) or not isinstance(radius, int | float | torch.SymInt | torch.SymFloat):
        raise TypeError(f"radius: got {describe(radius)}, expected a number or a tensor")
    if not radius >= 0:
        raise ValueError(f"radius: got {radius}, expected a number from 0")
    half = points.dtype in (torch.float16, torch.bfloat16)
    return points.new_ones((), dtype=torch.float32 if half else points.dtype) * radius


@torch.library.register_fake("avatar_ops::rasterize_points")
def _(points, radius, height, width, points_per_pixel, lengths):
    shape = (points.shape[0], height, width, points_per_pixel)
    return points.new_empty(shape), points.new_empty(shape), points.new_empty(shape, dtype=torch.int64)


@torch.library.register_fake("avatar_ops::rasterize_points_backward")
def _(grad_depths, grad_distances, indices, points):
    return points.new_empty(points.shape)


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(output[2], inputs[0])


def _backward(ctx, grad_depths, grad_distances, grad_indices):
    indices, points = ctx.saved_tensors
    grad = torch.ops.avatar_ops.rasterize_points_backward(grad_depths, grad_distances, indices, points)
    return grad, None, None, None, None, None


torch.library.register_autograd("avatar_ops::rasterize_points", _backward, setup_context=_setup_context)
forbid_second_derivative("rasterize_points_backward")
autocast_to_float32("rasterize_points")
