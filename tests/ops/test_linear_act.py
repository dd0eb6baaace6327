"""What is special to linear_act: rows at the ends of chunks, numbers that are not finite, several layers."""

import pytest
import torch

from avatar_ops import reference
from avatar_ops.linear_act import NormedLayer, linear_act, linear_act_layers, linear_norm_folds


@pytest.mark.parametrize("points", [5, 11, 12, 13, 191, 193, 400])
@pytest.mark.parametrize("outputs", [1, 8, 16, 17, 32, 40])
def test_linear_act_of_any_number_of_rows_and_columns(points, outputs, isa):
    x, weight = torch.randn(points, 9), torch.randn(outputs, 9)
    rest, places = torch.randn(4, outputs), torch.randint(4, (points,))
    for width in (4, None):
        own = x if width is None else x[:, :width]
        options = {"rest": rest, "places": places, "negative_slope": 0.1}
        if width is not None:
            options["beside"] = x[:, width:]
        actual = linear_act(own, weight, **options)
        expected = reference.linear_act(own, weight, **options)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_linear_act_keeps_nan_within_its_row(isa):
    x = torch.randn(30, 9)
    x[7, 3] = float("nan")
    y = linear_act(x, torch.randn(20, 9), negative_slope=0.2)
    assert y[7].isnan().all()
    assert y[:7].isfinite().all()
    assert y[8:].isfinite().all()


def test_linear_act_reads_nothing_past_the_rows_that_are_added(isa):
    """A narrow last row ends where its memory does."""
    x, weight = torch.randn(13, 4), torch.randn(5, 4)
    rest = torch.randn(13 * 5 + 64)
    rest[13 * 5 :] = float("nan")
    y = linear_act(x, weight, rest=rest[: 13 * 5].view(13, 5))
    assert y.isfinite().all()


def layers_of(*widths, beside=0, dtype=torch.float32):
    """Weights, biases and slopes of layers between these widths, the last one of `beside` more inputs."""
    inputs = [*widths[:-2], widths[-2] + beside]
    weights = [torch.randn(out, into, dtype=dtype) / 4 for into, out in zip(inputs, widths[1:], strict=True)]
    return (
        weights,
        [torch.randn(len(weight), dtype=dtype) for weight in weights],
        [0.2] * (len(weights) - 1) + [1],
    )


def one_by_one(x, weights, biases, slopes, beside=None, rest=None, places=None):
    for n, (weight, bias, slope) in enumerate(zip(weights, biases, slopes, strict=True)):
        x = reference.linear_act(
            x,
            weight,
            bias,
            beside=beside if n == len(weights) - 1 else None,
            rest=rest if n == 0 else None,
            places=places if n == 0 else None,
            negative_slope=slope,
        )
    return x


@pytest.mark.parametrize("points", [0, 1, 13, 191, 385])
@pytest.mark.parametrize("widths", [(9, 32), (9, 16, 19), (5, 40, 8, 33, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers_are_one_after_the_other(points, widths, dtype, isa):
    layers = layers_of(*widths, beside=6, dtype=dtype)
    x, beside = torch.randn(2, points, widths[0], dtype=dtype), torch.randn(2, points, 6, dtype=dtype)
    options = {"beside": beside, "rest": torch.randn(2, 4, widths[1], dtype=dtype)}
    options["places"] = torch.randint(4, (points,))
    actual = linear_act_layers(x, *layers, **options)
    torch.testing.assert_close(actual, one_by_one(x, *layers, **options), rtol=1e-4, atol=1e-4)
    targets = torch.randperm(points)
    assert torch.equal(linear_act_layers(x, *layers, targets=targets, **options)[:, targets], actual)
    options = {"rest": torch.randn(2, points, widths[1], dtype=dtype)}
    layers = layers_of(*widths, dtype=dtype)
    actual = linear_act_layers(x, *layers, **options)
    torch.testing.assert_close(actual, one_by_one(x, *layers, **options), rtol=1e-4, atol=1e-4)


def test_layers_have_gradients_where_they_are_wanted():
    weights, biases, slopes = layers_of(3, 4, 2, beside=2, dtype=torch.float64)
    x, beside = torch.randn(1, 5, 3).double().requires_grad_(), torch.randn(1, 5, 2).double().requires_grad_()
    weights = [weight.requires_grad_() for weight in weights]

    targets = torch.randperm(5)

    def through(x, beside, *weights):
        return linear_act_layers(x, weights, biases, slopes, beside=beside, targets=targets)

    assert torch.autograd.gradcheck(through, (x, beside, *weights))
    with torch.no_grad():
        alone = through(x, beside, *weights)
    torch.testing.assert_close(alone, through(x, beside, *weights).detach())


def test_layers_pass_opcheck():
    weights, biases, slopes = layers_of(3, 16, 5)
    args = (torch.randn(2, 7, 3), None, weights, biases, None, None, torch.randperm(7), slopes)
    torch.library.opcheck(torch.ops.avatar_ops.linear_act_layers.default, args)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.randn(4, 3)}, ValueError, "x: got shape"),
        ({"biases": []}, ValueError, "weights: got 2 with 0 biases"),
        ({"weights": [torch.randn(4, 3), torch.randn(2, 5)]}, ValueError, r"weights\[1\]"),
        ({"biases": [torch.randn(4), torch.randn(3)]}, ValueError, r"biases\[1\]"),
        ({"weights": [torch.randn(4, 3).double(), torch.randn(2, 4)]}, TypeError, r"weights\[0\]"),
        ({"negative_slopes": [0.2, 2.0]}, ValueError, "negative_slope"),
        ({"beside": torch.randn(1, 5, 1)}, ValueError, "beside"),
        ({"places": torch.zeros(6, dtype=torch.int64)}, ValueError, "places: got some without rest"),
        ({"targets": torch.arange(5)}, ValueError, "targets: got shape"),
        ({"targets": torch.arange(1, 7)}, IndexError, "linear_act_layers: targets"),
        ({"targets": torch.zeros(6, dtype=torch.int64)}, IndexError, r"every index in \[0, 6\) once"),
        (
            {"rest": torch.randn(1, 2, 4), "places": torch.tensor([0, 1, 0, 2, 0, 0])},
            IndexError,
            r"linear_act_layers: places\[3\] = 2",
        ),
    ],
)
def test_layers_reject(change, error, message):
    weights, biases, slopes = layers_of(3, 4, 2)
    arguments = {"x": torch.randn(1, 6, 3), "weights": weights, "biases": biases, "negative_slopes": slopes}
    with pytest.raises(error, match=message):
        linear_act_layers(**{**arguments, **change})


def normed_layer(inputs, outputs, dtype, statistics=None):
    vectors = [torch.randn(outputs).to(dtype) for _ in range(3)]
    mean, variance = (torch.rand(outputs).to(statistics or dtype) for _ in range(2))
    return NormedLayer(torch.randn(outputs, inputs).to(dtype), *vectors, mean, variance)


@pytest.mark.parametrize(
    ("dtype", "statistics"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float64),
    ],
    ids=str,
)
def test_folds_do_linear_map_and_norm_at_once(dtype, statistics):
    layers = [normed_layer(*sizes, dtype, statistics) for sizes in ((3, 8), (300, 500), (5, 0), (1, 1))]
    eps = [1e-6, 1e-3, 1e-6, 0.1]
    for layer, each, (weight, bias) in zip(layers, eps, linear_norm_folds(layers, eps), strict=True):
        assert weight.dtype == bias.dtype == dtype
        own_weight, own_bias, scale, shift, mean, variance = (part.double() for part in layer)
        scale = scale / (variance + each).sqrt()
        tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(weight.double(), own_weight * scale[:, None], **tolerance)
        torch.testing.assert_close(bias.double(), (own_bias - mean) * scale + shift, **tolerance)


def test_folds_have_gradients_where_they_are_wanted():
    parts = [part.requires_grad_() for part in normed_layer(3, 4, torch.float64)]
    assert torch.autograd.gradcheck(lambda *parts: linear_norm_folds([NormedLayer(*parts)], [1e-3])[0], parts)
    assert linear_norm_folds([], []) == []


def test_folds_pass_opcheck():
    parts = [part for sizes in ((3, 4), (2, 5)) for part in normed_layer(*sizes, torch.float32)]
    torch.library.opcheck(torch.ops.avatar_ops.linear_norm_fold.default, (parts, [1e-6, 1e-3]))
