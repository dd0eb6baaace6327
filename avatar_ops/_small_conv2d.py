"""3x3 convolutions of so few pixels that reading the weights takes as long as multiplying by them, on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import define
from ._shared_conv2d import Geometry, resample

# x (B, I, H, W) times styles (B, I); transposed: of stride 2, of the flipped weight, without padding.
define(
    "modulated_conv2d_small(Tensor x, Tensor weight, Tensor? styles, bool transposed, int padding) -> Tensor"
)
# The most pixels of all images together, and where they are doubled.
MOST_PIXELS, MOST_DOUBLED = 128, 256


def small_pays(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether small_convolve takes this convolution, and faster than other forms."""
    if x.device.type != "cpu" or weight.dtype != torch.float32 or weight.shape[2] != 3:
        return False
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    if geometry.up == 2:
        return 0 < pixels <= MOST_DOUBLED
    return 0 < pixels <= MOST_PIXELS and geometry.down == 1 and geometry.before >= 0


def small_convolve(
    x: Tensor, weight: Tensor, styles: Tensor | None, f: Tensor | None, geometry: Geometry, size
) -> Tensor:
    """The convolution of x times styles (B, I), float32, with its resampling; without a derivative."""
    padding = 0 if geometry.up == 2 else geometry.before
    styles = None if styles is None else styles.contiguous()
    z = torch.ops.avatar_ops.modulated_conv2d_small(
        x.contiguous(), weight.contiguous(), styles, geometry.up == 2, padding
    )
    return resample(z, f, geometry, size) if geometry.up == 2 else z


@torch.library.register_fake("avatar_ops::modulated_conv2d_small")
def _(x, weight, styles, transposed, padding):
    size = [2 * length + 1 if transposed else length + 2 * padding - 2 for length in x.shape[2:]]
    return x.new_empty(x.shape[0], weight.shape[0], *size)
