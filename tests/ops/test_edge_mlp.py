"""What is special to edge_mlp: tiles must not show, and one layer is edge_conv."""

import torch

import avatar_ops
import avatar_ops.edge_mlp as module
from avatar_ops.edge_mlp import edge_mlp, edge_mlp_statistics
from avatar_ops.testing.edge_mlp import CASES


def inputs(index=0):
    return CASES[index].make(torch.Generator().manual_seed(5), torch.float64)


def test_the_size_of_tiles_does_not_show(monkeypatch):
    outcomes = []
    for elements in (1, 1000, 1 << 30):
        monkeypatch.setattr(module, "TILE_ELEMENTS", elements)
        arguments = inputs()
        arguments["x"].requires_grad_()
        output = edge_mlp(**arguments)
        statistics = edge_mlp_statistics(
            **{**arguments, "scales": arguments["scales"][:1], "shifts": arguments["shifts"][:1]}
        )
        total = output.square().sum() + statistics.variance.sum() + statistics.mean.square().sum()
        outcomes.append((output, *statistics, *torch.autograd.grad(total, arguments["x"])))
    for outcome in outcomes[1:]:
        torch.testing.assert_close(outcome, outcomes[0], rtol=1e-10, atol=1e-10)


def test_one_layer_is_edge_conv():
    arguments = inputs(2)
    weights, scales, shifts = (arguments.pop(name) for name in ("weights", "scales", "shifts"))
    single = avatar_ops.edge_conv(**arguments, weight=weights[0], scale=scales[0], shift=shifts[0])
    torch.testing.assert_close(edge_mlp(**arguments, weights=weights, scales=scales, shifts=shifts), single)
