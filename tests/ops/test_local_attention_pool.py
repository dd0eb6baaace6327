"""What is special to local_attention_pool: missing neighbours, numerics of distance and softmax, memory."""

import resource

import pytest
import torch

import avatar_ops
from avatar_ops import reference
from avatar_ops.testing import local_attention_pool as cases
from avatar_ops.testing import map_tensors, require_grad

CASE = cases.CASES[0]


def inputs(dtype=torch.float64, **options):
    return cases._pool_inputs(**options)(torch.Generator().manual_seed(1), dtype)


def gradients(values, grad=None):
    values, leaves = require_grad(CASE, values)
    pooled = avatar_ops.local_attention_pool(**values)
    grad = torch.ones_like(pooled) if grad is None else grad
    return pooled, torch.autograd.grad(pooled, leaves, grad)


def test_local_attention_pool_ignores_what_empty_slots_would_read(isa):
    """Slots of -1 read and add nothing, even where the point they might have read holds NaN."""
    values = inputs(missing=0.0)
    values["neighbors"] = values["neighbors"].clamp(min=1)
    values["neighbors"][:, :, 3:] = -1
    clean, clean_gradients = gradients(values)
    values["features"][:, 0] = float("nan")
    poisoned, poisoned_gradients = gradients(values)
    assert torch.equal(poisoned, clean)
    assert all(torch.equal(p, c) for p, c in zip(poisoned_gradients, clean_gradients, strict=True))


def test_local_attention_pool_ignores_what_flows_into_rows_without_neighbors(isa):
    values = inputs()
    values["neighbors"][:, 5] = -1
    pooled, _ = gradients(values)
    assert (pooled[:, 5] == 0).all()
    grad = torch.ones_like(pooled)
    _, clean = gradients(values, grad)
    grad[:, 5] = float("nan")
    _, poisoned = gradients(values, grad)
    assert all(torch.equal(p, c) for p, c in zip(poisoned, clean, strict=True))


def test_local_attention_pool_drops_missing_neighbors_wherever_they_stand(isa):
    values = inputs(missing=0.3)
    moved = {**values, "neighbors": values["neighbors"].sort(-1).values}
    spread = avatar_ops.local_attention_pool(**values)
    torch.testing.assert_close(avatar_ops.local_attention_pool(**moved), spread, rtol=1e-12, atol=1e-12)


def test_local_attention_pool_sends_no_gradient_through_a_distance_of_zero(isa):
    values = inputs(points=1, k=1, missing=0.0)
    _, (grad_points, *_) = gradients(values)
    assert grad_points.isfinite().all()


@pytest.mark.parametrize("scale", [1e3, 1e30])
def test_local_attention_pool_keeps_large_scores_finite(scale, isa):
    values = inputs(torch.float32)
    values["score_weight"] = values["score_weight"] * scale
    pooled, grads = gradients(values)
    wide = map_tensors(values, lambda t: t.double() if t.is_floating_point() else t)
    expected = reference.local_attention_pool(**wide)
    torch.testing.assert_close(pooled.double(), expected, rtol=1e-2, atol=1e-2)
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "anywhere"])
@pytest.mark.parametrize("channels", [8, 16])
@pytest.mark.parametrize("scale", [0.0, 15.0, 60.0])
@pytest.mark.parametrize("level", [-200.0, 0.0, 200.0])
def test_local_attention_pool_of_scores_far_from_zero(ordered, channels, scale, level, isa):
    """Weights of the softmax over- and underflow unless they are relative to the largest."""
    values = inputs(torch.float32, points=150, k=16, channels=channels, widths=(channels,))
    if ordered:
        # A line whose points follow each other, which AVX-512 takes by tiles.
        values["points"] = torch.arange(150.0).view(1, 150, 1) / 50 + values["points"] / 100
        near = torch.arange(150).view(1, 150, 1) + torch.arange(-8, 8)
        values["neighbors"] = torch.where(values["neighbors"] < 0, -1, near.clamp(0, 149))
    values["features"][..., 0] = 1
    values["score_weight"] = values["score_weight"] * scale
    values["score_weight"][:, 0] = level
    wide = map_tensors(values, lambda t: t.double() if t.is_floating_point() else t)
    expected = reference.local_attention_pool(**wide)
    actual = avatar_ops.local_attention_pool(**values)
    torch.testing.assert_close(actual.double(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_local_attention_pool_answers_infinite_features_as_torch_does(value, isa):
    values = inputs(torch.float32, missing=0.0)
    values["features"][0, 7, 2] = value
    actual = avatar_ops.local_attention_pool(**values)
    expected = reference.local_attention_pool(**values)
    assert torch.equal(actual.isnan(), expected.isnan())
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_local_attention_pool_is_as_accurate_far_from_the_origin(isa):
    """Differences and distances that are exact in float32 give the result of the cloud near the origin."""
    near, far = inputs(torch.float32, offset=1.0), inputs(torch.float32, offset=4097.0)
    far["points"] = near["points"] + 4096
    assert torch.equal(far["points"] - 4096, near["points"])
    actual, expected = (avatar_ops.local_attention_pool(**values) for values in (far, near))
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("spread", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_local_attention_pool_of_near_neighbors(dtype, spread, slope, isa):
    """The nearer neighbours are, the fewer channels of the position code change their sign between them."""
    shape = {"points": 150, "channels": 24, "k": 18, "widths": (40,), "missing": 0.1}
    values = inputs(dtype, spread=spread, **shape)
    leaves = [
        values["features"],
        values["score_weight"],
        *values["position_weight"],
        *values["position_bias"],
    ]

    def derivatives(function, values, leaves):
        pooled = function(**values, negative_slope=slope)
        weights = torch.linspace(-1, 1, pooled.numel(), dtype=pooled.dtype).view(pooled.shape)
        return pooled, *torch.autograd.grad(pooled, leaves, weights)

    for leaf in leaves:
        leaf.requires_grad_()
    wide = map_tensors(values, lambda t: t.detach().double() if t.is_floating_point() else t)
    wide_leaves = [wide["features"], wide["score_weight"], *wide["position_weight"], *wide["position_bias"]]
    for leaf in wide_leaves:
        leaf.requires_grad_()
    actual = derivatives(avatar_ops.local_attention_pool, values, leaves)
    expected = derivatives(reference.local_attention_pool, wide, wide_leaves)
    tolerance = 3e-5 if dtype == torch.float32 else 1e-12
    for a, e in zip(actual, expected, strict=True):
        assert (a.double() - e).norm() <= tolerance * e.norm()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_local_attention_pool_answers_points_that_are_not_finite_as_torch_does(value, isa):
    values = inputs(torch.float32, points=60, channels=24, k=48, widths=(40,), spread=0.01, missing=0.0)
    values["points"][0, 7, 1] = value
    actual = avatar_ops.local_attention_pool(**values)
    expected = reference.local_attention_pool(**values)
    assert torch.equal(actual.isnan(), expected.isnan())
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_local_attention_pool_of_near_neighbors_has_same_bits_for_any_thread_count(isa):
    values = inputs(torch.float32, points=700, channels=24, k=16, widths=(40,), spread=0.1)
    leaves = [values["features"].requires_grad_(), values["score_weight"].requires_grad_()]

    def run(threads):
        torch.set_num_threads(threads)
        pooled = avatar_ops.local_attention_pool(**values)
        return pooled, *torch.autograd.grad(pooled.square().sum(), leaves)

    before = torch.get_num_threads()
    try:
        results = [run(threads) for threads in (1, 2, 3)]
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_local_attention_pool_takes_one_layer_with_or_without_a_list():
    values = inputs(widths=(7,))
    alone = {
        **values,
        "position_weight": values["position_weight"][0],
        "position_bias": values["position_bias"][0],
    }
    listed = {**values, "position_weight": tuple(values["position_weight"])}
    assert torch.equal(avatar_ops.local_attention_pool(**alone), avatar_ops.local_attention_pool(**listed))


def test_local_attention_pool_differentiates_only_what_asks_for_it():
    _, expected = gradients(inputs())
    values = inputs()
    score_weight = values["score_weight"].requires_grad_()
    actual = torch.autograd.grad(avatar_ops.local_attention_pool(**values).sum(), score_weight)[0]
    assert torch.equal(actual, expected[-1])


def test_local_attention_pool_without_statistics_refuses_to_differentiate():
    values, _ = require_grad(CASE, inputs())
    pooled, _ = torch.ops.avatar_ops.local_attention_pool(*values.values(), 0.2, False)
    with pytest.raises(RuntimeError, match="save_statistics=False"):
        pooled.sum().backward()


def test_local_attention_pool_refuses_no_layers():
    with pytest.raises(ValueError, match="position_weight: got an empty sequence"):
        avatar_ops.local_attention_pool(**{**inputs(), "position_weight": [], "position_bias": []})


def test_local_attention_pool_gives_the_same_gradients_in_rounds(isa):
    """So many neighbours for so few channels that the backward pass works through the rows in rounds."""
    values = inputs(torch.float64, batch=3, points=5000, channels=1, k=40, dims=2, widths=(2,))
    pooled, actual = gradients(values)
    expected_values, leaves = require_grad(CASE, values)
    expected_pooled = reference.local_attention_pool(**expected_values)
    torch.testing.assert_close(pooled, expected_pooled, rtol=1e-10, atol=1e-10)
    for a, e in zip(actual, torch.autograd.grad(expected_pooled.sum(), leaves), strict=True):
        assert (a - e).abs().max() <= 1e-10 * e.abs().max()


def test_local_attention_pool_forms_no_tensor_over_edges():
    points, channels, k = 60_000, 32, 32
    generator = torch.Generator().manual_seed(0)
    values = cases._pool_inputs(1, points, channels, k, 3, (channels,), 0.0)(generator, torch.float32)
    edge_tensor = points * k * 2 * channels * 4
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    gradients(values)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < edge_tensor / 2
