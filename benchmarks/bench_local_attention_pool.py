"""local_attention_pool against plain PyTorch, its compilation and PyTorch Geometric."""

import peers_local_attention_pool
import pytest
import torch

import avatar_ops

SIZES = [(65_536, 32), (65_536, 64), (16_384, 128), (4096, 256)]
K = 16


def inputs(points, width):
    """A cloud on a surface in scan order, its neighbours near in that order, and layers of `width`."""
    angle = torch.linspace(0, 200, points)
    height = torch.linspace(-1, 1, points)
    cloud = torch.stack([angle.cos(), angle.sin(), height], -1)
    window = torch.randint(-2048, 2048, (points, K)) + torch.arange(points).unsqueeze(1)
    half = width // 2
    return (
        cloud,
        torch.randn(points, half),
        window.clamp(0, points - 1),
        torch.randn(half, 10) / 3,
        torch.randn(half),
        torch.randn(width, width) / width**0.5,
    )


@torch.no_grad()
@pytest.mark.parametrize(("points", "width"), SIZES)
def test_local_attention_pool_inference(compare, points, width):
    values = inputs(points, width)
    peers = peers_local_attention_pool.pool_peers(values[2])
    compare(
        f"local_attention_pool N={points} d={width} K={K}",
        ours=lambda: avatar_ops.local_attention_pool(*values),
        peers={name: lambda peer=peer: peer(*values) for name, peer in peers.items()},
        memory=True,
    )


@pytest.mark.parametrize(("points", "width"), SIZES)
def test_local_attention_pool_training(compare, points, width):
    values = inputs(points, width)
    leaves = [values[i].requires_grad_() for i in (1, 3, 4, 5)]
    peers = peers_local_attention_pool.pool_peers(values[2])

    def step(function):
        torch.autograd.grad(function(*values).square().sum(), leaves)

    compare(
        f"local_attention_pool + backward N={points} d={width} K={K}",
        ours=lambda: step(avatar_ops.local_attention_pool),
        peers={name: lambda peer=peer: step(peer) for name, peer in peers.items()},
        memory=True,
    )
