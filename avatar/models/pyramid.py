"""Resolutions, widths and resampling that generator, discriminator and inverter share."""

from typing import Protocol

import torch
from torch import Tensor


class Widths(Protocol):
    channel_base: int
    channel_max: int


def resolutions(start: int, size: int) -> tuple[int, ...]:
    """start, 2 start, 4 start, ..., size.

    Raises:
        ValueError: size is not start * 2^n.
    """
    levels = [start]
    while levels[-1] < size and start > 0:
        levels.append(2 * levels[-1])
    if levels[-1] != size or size < 1:
        raise ValueError(f"size: got {size}, expected {start} (the first resolution) times a power of 2")
    return tuple(levels)


def channels(config: Widths, resolution: int) -> int:
    """Width of a resolution, halved where the resolution doubles.

    Raises:
        ValueError: none would be left.
    """
    count = min(config.channel_base // resolution, config.channel_max)
    if count < 1:
        raise ValueError(
            f"channel_base: got {config.channel_base}, channel_max: got {config.channel_max}, expected at least "
            f"{resolution} (the largest resolution) and 1"
        )
    return count


def fir_filter() -> Tensor:
    """The separable filter [1, 3, 3, 1] / 8."""
    return torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8


def fir_macs(channels: int, size: int) -> int:
    """Multiplications of the 4 x 4 filter at every sample of the finer grid, which is `size` by `size`.

    Polyphase forms need fewer; the figures in the literature do not count on them.
    """
    return 16 * channels * size**2


def normalize_rms(x: Tensor) -> Tensor:
    """x over its root mean square along the last axis; finite at zero."""
    return x * (x.square().mean(-1, keepdim=True) + 1e-8).rsqrt()


def check_images(name: str, images: Tensor, channels: int, size: int) -> None:
    """Raises ValueError, with the argument's name, unless images are (B, channels, size, size)."""
    if images.dim() != 4 or images.shape[1:] != (channels, size, size):
        raise ValueError(f"{name}: got shape {tuple(images.shape)}, expected (B, {channels}, {size}, {size})")
