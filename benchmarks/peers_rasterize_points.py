"""rasterize_points and composite_points as one would write them in PyTorch itself."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def torch_rasterize(points: Tensor, image_size: tuple[int, int], radius: float, points_per_pixel: int):
    """One cloud (N, 3): every (point, pixel) pair within the radius, sorted by pixel, cut after K.

    The points are sorted by depth first, so that a stable sort of the pairs by pixel leaves each pixel's in
    depth order. Pairs are found one row of the window at a time.
    """
    height, width = image_size
    order = points[:, 2].argsort(stable=True)
    order = order[points[order, 2] > 0]
    x, y, _ = points[order].unbind(1)
    reach = math.ceil(radius)
    span = torch.arange(-reach, reach + 1, device=points.device)
    first_column, first_row = x.floor().long(), y.floor().long()
    pixels, positions = [], []
    for offset in span:
        row = first_row + offset
        column = first_column[:, None] + span
        squared = (column + 0.5 - x[:, None]).square() + (row + 0.5 - y).square()[:, None]
        inside = (column >= 0) & (column < width) & ((row >= 0) & (row < height))[:, None]
        position, which = (inside & (squared < radius * radius)).nonzero(as_tuple=True)
        pixels.append(row[position] * width + column[position, which])
        positions.append(position)
    position, by_position = torch.cat(positions).sort(stable=True)
    pixel, by_pixel = torch.cat(pixels)[by_position].sort(stable=True)
    position = position[by_pixel]
    count = torch.bincount(pixel, minlength=height * width)
    rank = torch.arange(pixel.numel(), device=points.device) - (count.cumsum(0) - count)[pixel]
    kept = rank < points_per_pixel
    slot = (pixel * points_per_pixel + rank)[kept]
    index = order[position[kept]]
    indices = points.new_full((height * width * points_per_pixel,), -1, dtype=torch.int64)
    indices[slot] = index
    far = points.new_full(indices.shape, float("inf"))
    row, column = pixel[kept] // width, pixel[kept] % width
    squared = (points[index, 0] - column - 0.5).square() + (points[index, 1] - row - 0.5).square()
    shape = (height, width, points_per_pixel)
    return (
        indices.view(shape),
        far.index_put((slot,), points[index, 2]).view(shape),
        far.index_put((slot,), squared).view(shape),
    )


def torch_composite(indices: Tensor, features: Tensor, alphas: Tensor) -> tuple[Tensor, Tensor]:
    """One image: indices and alphas (H, W, K), features (N, C)."""
    alphas = alphas.masked_fill(indices < 0, 0)
    through = F.pad((1 - alphas).cumprod(-1), (1, -1), value=1)
    weights = alphas * through
    gathered = F.embedding(indices.clamp(min=0), features)
    return (weights.unsqueeze(-1) * gathered).sum(2).permute(2, 0, 1), weights.sum(-1).unsqueeze(0)


def sphere(count: int, size: int) -> Tensor:
    """Points (N, 3) on a sphere that fills most of the image, as a head does."""
    direction = F.normalize(torch.randn(count, 3), dim=1)
    return direction * torch.tensor([0.35 * size, 0.35 * size, 1]) + torch.tensor([size / 2, size / 2, 4])
