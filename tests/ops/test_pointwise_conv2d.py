"""Convolutions of 1x1 with few outputs, as toRGB's."""

import pytest
import torch

import avatar_ops
from avatar_ops import reference

# Inputs, outputs, height, width: part of a vector, several tasks with a rest, one pixel, no input.
SHAPES = [(7, 1, 3, 5), (16, 2, 1, 1), (33, 3, 67, 61), (20, 4, 9, 15), (5, 8, 8, 33), (0, 3, 4, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference(isa, shape, dtype):
    inputs, outputs, height, width = shape
    x, weight = torch.randn(3, inputs, height, width).to(dtype), torch.randn(outputs, inputs, 1, 1).to(dtype)
    styles, bias = torch.randn(3, inputs).to(dtype), torch.randn(outputs).to(dtype)
    options = {"demodulate": False, "clamp": 3.0}
    actual = avatar_ops.modulated_conv2d(x, weight, styles, bias=bias, **options)
    wide = [t.double() for t in (x, weight, styles)]
    expected = reference.modulated_conv2d(*wide, bias=bias.double(), **options)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2 * torch.finfo(dtype).eps)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def test_takes_any_layout_of_the_image(isa):
    x = torch.randn(2, 12, 10, 9).to(memory_format=torch.channels_last)
    weight, styles = torch.randn(3, 12, 1, 1), torch.randn(12, 2).t()
    expected = avatar_ops.modulated_conv2d(x.contiguous(), weight, styles.contiguous())
    assert torch.equal(avatar_ops.modulated_conv2d(x, weight, styles), expected)


def test_an_input_that_is_not_finite_stays_in_its_pixel(isa):
    x = torch.randn(1, 8, 20, 20)
    x[0, 3, 5, 6] = torch.nan
    y = avatar_ops.modulated_conv2d(x, torch.randn(3, 8, 1, 1), torch.randn(1, 8), demodulate=False)
    assert y[..., 5, 6].isnan().all()
    assert y.isnan().sum() == 3


def test_gives_the_same_bits_for_any_thread_count(isa):
    x, weight, styles = torch.randn(2, 64, 80, 80), torch.randn(3, 64, 1, 1), torch.randn(2, 64)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(avatar_ops.modulated_conv2d(x, weight, styles))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
