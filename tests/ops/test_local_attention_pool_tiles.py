"""local_attention_pool on surfaces with nearest neighbours, where edges of near points share products."""

import pytest
import torch

import avatar_ops
from avatar_ops import reference

OP = "local_attention_pool"


def surface(count, *, scattered, dtype=torch.float32):
    """Points of a strip of a curved surface along it, or in any order."""
    generator = torch.Generator().manual_seed(3)
    along = torch.rand(count, generator=generator, dtype=torch.float64).sort().values
    if scattered:
        along = along[torch.randperm(count, generator=generator)]
    across = 0.03 * torch.rand(count, generator=generator, dtype=torch.float64)
    return torch.stack([along.cos(), along.sin(), across + 0.2 * along.square()], -1).to(dtype)


def inputs(
    count=500, k=16, widths=(24,), channels=20, scattered=False, missing=0.0, slope=0.2, dtype=torch.float32
):
    generator = torch.Generator().manual_seed(4)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    points = surface(count, scattered=scattered, dtype=dtype).expand(2, -1, -1).contiguous()
    points[1] += 0.5
    neighbors = avatar_ops.knn(points, k).indices
    neighbors[torch.rand(neighbors.shape, generator=generator) < missing] = -1
    inner = (10, *widths)
    hidden = channels + widths[-1]
    return {
        "points": points,
        "features": normal(2, count, channels),
        "neighbors": neighbors,
        "position_weight": [normal(o, i) for i, o in zip(inner, widths, strict=False)],
        "position_bias": [normal(o) for o in widths],
        "score_weight": normal(hidden, hidden) / hidden**0.5,
        "negative_slope": slope,
    }


def wide(values):
    def widen(value):
        return [v.double() for v in value] if isinstance(value, list) else value

    floating = {n: v.double() for n, v in values.items() if torch.is_tensor(v) and v.is_floating_point()}
    return {**{n: widen(v) for n, v in values.items()}, **floating}


def check(values, tolerance):
    actual = avatar_ops.local_attention_pool(**values)
    expected = reference.local_attention_pool(**wide(values))
    assert (actual.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("scattered", [False, True], ids=["in-order", "scattered"])
@pytest.mark.parametrize("widths", [(24,), (40, 24), (16, 40), (24, 24, 8), (136,), (136, 130)], ids=str)
def test_tiles_for_any_position_network(widths, scattered, isa):
    check(inputs(widths=widths, channels=widths[-1], scattered=scattered), 2e-6)


@pytest.mark.parametrize("slope", [0.0, 1e-6, 1e-2, 0.2, 0.9, 1.0])
@pytest.mark.parametrize("widths", [(40,), (40, 40)], ids=str)
def test_tiles_for_any_slope(widths, slope, isa):
    check(inputs(widths=widths, slope=slope), 2e-6)
    check(inputs(widths=widths, slope=slope, dtype=torch.float64), 1e-14)


@pytest.mark.parametrize("k", [1, 5, 16, 20, 70, 200])
@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_tiles_for_any_number_of_neighbors(k, missing, isa):
    check(inputs(count=230, k=k, widths=(32, 32), missing=missing), 2e-6)


@pytest.mark.parametrize("scattered", [False, True], ids=["in-order", "scattered"])
@pytest.mark.parametrize("widths", [(24,), (40, 40), (136,)], ids=str)
def test_tiles_have_same_bits_for_any_thread_count(widths, scattered, isa):
    values = inputs(count=900, widths=widths, channels=widths[-1], scattered=scattered, missing=0.1)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(avatar_ops.local_attention_pool(**values))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(other, results[0]) for other in results[1:])


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("scattered", [False, True], ids=["in-order", "scattered"])
def test_tiles_answer_points_that_are_not_finite_as_torch_does(value, scattered, isa):
    values = inputs(widths=(136, 136), channels=136, scattered=scattered)
    values["points"][0, 7, 1] = value
    torch.testing.assert_close(
        avatar_ops.local_attention_pool(**values),
        reference.local_attention_pool(**values),
        rtol=1e-4,
        atol=1e-4,
        equal_nan=True,
    )


def test_tiles_name_the_first_neighbor_out_of_range(isa):
    values = inputs(widths=(136,), channels=136, scattered=True)
    values["neighbors"][0, [3, 200, 450], 2] = 500
    with pytest.raises(IndexError, match=r"neighbors\[0, 3, 2\] = 500"):
        avatar_ops.local_attention_pool(**values)
