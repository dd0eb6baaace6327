"""What is special to edge_conv: the split into products per point must not show."""

import pytest
import torch

import avatar_ops
from avatar_ops import reference
from avatar_ops.edge_conv import edge_conv_norm
from avatar_ops.edge_mlp import edge_mlp, edge_mlp_statistics
from avatar_ops.testing import neighbors_for, normal


def generator():
    return torch.Generator().manual_seed(7)


def linear_inputs(dtype=torch.float64, points=30, inputs=5, outputs=19, k=4, missing=0.0):
    g = generator()
    x = normal(g, dtype, 2, points, inputs)
    neighbors = neighbors_for(g, 2, points, k, points, missing)
    return x, neighbors, normal(g, dtype, outputs, 2 * inputs)


def relative(actual, expected):
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def test_a_row_without_neighbors_gives_zero_whatever_the_shift():
    x, neighbors, weight = linear_inputs()
    neighbors[0, 3] = -1
    shift = torch.full((19,), 5.0, dtype=torch.float64)
    output = avatar_ops.edge_conv(x, neighbors, weight, shift=shift)
    assert (output[0, 3] == 0).all()
    assert (output[0, 4] != 0).any()


def test_missing_neighbors_change_nothing(isa):
    x, neighbors, weight = linear_inputs(torch.float32)
    gaps = torch.full_like(neighbors, -1)
    spread = torch.stack([gaps, neighbors], -1).flatten(2)
    assert torch.equal(avatar_ops.edge_conv(x, spread, weight), avatar_ops.edge_conv(x, neighbors, weight))


def test_garbage_that_is_nobodys_neighbor_reaches_nothing(isa):
    x, neighbors, weight = linear_inputs()
    neighbors = neighbors.clamp(max=24)
    neighbors[:, 25:] = -1
    gamma = torch.linspace(-1, 1, 19, dtype=torch.float64)
    outcomes = []
    for garbage in (0.0, 1e300, float("inf"), float("nan")):
        padded = x.clone()
        padded[:, 25:] = garbage
        for run in (
            lambda x, w: avatar_ops.edge_conv(x, neighbors, w),
            lambda x, w: edge_conv_norm(x, neighbors, w, gamma, gamma)[0],
            lambda x, w: edge_mlp(x, neighbors, [w], [gamma], [gamma]),
        ):
            x_leaf, w_leaf = padded.requires_grad_(), weight.clone().requires_grad_()
            output = run(x_leaf, w_leaf)
            grads = torch.autograd.grad(output[:, :25].square().sum(), (x_leaf, w_leaf))
            outcomes.append((output.detach(), *grads))
    for n, outcome in enumerate(outcomes):
        for actual, expected in zip(outcome, outcomes[n % 3], strict=True):
            assert torch.equal(actual, expected)


def test_nan_gradients_of_rows_without_neighbors_are_ignored():
    x, neighbors, weight = linear_inputs()
    neighbors[1, 5] = -1
    gamma = torch.linspace(-1, 1, 19, dtype=torch.float64)
    for run in (
        lambda x, w: avatar_ops.edge_conv(x, neighbors, w),
        lambda x, w: edge_conv_norm(x, neighbors, w, gamma, gamma)[0],
        lambda x, w: edge_mlp(x, neighbors, [w], [gamma], [gamma]),
    ):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        output = run(*leaves)
        grad = torch.ones_like(output)
        grad[1, 5] = float("nan")
        for gradient in torch.autograd.grad(output, leaves, grad):
            assert gradient.isfinite().all()


def test_nan_in_a_neighbor_wins(isa):
    x, neighbors, weight = linear_inputs(torch.float32)
    neighbors[0, 0] = torch.tensor([3, 9, 4, 5])
    neighbors[0, 1] = torch.tensor([3, 4, 5, 6])
    x[0, 9, 2] = float("nan")
    output = avatar_ops.edge_conv(x, neighbors, weight)
    assert output[0, 0].isnan().all()
    assert output[0, 1].isfinite().all()
    assert torch.equal(output.isnan(), reference.edge_conv(x, neighbors, weight).isnan())


def test_zero_scale_gives_the_gradient_to_the_first_neighbor():
    x, neighbors, weight = linear_inputs()
    neighbors[:, :, 0] = -1
    scale = torch.zeros(19, dtype=torch.float64, requires_grad=True)
    avatar_ops.edge_conv(x, neighbors, weight, scale=scale).sum().backward()
    first = neighbors[:, :, 1]
    edges = torch.cat([x, x - x.gather(1, first.unsqueeze(-1).expand_as(x))], -1)
    # At zero the slope of LeakyReLU is that of its negative side.
    torch.testing.assert_close(scale.grad, 0.2 * (edges @ weight.T).sum((0, 1)))


@pytest.mark.parametrize("offset", [1e3, 1e6])
def test_an_offset_of_the_cloud_costs_no_digits_of_differences(offset, isa):
    """The own half of the weight is zero, so only x_i - x_j counts, which the offset leaves exact."""
    x, neighbors, weight = linear_inputs(torch.float32, inputs=6)
    x = (x * 64).round() / 64 + offset
    weight[:, :6] = 0
    leaves = x.requires_grad_(), weight.requires_grad_()
    output = avatar_ops.edge_conv(x, neighbors, weight)
    wide = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = reference.edge_conv(wide[0], neighbors, wide[1])
    assert relative(output, expected) < 1e-6
    grads = torch.autograd.grad(output.square().sum(), leaves)
    wide_grads = torch.autograd.grad(expected.square().sum(), wide)
    assert relative(grads[0], wide_grads[0]) < 1e-5
    assert relative(grads[1][:, 6:], wide_grads[1][:, 6:]) < 1e-5


def test_with_an_offset_it_is_as_accurate_as_edge_by_edge(isa):
    x, neighbors, weight = linear_inputs(torch.float32, inputs=6)
    x = x + 1e4
    exact = reference.edge_conv(x.double(), neighbors, weight.double())
    eager = reference.edge_conv(x, neighbors, weight)
    actual = avatar_ops.edge_conv(x, neighbors, weight)
    assert relative(actual, exact) <= 2 * relative(eager, exact) + 1e-7


def test_statistics_of_features_far_from_zero_keep_their_digits(isa):
    x, neighbors, weight = linear_inputs(torch.float32, points=200, inputs=6)
    x = (x * 64).round() / 64 + 4096
    gamma = beta = torch.ones(19)
    output, statistics = edge_conv_norm(x, neighbors, weight, gamma, beta)
    exact, expected = reference.edge_conv_norm(
        x.double(), neighbors, weight.double(), gamma.double(), beta.double()
    )
    assert relative(statistics.variance, expected[1]) < 1e-5
    assert relative(statistics.mean, expected[0]) < 1e-6
    assert relative(output, exact) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_statistics_are_those_of_float32(dtype):
    x, neighbors, weight = linear_inputs(dtype)
    gamma, beta = torch.linspace(-1, 1, 19), torch.ones(19)
    output, statistics = edge_conv_norm(x, neighbors, weight, gamma, beta)
    wide_output, wide = edge_conv_norm(x.float(), neighbors, weight.float(), gamma, beta)
    assert output.dtype == dtype
    assert statistics.mean.dtype == torch.float32
    torch.testing.assert_close(output, wide_output.to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(statistics.variance, wide.variance, rtol=0, atol=0)
    deep = edge_mlp_statistics(x, neighbors, [weight], [], [])
    torch.testing.assert_close(deep.variance, wide.variance)


@pytest.mark.parametrize("function", ["edge_conv", "edge_conv_norm", "edge_mlp"])
def test_autocast_casts_features_and_weights_but_no_normalisation(function):
    x, neighbors, weight = linear_inputs(torch.float32)
    gamma, beta = torch.linspace(-1, 1, 19), torch.ones(19)
    run = {
        "edge_conv": lambda x, w: avatar_ops.edge_conv(x, neighbors, w),
        "edge_conv_norm": lambda x, w: edge_conv_norm(x, neighbors, w, gamma, beta)[0],
        "edge_mlp": lambda x, w: edge_mlp(x, neighbors, [w], [gamma], [beta]),
    }[function]
    with torch.autocast("cpu", torch.bfloat16):
        output = run(x, weight)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, run(x.bfloat16(), weight.bfloat16()))


def test_what_the_backward_pass_needs_is_kept_only_for_it():
    x, neighbors, weight = linear_inputs()
    bare = torch.ops.avatar_ops.edge_conv
    arguments = (neighbors, weight, None, None, None, 0.2)
    assert bare(x, *arguments, False)[1].numel() == 0
    assert bare(x, *arguments, True)[1].dtype == torch.uint8
    output = bare(x.requires_grad_(), *arguments, False)[0]
    with pytest.raises(RuntimeError, match="keep_slots"):
        output.sum().backward()


def test_many_small_clouds_equal_each_alone(isa):
    x, neighbors, weight = linear_inputs(torch.float32, points=7)
    x, neighbors = x.repeat(9, 1, 1), neighbors.repeat(9, 1, 1)
    alone = torch.stack([avatar_ops.edge_conv(a, n, weight) for a, n in zip(x, neighbors, strict=True)])
    assert torch.equal(avatar_ops.edge_conv(x, neighbors, weight), alone)


@pytest.mark.parametrize("position", [(0, 0, 0), (1, 29, 3)])
def test_the_first_bad_neighbor_is_named(position):
    x, neighbors, weight = linear_inputs()
    neighbors[1, 29, 3] = 31
    neighbors[position] = 30
    gamma = torch.ones(19, dtype=torch.float64)
    name = rf"neighbors\[{position[0]}, {position[1]}, {position[2]}\] = 30"
    for run in (
        lambda: avatar_ops.edge_conv(x, neighbors, weight),
        lambda: edge_conv_norm(x, neighbors, weight, gamma, gamma),
        lambda: edge_mlp(x, neighbors, [weight], [gamma], [gamma]),
    ):
        with pytest.raises(IndexError, match=name):
            run()
