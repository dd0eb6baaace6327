"""composite_points against gathering the features of every slot and a cumulative product."""

import pytest
import torch
from peers_rasterize_points import sphere, torch_composite

import avatar_ops

SIZE, COUNT, RADIUS = 512, 400_000, 2.4


def scene(channels):
    found = avatar_ops.rasterize_points(sphere(COUNT, SIZE), (SIZE, SIZE), RADIUS)
    alphas = (1 - found.distances / RADIUS**2).clamp(min=0)
    return found, torch.rand(COUNT, channels), alphas


@pytest.mark.parametrize("channels", [3, 32])
def test_composite_points_forward(compare, channels):
    found, features, alphas = scene(channels)
    compiled = torch.compile(torch_composite)
    compare(
        f"composite_points N={COUNT} C={channels} K=10 {SIZE}x{SIZE}",
        ours=lambda: avatar_ops.composite_points(found, features, alphas),
        peers={
            "torch gather + cumprod": lambda: torch_composite(found.indices, features, alphas),
            "torch.compile of it": lambda: compiled(found.indices, features, alphas),
        },
        memory=True,
    )


@pytest.mark.parametrize("channels", [3, 32])
def test_composite_points_forward_backward(compare, channels):
    found, features, alphas = scene(channels)
    leaves = (features.requires_grad_(), alphas.requires_grad_())
    compiled = torch.compile(torch_composite)
    flowing = torch.randn(channels, SIZE, SIZE), torch.randn(1, SIZE, SIZE)

    def step(composite, fragments):
        return torch.autograd.grad(composite(fragments, *leaves), leaves, flowing)

    compare(
        f"composite_points and gradients N={COUNT} C={channels} K=10 {SIZE}x{SIZE}",
        ours=lambda: step(avatar_ops.composite_points, found),
        peers={
            "torch gather + cumprod": lambda: step(torch_composite, found.indices),
            "torch.compile of it": lambda: step(compiled, found.indices),
        },
        memory=True,
    )
