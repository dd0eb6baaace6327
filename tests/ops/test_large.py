"""More than 2**31 elements in one tensor; about 18 GB of memory, so only with --large."""

import torch

import avatar_ops

ELEMENTS = 2**31 + 2**20


def test_edge_max_reads_beyond_32_bit_offsets():
    features = torch.empty(ELEMENTS // 32, 32)
    last = features.shape[0] - 1
    features[[0, 5, last - 1, last]] = torch.tensor([1.0, 2.0, 3.0, 4.0]).unsqueeze(1)
    values, argmax = avatar_ops.edge_max(features, torch.tensor([[0, last, 5], [last - 1, 0, -1]]))
    assert torch.equal(values, torch.tensor([4.0, 3.0]).unsqueeze(1).expand(2, 32))
    assert torch.equal(argmax, torch.tensor([last, last - 1]).unsqueeze(1).expand(2, 32))


def test_bias_act_writes_beyond_32_bit_offsets():
    x = torch.empty(2, 2, ELEMENTS // 4)
    x[:, :, -3:] = torch.tensor([-1.0, 0.0, 1.0])
    y = avatar_ops.bias_act(x, torch.tensor([1.0, 2.0]), activation="linear")
    assert torch.equal(y[1, :, -3:], torch.tensor([[0.0, 1.0, 2.0], [1.0, 2.0, 3.0]]))


def test_composite_points_gathers_beyond_32_bit_offsets():
    features = torch.empty(1, ELEMENTS // 16, 16)
    last = features.shape[1] - 1
    features[0, last] = 3
    indices = torch.tensor([last, -1]).view(1, 1, 1, 2)
    fragments = (indices, torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
    image, opacity = avatar_ops.composite_points(fragments, features, torch.full((1, 1, 1, 2), 0.5))
    assert torch.equal(image, torch.full((1, 16, 1, 1), 1.5))
    assert opacity.item() == 0.5
