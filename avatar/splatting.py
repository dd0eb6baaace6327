"""Points to pixels: discs of falling opacity, composited front to back on white."""

from dataclasses import dataclass

import torch
from torch import Tensor

import avatar_ops
from avatar.camera import Camera, ndc_to_pixels


@dataclass
class Splats:
    """Which points B frames see, and the picture of their colours."""

    image: Tensor  # (B, 3, H, W), composited on white
    mask: Tensor  # (B, 1, H, W)
    fragments: avatar_ops.Fragments
    alphas: Tensor  # (B, H, W, points_per_pixel), 0 in empty slots


def splat(
    pixels: Tensor, image_size: tuple[int, int], radius: float, points_per_pixel: int
) -> tuple[avatar_ops.Fragments, Tensor]:
    """The nearest points at every pixel and their opacities 1 - d^2 / r^2.

    Args:
        pixels: (B, N, 3) x and y in pixels, depth.   radius: pixels.

    Returns:
        fragments, alphas (B, H, W, points_per_pixel), 0 in empty slots.
    """
    fragments = avatar_ops.rasterize_points(pixels, image_size, radius, points_per_pixel)
    empty = fragments.indices < 0
    distances = torch.where(empty, 0.0, fragments.distances)
    return fragments, torch.where(empty, 0.0, 1 - distances / radius**2)


def draw_points(
    posed: Tensor, colors: Tensor, camera: Camera, radius: float, points_per_pixel: int
) -> Splats:
    """Picture of posed points (B, N, 3) with colours (B, N, 3); `radius` in [-1, 1] image coordinates."""
    pixels = camera.project(posed)
    radius = ndc_to_pixels(radius, camera.image_size)
    fragments, alphas = splat(pixels, camera.image_size, radius, points_per_pixel)
    painted, mask = avatar_ops.composite_points(fragments, colors, alphas)
    return Splats(painted + (1 - mask), mask, fragments, alphas)
