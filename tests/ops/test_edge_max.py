"""What is special to edge_max: ties, NaN, infinities and rows without neighbours."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import avatar_ops
from avatar_ops.edge_max import edge_max_values

INF, NAN = math.inf, math.nan


def column(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype).unsqueeze(1)


def rows(*neighbors):
    return torch.tensor(neighbors)


def test_ties_keep_the_first_neighbor(isa):
    values, argmax = avatar_ops.edge_max(column(1.0, 3.0, 3.0), rows([0, 2, 1], [0, 1, 2], [2, 2, 1]))
    assert values.flatten().tolist() == [3, 3, 3]
    assert argmax.flatten().tolist() == [2, 1, 2]


def test_zeros_of_either_sign_tie(isa):
    _, argmax = avatar_ops.edge_max(column(-0.0, 0.0), rows([0, 1], [1, 0]))
    assert argmax.flatten().tolist() == [0, 1]


def test_the_first_nan_wins(isa):
    features = column(5.0, NAN, INF, NAN)
    values, argmax = avatar_ops.edge_max(features, rows([0, 3, 1], [1, 2, 3], [0, 2, 0]))
    assert values[:2].isnan().all()
    assert values[2] == INF
    assert argmax.flatten().tolist() == [3, 1, 2]


def test_minus_infinity_is_a_value_and_no_gap(isa):
    values, argmax = avatar_ops.edge_max(column(-INF, -INF), rows([-1, 1, 0], [-1, -1, -1]))
    assert values.flatten().tolist() == [-INF, 0]
    assert argmax.flatten().tolist() == [1, -1]


def test_the_gradient_of_an_empty_row_is_ignored_even_nan(isa):
    features = torch.randn(3, 20, dtype=torch.float64, requires_grad=True)
    values, _ = avatar_ops.edge_max(features, rows([0, 1], [-1, -1]))
    grad = torch.ones_like(values)
    grad[1] = NAN
    (gradient,) = torch.autograd.grad(values, features, grad)
    assert gradient.isfinite().all()
    assert gradient.sum() == 20


def test_the_argmax_carries_no_gradient():
    features = torch.randn(3, 4, requires_grad=True)
    assert not avatar_ops.edge_max(features, rows([0, 1]))[1].requires_grad


@st.composite
def graphs(draw):
    points, channels = draw(st.integers(1, 6)), draw(st.integers(1, 20))
    numbers = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, INF, -INF, NAN])
    size = points * channels
    features = draw(st.lists(numbers, min_size=size, max_size=size))
    k = draw(st.integers(0, 5))
    row = st.lists(st.integers(-1, points - 1), min_size=k, max_size=k)
    neighbors = draw(st.lists(row, min_size=1, max_size=4))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    return (
        torch.tensor(features, dtype=dtype).view(points, channels),
        torch.tensor(neighbors, dtype=torch.int64).view(len(neighbors), k),
    )


def brute_force(column, neighbors):
    """(value, argmax) of one row and channel."""
    best, chosen = 0.0, -1
    for point in neighbors:
        value = column[point]
        if point >= 0 and (chosen < 0 or value > best or (math.isnan(value) and not math.isnan(best))):
            best, chosen = value, point
    return best, chosen


@pytest.mark.parametrize("backward", [False, True])
@settings(max_examples=100, deadline=None)
@given(graph=graphs())
def test_equals_brute_force(backward, graph):
    features, neighbors = graph
    features = features.requires_grad_(backward)
    values, argmax = avatar_ops.edge_max(features, neighbors)
    gradient = torch.zeros_like(features)
    for m, row in enumerate(neighbors.tolist()):
        for c in range(features.shape[1]):
            value, chosen = brute_force(features[:, c].tolist(), row)
            assert argmax[m, c] == chosen
            assert values[m, c] == value or (math.isnan(value) and values[m, c].isnan())
            if chosen >= 0:
                gradient[chosen, c] += 1
    if backward:
        assert torch.equal(torch.autograd.grad(values.sum(), features)[0], gradient)


@pytest.mark.parametrize("channels", [1, 7, 16, 33, 130])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_alone_are_the_values(channels, dtype, isa):
    features = torch.randn(2, 40, channels).to(dtype)
    features[0, 3], features[0, 4], features[1, 5] = INF, -INF, NAN
    neighbors = torch.randint(-1, 40, (2, 60, 5))
    neighbors[:, 0] = -1
    expected, _ = avatar_ops.edge_max(features, neighbors)
    assert torch.equal(edge_max_values(features, neighbors).nan_to_num(7), expected.nan_to_num(7))
    assert torch.equal(edge_max_values(features[0], neighbors[0]), expected[0])
    rows = torch.randint(60, (25,))
    chosen = edge_max_values(features, neighbors, rows)
    assert torch.equal(chosen.nan_to_num(7), expected[:, rows].nan_to_num(7))
    assert torch.equal(edge_max_values(features[0], neighbors[0], rows.int()), expected[0, rows])


def test_values_alone_have_a_gradient_where_one_is_wanted():
    features = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    neighbors = torch.randint(9, (6, 3))
    for rows in (None, torch.tensor([5, 0, 5])):
        assert torch.autograd.gradcheck(lambda f, rows=rows: edge_max_values(f, neighbors, rows), features)
    assert not edge_max_values(features.detach(), neighbors).requires_grad


def test_values_alone_pass_opcheck_and_reject_what_edge_max_does():
    features, neighbors = torch.randn(2, 9, 20), torch.randint(-1, 9, (2, 6, 3))
    for rows in (None, torch.tensor([3, 1])):
        torch.library.opcheck(torch.ops.avatar_ops.edge_max_values.default, (features, neighbors, rows))
    with pytest.raises(IndexError, match=r"edge_max_values: rows\[1\] = 6"):
        edge_max_values(features, neighbors, torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="rows: got shape"):
        edge_max_values(features, neighbors, torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(TypeError, match="features"):
        edge_max_values(features.int(), neighbors)
    with pytest.raises(ValueError, match="features"):
        edge_max_values(features[None], neighbors)
    neighbors[1, 2, 0] = 9
    for rows in (None, torch.tensor([4, 2])):
        with pytest.raises(IndexError, match=r"neighbors\[1, 2, 0\] = 9"):
            edge_max_values(features, neighbors, rows)
