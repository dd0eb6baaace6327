"""The camera of the PointAvatar layout."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Camera:
    """Cameras of B frames; see `project`."""

    intrinsics: Tensor  # (B, 4)
    translation: Tensor  # (B, 3)
    image_size: tuple[int, int]

    def project(self, points: Tensor) -> Tensor:
        return project(points, self.intrinsics, self.translation, self.image_size)


def project(points: Tensor, intrinsics: Tensor, translation: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Project to pixel coordinates and depth.

        depth = -(z + t_z);  x_px = W (c_x + |f_x| (x + t_x) / depth);  y_px = H (c_y - f_y (y + t_y) / depth)

    The axes are x right, y up, z towards the viewer; the rotation is the identity, since the neck carries the
    head's. Pixel centres lie at + 0.5.

    Args:
        points: (B, N, 3) in head units.
        intrinsics: (4,) or (B, 4): f_x (stored negative by convention), f_y, c_x, c_y, relative to the image.
        translation: (B, 3).
        image_size: (H, W).

    Returns:
        (B, N, 3): x and y in pixels, depth (positive before the camera).

    Source: Zheng et al., PointAvatar, CVPR 2023, and its published preprocessing.
    """
    height, width = image_size
    fx, fy, cx, cy = (intrinsics[..., None, i] for i in range(4))
    x, y, z = (points + translation[:, None]).unbind(-1)
    depth = -z
    return torch.stack([width * (cx + fx.abs() * x / depth), height * (cy - fy * y / depth), depth], -1)


def ndc_to_pixels(length: float, image_size: tuple[int, int]) -> float:
    """A length in normalised device coordinates ([-1, 1] over the shorter side) in pixels."""
    return length * min(image_size) / 2
