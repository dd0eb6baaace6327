"""upfirdn2d against a convolution of the zero-stuffed image, and against interpolation where that is the same."""

import pytest
import torch
import torch.nn.functional as F
from peers_modulated_conv2d import fir

import avatar_ops

TAPS = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8


def zero_stuffed(x, f, up, down, sides, gain):
    batch, channels, height, width = x.shape
    z = x.new_zeros(batch, channels, height, up, width, up)
    z[:, :, :, 0, :, 0] = x
    return fir(z.view(batch, channels, height * up, width * up), f, sides, gain)[:, :, ::down, ::down]


def run_case(compare, name, x, up, down, sides, gain, **peers):
    f = torch.outer(TAPS, TAPS)
    compare(
        name,
        ours=lambda: avatar_ops.upfirdn2d(x, TAPS, up=up, down=down, padding=sides, gain=gain),
        peers={"torch conv2d": lambda: zero_stuffed(x, f, up, down, sides, gain), **peers},
        memory=True,
    )


@pytest.mark.parametrize(("channels", "size"), [(512, 16), (128, 128), (32, 512)])
def test_upfirdn2d_filter(compare, channels, size):
    x = torch.randn(4, channels, size + 1, size + 1)
    run_case(compare, f"upfirdn2d filter {channels}@{size}", x, 1, 1, (1, 1, 1, 1), 4.0)


@pytest.mark.parametrize(("channels", "size"), [(3, 256), (128, 64), (512, 8)])
def test_upfirdn2d_up(compare, channels, size):
    x = torch.randn(4, channels, size, size)
    # Bilinear interpolation differs at the border alone, where it repeats the last row.
    run_case(
        compare,
        f"upfirdn2d up {channels}@{size}",
        x,
        2,
        1,
        (2, 1, 2, 1),
        4.0,
        **{"F.interpolate (other border)": lambda: F.interpolate(x, scale_factor=2, mode="bilinear")},
    )


@pytest.mark.parametrize(("channels", "size"), [(128, 128), (512, 16)])
def test_upfirdn2d_down(compare, channels, size):
    x = torch.randn(4, channels, size, size)
    f = torch.outer(TAPS, TAPS)
    kernel = f[None, None].expand(channels, 1, -1, -1)
    run_case(
        compare,
        f"upfirdn2d down {channels}@{size}",
        x,
        1,
        2,
        (1, 1, 1, 1),
        1.0,
        **{"torch strided conv2d": lambda: F.conv2d(x, kernel, stride=2, padding=1, groups=channels)},
    )
