"""nn.EdgeConv with two layers per edge against forming all edges."""

import peers_edge_conv as peers
import pytest
import torch

from avatar_ops.nn import EdgeConv

POINTS, WIDTHS, NEIGHBORS = 8192, (64, 64), 20


def layers(inputs: int):
    """x, neighbours near in memory, the module and the same over all edges."""
    x = torch.randn(1, POINTS, inputs, requires_grad=True)
    steps = torch.randint(-200, 201, (1, POINTS, NEIGHBORS))
    neighbors = (torch.arange(POINTS).view(1, -1, 1) + steps) % POINTS
    module = EdgeConv(inputs, list(WIDTHS))
    return x, neighbors, module, peers.DGCNNLayers(module)


@pytest.mark.parametrize("inputs", [6, 64])
def test_edge_mlp_training_step(compare, inputs):
    x, neighbors, module, literal = layers(inputs)
    torch.testing.assert_close(module(x, neighbors), literal(x, neighbors), rtol=1e-3, atol=1e-3)
    grad = torch.randn(1, POINTS, WIDTHS[-1])

    def step(layer):
        def run():
            x.grad = None
            layer(x, neighbors).backward(grad)

        return run

    compare(
        f"nn.EdgeConv MLP training step N={POINTS} {inputs}-64-64 K={NEIGHBORS}",
        ours=step(module),
        peers={"DGCNN": step(literal)},
        memory=True,
    )


@pytest.mark.parametrize("inputs", [6, 64])
def test_edge_mlp_inference(compare, inputs):
    x, neighbors, module, literal = layers(inputs)
    module.eval(), literal.eval()
    with torch.no_grad():
        torch.testing.assert_close(module(x, neighbors), literal(x, neighbors), rtol=1e-3, atol=1e-3)
        compare(
            f"nn.EdgeConv MLP inference N={POINTS} {inputs}-64-64 K={NEIGHBORS}",
            ours=lambda: module(x, neighbors),
            peers={"DGCNN": lambda: literal(x, neighbors)},
            memory=True,
        )
