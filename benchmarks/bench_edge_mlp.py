"""A training step of nn.EdgeConv with two layers per edge against forming all edges."""

import peers_edge_conv as peers
import torch

from avatar_ops.nn import EdgeConv


def test_edge_mlp_training_step(compare):
    points, inputs, widths, k = 8192, 6, (64, 64), 20
    x = torch.randn(1, points, inputs, requires_grad=True)
    neighbors = (torch.arange(points).view(1, -1, 1) + torch.randint(-200, 201, (1, points, k))) % points
    module = EdgeConv(inputs, list(widths))
    literal = peers.DGCNNLayers(module)
    torch.testing.assert_close(module(x, neighbors), literal(x, neighbors), rtol=1e-3, atol=1e-3)
    grad = torch.randn(1, points, widths[-1])

    def step(layer):
        def run():
            x.grad = None
            layer(x, neighbors).backward(grad)

        return run

    compare(
        f"nn.EdgeConv MLP training step N={points} {inputs}-64-64 K={k}",
        ours=step(module),
        peers={"DGCNN": step(literal)},
        memory=True,
    )
