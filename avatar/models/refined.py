"""What teacher and student put on top of a point avatar: fused features, offsets, a latent code."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avatar.models.mlp import linear_layers, linear_macs, zero_linear
from avatar.models.point_avatar import PosedPoints

NEGATIVE_SLOPE = 0.2


@dataclass
class Refined:
    """The points of B frames after refinement, and the features that refined them."""

    posed: Tensor  # (B, N, 3)
    colors: Tensor  # (B, N, 3) in [0, 1]
    features: Tensor  # (B, N, C), fused
    point_features: Tensor  # (B, N, P), before they are fused
    points: PosedPoints | None = None
    """The unrefined points, where the model poses them itself."""


class Fusion(nn.Module):
    """Linear layers with LeakyReLU 0.2 over a point's features and others that a whole frame shares.

    The first layer's map of the shared features is applied once per frame and added to every point's.

    Args:
        point_channels: P.
        widths: of the layers.
        frame_channels: S, 0 for none.
    """

    def __init__(self, point_channels: int, widths: Sequence[int], frame_channels: int = 0):
        super().__init__()
        self.point_channels, self.frame_channels = point_channels, frame_channels
        self.layers = linear_layers((point_channels + frame_channels, *widths))
        self.out_channels = widths[-1]

    def forward(self, points: Tensor, frame: Tensor | None = None) -> Tensor:
        """(B, N, widths[-1]) of points (B, N, P) and, if S > 0, frame (B, S)."""
        first, *others = self.layers
        if frame is None:
            x = first(points)
        else:
            of_points, of_frame = first.weight.split([self.point_channels, self.frame_channels], 1)
            x = F.linear(points, of_points) + F.linear(frame, of_frame, first.bias)[:, None]
        x = F.leaky_relu(x, NEGATIVE_SLOPE)
        for layer in others:
            x = F.leaky_relu(layer(x), NEGATIVE_SLOPE)
        return x

    def macs(self, num_points: int) -> int:
        """Multiply-accumulates of the linear layers for one frame."""
        shared = self.frame_channels * self.layers[0].out_features
        return num_points * (linear_macs(self) - shared) + shared


class PointHead(nn.Module):
    """Offsets of position and colour from a point's features; zero at first.

    Args:
        in_channels: C.   widths: of the hidden layers, with LeakyReLU 0.2.
    """

    def __init__(self, in_channels: int, widths: Sequence[int]):
        super().__init__()
        sizes = (in_channels, *widths)
        self.hidden = linear_layers(sizes)
        self.output = zero_linear(sizes[-1], 6)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Offsets (B, N, 3) of positions and (B, N, 3) of colours from features (B, N, C)."""
        for layer in self.hidden:
            features = F.leaky_relu(layer(features), NEGATIVE_SLOPE)
        positions, colors = self.output(features).split(3, -1)
        return positions, colors


def pool_features(features: Tensor) -> Tensor:
    """Mean and maximum over the points: (B, N, C) to (B, 2 C)."""
    return torch.cat([features.mean(1), features.amax(1)], -1)


class Latent(nn.Module):
    """The generator's latent code of a frame from its pooled point features, of root mean square 1.

    Args:
        in_channels: 2 C.   width: of the hidden layer, with LeakyReLU 0.2.   size: of the code.
    """

    def __init__(self, in_channels: int, width: int = 512, size: int = 512):
        super().__init__()
        self.hidden = nn.Linear(in_channels, width)
        self.output = nn.Linear(width, size)

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, size) of pooled features (B, 2 C); see pool_features."""
        z = self.output(F.leaky_relu(self.hidden(pooled), NEGATIVE_SLOPE))
        return z * (z.square().mean(-1, keepdim=True) + 1e-8).rsqrt()


def refine(
    posed: Tensor,
    colors: Tensor,
    head: PointHead,
    features: Tensor,
    point_features: Tensor,
    points: PosedPoints | None = None,
) -> Refined:
    """Points moved and coloured by the head's offsets."""
    moves, tints = head(features)
    return Refined(posed + moves, (colors + tints).clamp(0, 1), features, point_features, points)
