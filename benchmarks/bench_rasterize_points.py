"""rasterize_points against sorting all (point, pixel) pairs in PyTorch."""

import pytest
import torch
from peers_rasterize_points import sphere, torch_rasterize

import avatar_ops

SIZE = 512
# Points and their radius in pixels at three stages of a growing cloud.
CLOUDS = [(800, 13.4), (12_800, 7.6), (400_000, 2.4)]


@pytest.mark.parametrize(("count", "radius"), CLOUDS)
def test_rasterize_points_forward(compare, count, radius):
    points = sphere(count, SIZE)
    compare(
        f"rasterize_points N={count} r={radius} K=10 {SIZE}x{SIZE}",
        ours=lambda: avatar_ops.rasterize_points(points, (SIZE, SIZE), radius),
        peers={"torch sort of pairs": lambda: torch_rasterize(points, (SIZE, SIZE), radius, 10)},
        memory=True,
    )


@pytest.mark.parametrize(("count", "radius"), CLOUDS[-1:])
def test_rasterize_points_forward_backward(compare, count, radius):
    points = sphere(count, SIZE).requires_grad_()
    flowing = torch.randn(SIZE, SIZE, 10)

    def step(rasterize):
        _, depths, distances = rasterize(points, (SIZE, SIZE), radius, 10)
        return torch.autograd.grad((depths, distances), points, (flowing, flowing))

    compare(
        f"rasterize_points and gradient N={count} r={radius} K=10 {SIZE}x{SIZE}",
        ours=lambda: step(avatar_ops.rasterize_points),
        peers={"torch sort of pairs": lambda: step(torch_rasterize)},
        memory=True,
    )
