"""Convolutions of few pixels: what decides for them, and their results."""

import pytest
import torch

import avatar_ops
from avatar_ops._shared_conv2d import Geometry
from avatar_ops._small_conv2d import small_convolve, small_pays
from avatar_ops.conv2d_act import conv2d_act

# Batch, inputs, outputs, height, width.
SHAPES = [(1, 16, 7, 4, 4), (3, 5, 16, 3, 7), (2, 33, 4, 1, 1), (1, 1, 1, 2, 64)]


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_small_convolutions_keep_the_accuracy_bound(isa, shape, up):
    batch, inputs, outputs, height, width = shape
    x, weight = torch.randn(batch, inputs, height, width), torch.randn(outputs, inputs, 3, 3)
    styles, noise = torch.randn(batch, inputs), torch.randn(batch, 1, up * height, up * width)
    assert small_pays(x, weight, Geometry(up, 1, 1, False, 4.0))
    actual = avatar_ops.modulated_conv2d(x, weight, styles, up=up, noise=noise)
    wide = [t.double() for t in (x, weight, styles)]
    assert relative_error(actual, avatar_ops.modulated_conv2d(*wide, up=up, noise=noise.double())) < 2e-6


@pytest.mark.parametrize("padding", [0, 1, 2, 4])
def test_takes_any_padding(isa, padding):
    x, weight = torch.randn(2, 9, 5, 6), torch.randn(8, 9, 3, 3)
    expected = torch.nn.functional.conv2d(x.double(), weight.double(), padding=padding)
    size = expected.shape[2:]
    actual = small_convolve(x, weight, None, None, Geometry(1, 1, padding, False, 1.0), size)
    assert actual.shape == expected.shape
    assert relative_error(actual, expected) < 2e-6


def test_leaves_the_rest_to_others():
    weight = torch.randn(4, 4, 3, 3)
    plain = Geometry(1, 1, 1, False, 1.0)
    assert not small_pays(torch.randn(2, 4, 16, 16), weight, plain)
    assert not small_pays(torch.randn(0, 4, 4, 4), weight, plain)
    assert not small_pays(torch.randn(1, 4, 4, 4), weight, plain._replace(down=2))
    assert not small_pays(torch.randn(1, 4, 4, 4), weight, plain._replace(before=-1))
    assert not small_pays(torch.randn(1, 4, 4, 4).double(), weight.double(), plain)


def test_gives_the_same_bits_for_any_thread_count(isa):
    x, weight = torch.randn(2, 64, 8, 8), torch.randn(48, 64, 3, 3)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(conv2d_act(x, weight, activation="lrelu"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
