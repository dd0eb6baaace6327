"""linear_act against torch's own linear layer, sum and activation."""

import pytest
import torch
import torch.nn.functional as F

from avatar_ops.linear_act import linear_act


def composed(x, weight, bias, rest, places):
    y = F.linear(x, weight, bias)
    return F.leaky_relu(y if rest is None else y + rest[:, places], 0.2, inplace=True)


# Layers of RandLA-Net at 65,536 points: the first block's end, the last decoder, a deep layer.
@torch.no_grad()
@pytest.mark.parametrize(
    ("points", "channels", "outputs", "rows"),
    [(65_536, 16, 32, None), (65_536, 32, 32, 16_384), (16_384, 64, 128, None), (1_024, 512, 256, 256)],
)
def test_linear_act(compare, points, channels, outputs, rows):
    x = torch.randn(1, points, channels)
    weight, bias = torch.randn(outputs, channels) / channels**0.5, torch.randn(outputs)
    rest, places = None, None
    if rows:
        rest, places = torch.randn(1, rows, outputs), torch.randint(rows, (points,))
    compiled = torch.compile(composed, dynamic=False)
    compare(
        f"linear_act {points} x {channels} to {outputs}" + (f", rows of {rows}" if rows else ""),
        ours=lambda: linear_act(x, weight, bias, rest=rest, places=places, negative_slope=0.2),
        peers={
            "torch eager": lambda: composed(x, weight, bias, rest, places),
            "torch.compile": lambda: compiled(x, weight, bias, rest, places),
        },
        memory=True,
    )
