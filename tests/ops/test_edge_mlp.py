"""What is special to edge_mlp: tiles must not show, and one layer is edge_conv."""

import torch

import avatar_ops
from avatar_ops.edge_mlp import edge_mlp
from avatar_ops.testing.edge_mlp import CASES


def inputs(index=0):
    return CASES[index].make(torch.Generator().manual_seed(5), torch.float64)


def test_many_rounds_of_tiles_give_the_same_for_any_number_of_threads():
    arguments = CASES[3].make(torch.Generator().manual_seed(5), torch.float32)
    leaves = [arguments["x"], *arguments["weights"]]
    for leaf in leaves:
        leaf.requires_grad_()
    before, outcomes = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        output = edge_mlp(**arguments)
        p, q = torch.randn(3000, 9, generator=torch.Generator().manual_seed(1)).split([1500, 1500])
        points = torch.randint(-1, 1500, (1500, 20), generator=torch.Generator().manual_seed(2))
        layers = ([torch.ones(5, 9)], [torch.ones(9)], [torch.zeros(9)], 0.2)
        seed = (None, None, torch.ones(5), torch.full((5,), 0.5))
        gradients = torch.ops.avatar_ops.edge_layers_backward(*seed, p, q, points, *layers)
        outcomes.append((output, *gradients[:2], *gradients[2]))
    torch.set_num_threads(before)
    for one, other in zip(*outcomes, strict=True):
        assert torch.equal(one, other)


def test_one_layer_is_edge_conv():
    arguments = inputs(2)
    weights, scales, shifts = (arguments.pop(name) for name in ("weights", "scales", "shifts"))
    single = avatar_ops.edge_conv(**arguments, weight=weights[0], scale=scales[0], shift=shifts[0])
    torch.testing.assert_close(edge_mlp(**arguments, weights=weights, scales=scales, shifts=shifts), single)
