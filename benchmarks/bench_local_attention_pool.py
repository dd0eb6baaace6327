"""local_attention_pool against plain PyTorch, its compilation and PyTorch Geometric."""

import math

import peers_local_attention_pool
import pytest
import torch

import avatar_ops

SIZES = [(65_536, 32), (65_536, 64), (16_384, 128), (4096, 256)]
K = 16


def scan(count):
    """Points on a wavy sphere in the order of a scan: along a spiral."""
    turn = torch.arange(count) + 0.5
    height = 1 - 2 * turn / count
    ring, angle = (1 - height.square()).sqrt(), turn * math.pi * (1 + 5**0.5)
    direction = torch.stack([ring * angle.cos(), ring * angle.sin(), height], -1)
    return direction * (1 + 0.2 * torch.sin(5 * height.unsqueeze(1)))


def inputs(points, width):
    """A scanned surface with its nearest neighbours, and layers of `width`."""
    cloud = scan(points)
    neighbors = avatar_ops.knn(cloud, K).indices
    half = width // 2
    return (
        cloud,
        torch.randn(points, half),
        neighbors,
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
