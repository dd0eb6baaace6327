"""edge_conv and a training step of nn.EdgeConv against forming the edges."""

import peers_edge_conv as peers
import pytest
import torch

import avatar_ops
from avatar_ops.nn import EdgeConv

CHANNELS, NEIGHBORS = 64, 20


def inputs(points: int):
    """Points along a curve with neighbours near them in memory, as sorted surface points have them."""
    x = torch.randn(1, points, CHANNELS)
    steps = torch.randint(-200, 201, (1, points, NEIGHBORS))
    neighbors = (torch.arange(points).view(1, -1, 1) + steps) % points
    return x, neighbors, torch.randn(CHANNELS, 2 * CHANNELS) / (2 * CHANNELS) ** 0.5


def check_peers(ours, others) -> None:
    for name, peer in others.items():
        torch.testing.assert_close(peer(), ours(), rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("points", [8192, 65536])
def test_edge_conv_inference(compare, points):
    x, neighbors, weight = inputs(points)
    scale, shift = torch.randn(CHANNELS), torch.randn(CHANNELS)

    def ours():
        return avatar_ops.edge_conv(x, neighbors, weight, scale=scale, shift=shift)

    others = peers.inference_peers(x, neighbors, weight, scale, shift)
    with torch.no_grad():
        check_peers(ours, others)
        compare(
            f"edge_conv inference N={points} C=O={CHANNELS} K={NEIGHBORS}",
            ours=ours,
            peers=others,
            memory=True,
        )


@pytest.mark.parametrize("points", [8192])
def test_edge_conv_training_step(compare, points):
    x, neighbors, _ = inputs(points)
    x.requires_grad_()
    module = EdgeConv(CHANNELS, CHANNELS)
    forwards = {"": lambda: module(x, neighbors), **peers.training_peers(x, neighbors, module)}
    check_peers(forwards[""], forwards)
    grad = torch.randn(1, points, CHANNELS)

    def step(forward):
        def run():
            x.grad = None
            forward().backward(grad)

        return run

    steps = {name: step(forward) for name, forward in forwards.items()}
    compare(
        f"nn.EdgeConv training step N={points} C=O={CHANNELS} K={NEIGHBORS}",
        ours=steps.pop(""),
        peers=steps,
        memory=True,
    )
