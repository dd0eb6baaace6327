"""What is special to bias_act."""

import math

import pytest
import torch

import avatar_ops


def gradient(function, x, **options):
    leaf = x.clone().requires_grad_()
    y = function(leaf, **options)
    return torch.autograd.grad(y, leaf, torch.ones_like(y))[0]


def test_default_gains():
    x = torch.tensor([[1.0, -1.0]])
    assert avatar_ops.bias_act(x, activation="linear").tolist() == [[1, -1]]
    torch.testing.assert_close(
        avatar_ops.bias_act(x, activation="lrelu"), torch.tensor([[math.sqrt(2), -0.2 * math.sqrt(2)]])
    )


def test_nan_passes_and_infinity_is_clamped():
    x = torch.tensor([[math.nan, math.inf, -math.inf]])
    y = avatar_ops.bias_act(x, activation="lrelu", clamp=2.0)
    assert y[0, 0].isnan()
    assert y[0, 1:].tolist() == [2, -2]
    assert avatar_ops.bias_act(x, activation="lrelu").isnan().tolist() == [[True, False, False]]


@pytest.mark.parametrize("gain", [1.5, 0.5, -2.0])
def test_derivatives_at_kinks(gain):
    """Zero counts as negative, a value at the clamp as clamped; a NaN has no derivative once it is clamped."""
    x = torch.tensor([[0.0, -0.0, 1.0, -1.0, 5.0, -5.0, math.nan]])
    for clamp, slopes in (
        (None, [0.2, 0.2, 1, 0.2, 1, 0.2, 0.2]),
        (abs(gain), [0.2, 0.2, 0, 0.2, 0, 0, 0]),
    ):
        actual = gradient(avatar_ops.bias_act, x, activation="lrelu", gain=gain, clamp=clamp)
        torch.testing.assert_close(actual, gain * torch.tensor([slopes]))


def test_gain_that_underflows_keeps_the_derivative():
    x = torch.tensor([[1e-4, -1e-4]], dtype=torch.float16)
    actual = gradient(avatar_ops.bias_act, x, activation="lrelu", gain=1e-4)
    torch.testing.assert_close(actual, torch.tensor([[1e-4, 2e-5]], dtype=torch.float16))


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"activation": "linear"}, 0),
        ({"activation": "lrelu"}, 1),
        ({"activation": "lrelu", "clamp": 1.0}, 2),
        ({"activation": "lrelu", "gain": 0.5}, 2),
    ],
)
def test_keeps_only_what_the_derivative_needs(options, count):
    kept = []
    x, bias = torch.randn(2, 3, 4, requires_grad=True), torch.randn(3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        avatar_ops.bias_act(x, bias, **options)
    assert len(kept) == count


def test_bias_gradient_has_the_same_bits_for_any_thread_count():
    x, bias = torch.randn(3, 7, 120, 121), torch.randn(7)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            leaves = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
            y = avatar_ops.bias_act(*leaves, activation="lrelu", clamp=1.0)
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))


def test_second_derivatives_with_and_without_bias():
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    for options in ({"activation": "lrelu"}, {"activation": "linear", "clamp": 0.7, "gain": 0.5}):
        assert torch.autograd.gradgradcheck(
            lambda x, b, options=options: avatar_ops.bias_act(x, b, **options), (x, bias)
        )
        assert torch.autograd.gradgradcheck(
            lambda x, options=options: avatar_ops.bias_act(x, **options).pow(3), (x,)
        )


def test_autocast_keeps_the_dtype_of_the_input():
    x, bias = torch.randn(2, 3, 4, dtype=torch.bfloat16), torch.randn(3)
    with torch.autocast("cpu", torch.float16):
        assert avatar_ops.bias_act(x, bias, activation="lrelu").dtype == torch.bfloat16
        assert avatar_ops.bias_act(x.float(), bias, activation="lrelu").dtype == torch.float32
