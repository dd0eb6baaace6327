"""What modulated_conv2d's gradients share: scaled images and their products with others."""

import pytest
import torch

import avatar_ops
from avatar_ops.modulated_conv2d_scale import scale_and_sum


def plain(images, others, factors):
    return images * factors[:, :, None, None], (images * others).sum((2, 3))


def make(size, dtype=torch.float64):
    shape = (2, 3, *size)
    return [t.to(dtype).requires_grad_() for t in (torch.randn(shape), torch.randn(shape), torch.randn(2, 3))]


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (16, 16), (0, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_matches_the_plain_form(isa, size, dtype):
    inputs = make(size, dtype)
    results = [function(*inputs) for function in (scale_and_sum, plain)]
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected)
    weights = [torch.randn_like(value) for value in results[0]]
    gradients = [torch.autograd.grad(result, inputs, weights) for result in results]
    for value, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(value, expected)


def test_derivatives_of_either_result_and_higher_ones():
    inputs = make((2, 3))
    assert torch.autograd.gradcheck(scale_and_sum, inputs)
    assert torch.autograd.gradgradcheck(scale_and_sum, inputs)
    for index in range(2):
        assert torch.autograd.gradcheck(lambda *values, index=index: scale_and_sum(*values)[index], inputs)


def test_opcheck():
    torch.library.opcheck(torch.ops.avatar_ops.modulated_conv2d_scale.default, make((3, 5)))


def test_noncontiguous_and_expanded_images():
    images, others, factors = (t.detach() for t in make((4, 6)))
    expanded = others[:1].expand(2, -1, -1, -1)
    actual = scale_and_sum(images.transpose(2, 3), expanded.transpose(2, 3), factors)
    for value, expected in zip(
        actual, plain(images.transpose(2, 3), expanded.transpose(2, 3), factors), strict=True
    ):
        torch.testing.assert_close(value, expected)


def test_gradients_in_styles_alone_make_none_of_the_weight():
    """As for the length of a generator's paths."""
    x, weight = torch.randn(1, 16, 24, 24), torch.randn(16, 16, 3, 3, requires_grad=True)
    styles = torch.randn(1, 16, requires_grad=True)
    y = avatar_ops.modulated_conv2d(x, weight, 2 * styles, activation="lrelu")
    with torch.profiler.profile() as profile:
        (gradient,) = torch.autograd.grad(y.sum(), styles, create_graph=True)
    names = {event.key for event in profile.key_averages()}
    assert "avatar_ops::modulated_conv2d_scale" in names
    assert not names & {"avatar_ops::modulated_conv2d_winograd_weight", "aten::convolution_backward"}
    assert torch.autograd.grad(gradient.square().sum(), weight)[0].any()
