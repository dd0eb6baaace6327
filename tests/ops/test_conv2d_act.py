"""conv2d_act: torch's convolution, bias and activation, with both derivatives."""

import pytest
import torch
import torch.nn.functional as F

from avatar_ops import bias_act
from avatar_ops.conv2d_act import conv2d_act

# Batch, inputs, outputs, height, width, padding: Winograd's form for all, for the images alone, and direct.
SHAPES = [(2, 16, 17, 33, 30, 1), (1, 20, 16, 12, 11, 0), (2, 3, 16, 9, 8, 1), (1, 16, 16, 6, 6, 2)]
TAPS = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
OPTIONS = [
    {"activation": "lrelu"},
    {"activation": "lrelu", "gain": 0.5},
    {"activation": "linear", "gain": 0.5},
]


def make(shape, dtype=torch.float32):
    batch, inputs, outputs, height, width, padding = shape
    x, weight = torch.randn(batch, inputs, height, width), torch.randn(outputs, inputs, 3, 3) / inputs**0.5
    return [t.to(dtype) for t in (x, weight, torch.randn(outputs))], padding


def plain(x, weight, bias, *, padding, activation, gain=None, stride=1, f=None):
    if f is not None:
        filters = torch.outer(f, f).to(x).expand(x.shape[1], 1, -1, -1)
        x, padding = F.conv2d(x, filters, padding=padding + 1, groups=x.shape[1]), 0
    y = F.conv2d(x, weight, bias, stride=stride, padding=padding)
    if activation == "lrelu":
        return F.leaky_relu(y, 0.2) * (2**0.5 if gain is None else gain)
    return y * (1 if gain is None else gain)


def derivatives(function, tensors, **options):
    """The result, its gradients, and those of a penalty on the gradient in the image."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves, **options)
    first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(first[0].square().sum(), leaves)
    return [y, *first, *second]


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_torch(isa, shape, options):
    tensors, padding = make(shape)
    actual = derivatives(conv2d_act, tensors, padding=padding, **options)
    expected = derivatives(plain, [t.double() for t in tensors], padding=padding, **options)
    for value, want in zip(actual, expected, strict=True):
        assert value.shape == want.shape
        assert relative_error(value, want) < 4e-6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_torch_where_it_halves_the_size(isa, shape):
    tensors, padding = make(shape)
    options = {"padding": padding, "stride": 2, "f": TAPS, "activation": "lrelu", "gain": 1.0}
    actual = derivatives(conv2d_act, tensors, **options)
    expected = derivatives(plain, [t.double() for t in tensors], **options)
    for value, want in zip(actual, expected, strict=True):
        assert value.shape == want.shape
        assert relative_error(value, want) < 4e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_and_strides_are_those_of_torch(dtype):
    (x, weight, bias), _ = make((2, 16, 16, 9, 9, 0), dtype)
    actual = conv2d_act(x, weight, bias, stride=2, activation="lrelu")
    y = F.conv2d(x, weight, stride=2, padding=1)
    assert torch.equal(actual, bias_act(y, bias, activation="lrelu"))
    filtered = conv2d_act(x, weight, bias, stride=2, f=TAPS.to(dtype), activation="lrelu")
    expected = plain(
        x.double(), weight.double(), bias.double(), padding=1, stride=2, f=TAPS, activation="lrelu"
    )
    assert relative_error(filtered, expected) < (1e-12 if dtype == torch.float64 else 0.01)


def test_takes_empty_batches():
    (x, weight, bias), padding = make((0, 16, 16, 8, 8, 1))
    x.requires_grad_(), weight.requires_grad_()
    y = conv2d_act(x, weight, bias, padding=padding)
    assert y.shape == (0, 16, 8, 8)
    grad_x, grad_weight = torch.autograd.grad(y.sum(), [x, weight])
    assert grad_x.shape == x.shape
    assert not grad_weight.any()


def test_opcheck():
    (x, weight, bias), _ = make((1, 16, 16, 16, 16, 1))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    for f, down, before, size in ((None, 1, 1, 16), (TAPS, 2, 2, 8)):
        arguments = (*leaves[:2], f, bias, 1, down, before, False, 1.0, size, size, 0.2, 2**0.5)
        torch.library.opcheck(torch.ops.avatar_ops.conv2d_act.default, arguments)


def test_makes_the_gradients_asked_for_alone():
    tensors, padding = make(SHAPES[0])
    x, weight, bias = (t.requires_grad_() for t in tensors)
    inside = 2 * x
    y = conv2d_act(inside, weight, bias, padding=padding, activation="lrelu")
    with torch.profiler.profile() as profile:
        torch.autograd.grad(y.sum(), inside, retain_graph=True)
    names = {event.key for event in profile.key_averages()}
    assert "avatar_ops::modulated_conv2d_shared" in names
    assert "avatar_ops::modulated_conv2d_winograd_weight" not in names
    assert all(t is not None for t in torch.autograd.grad(y.sum(), [x, weight, bias]))
