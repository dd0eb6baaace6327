"""What is special to upfirdn2d."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import avatar_ops
from avatar_ops import reference


def numbers(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


@settings(max_examples=150, deadline=None)
@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 70)),
    taps=st.one_of(st.tuples(st.integers(1, 9)), st.tuples(st.integers(1, 5), st.integers(1, 5))),
    up=st.integers(1, 5),
    down=st.integers(1, 5),
    padding=st.tuples(*[st.integers(-4, 9)] * 4),
)
def test_any_geometry_matches_the_reference(size, taps, up, down, padding):
    x, f = numbers(2, 1, *size), numbers(*taps)
    # Torch's own padding, in the reference, cannot crop more on one side than there is.
    assume(min(padding[:2]) >= -size[1] * up and min(padding[2:]) >= -size[0] * up)
    options = {"up": up, "down": down, "padding": padding, "gain": 1.5}
    left = (
        size[0] * up + padding[2] + padding[3] - taps[0],
        size[1] * up + padding[0] + padding[1] - taps[-1],
    )
    if min(left) < 0:
        with pytest.raises(ValueError, match="padding: got"):
            avatar_ops.upfirdn2d(x, f, **options)
    else:
        torch.testing.assert_close(
            avatar_ops.upfirdn2d(x, f, **options), reference.upfirdn2d(x, f, **options)
        )


def test_convolves_rather_than_correlates():
    impulse = torch.zeros(1, 1, 5, 5)
    impulse[0, 0, 2, 2] = 1
    f = torch.arange(6.0).reshape(2, 3)
    result = avatar_ops.upfirdn2d(impulse, f, padding=(1, 1, 1, 0))
    assert torch.equal(result[0, 0, 2:4, 1:4], f)
    assert result.sum() == f.sum()


def test_inserts_zeros_after_each_sample():
    result = avatar_ops.upfirdn2d(torch.tensor([[[[1.0, 2.0]]]]), torch.ones(1, 1), up=3)
    assert result[0, 0].tolist() == [[1, 0, 0, 2, 0, 0], [0] * 6, [0] * 6]


def test_separable_filter_equals_its_outer_product():
    x, f = numbers(2, 3, 20, 30), numbers(5)
    options = {"up": 2, "down": 3, "padding": (3, 4, 1, 2), "gain": -2.0}
    torch.testing.assert_close(
        avatar_ops.upfirdn2d(x, f, **options), avatar_ops.upfirdn2d(x, torch.outer(f, f), **options)
    )


def test_integer_padding_is_for_all_sides():
    x, f = numbers(1, 2, 6, 7), numbers(3, 2)
    expected = avatar_ops.upfirdn2d(x, f, padding=(2, 2, 2, 2))
    assert torch.equal(avatar_ops.upfirdn2d(x, f, padding=2), expected)
    assert torch.equal(avatar_ops.upfirdn2d(x, f, padding=[2, 2, 2, 2]), expected)


def test_crops_everything_on_one_side():
    result = avatar_ops.upfirdn2d(numbers(1, 1, 4, 4), numbers(2), padding=(-6, 9, 0, 0))
    assert torch.equal(result, torch.zeros(1, 1, 3, 6, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_image_wants_a_filter_of_its_dtype(dtype):
    x, f = numbers(1, 1, 8, 8, dtype=dtype), torch.tensor([1.0, 3.0, 3.0, 1.0])
    assert avatar_ops.upfirdn2d(x, f.to(dtype)).dtype == dtype
    with pytest.raises(TypeError, match=r"f: got dtype torch\.float32"):
        avatar_ops.upfirdn2d(x, f)


def test_autocast_keeps_the_dtype_of_the_image():
    x, f = numbers(1, 1, 8, 8, dtype=torch.bfloat16), torch.tensor([1.0, 3.0, 3.0, 1.0])
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(avatar_ops.upfirdn2d(x, f), avatar_ops.upfirdn2d(x, f.bfloat16()))
        assert avatar_ops.upfirdn2d(x.float(), f).dtype == torch.float32


@pytest.mark.parametrize(
    ("taps", "up", "down", "padding"),
    [
        ((4,), 2, 1, (2, 1, 2, 1)),
        ((4, 3), 1, 2, (1, 1, -1, 2)),
        ((3,), 3, 2, (0, 5, 2, -1)),
        ((2, 5), 2, 3, 2),
    ],
)
def test_derivatives_up_to_the_third(taps, up, down, padding):
    x, f = numbers(1, 2, 4, 5).requires_grad_(), numbers(*taps).requires_grad_()

    def run(x, f):
        return avatar_ops.upfirdn2d(x, f, up=up, down=down, padding=padding, gain=1.7)

    assert torch.autograd.gradcheck(run, (x, f))
    assert torch.autograd.gradgradcheck(run, (x, f))
    (first,) = torch.autograd.grad(run(x, f).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)
    assert torch.autograd.grad(second.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize(("taps", "up", "down"), [((4,), 2, 1), ((4, 4), 1, 2), ((12,), 1, 1)])
def test_large_images_have_the_same_bits_for_any_thread_count(taps, up, down):
    x, f = numbers(1, 3, 300, 257, dtype=torch.float32), numbers(*taps, dtype=torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            leaf = x.clone().requires_grad_()
            y = avatar_ops.upfirdn2d(leaf, f, up=up, down=down, padding=3)
            results.append((y, *torch.autograd.grad(y.square().sum(), leaf)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))
    torch.testing.assert_close(
        results[0][0], reference.upfirdn2d(x, f, up=up, down=down, padding=3), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("taps", [(80, 80), (80,)], ids=str)
def test_takes_filters_of_many_taps(taps):
    x, f = numbers(1, 2, 50, 40).requires_grad_(), numbers(*taps)
    options = {"up": 2, "down": 3, "padding": (31, 12, 3, -2), "gain": 0.3}
    results = []
    for run in (avatar_ops.upfirdn2d, reference.upfirdn2d):
        y = run(x, f, **options)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_compiles_for_dynamic_sizes():
    torch._dynamo.reset()
    f = torch.tensor([1.0, 3.0, 3.0, 1.0])
    compiled = torch.compile(
        lambda x: avatar_ops.upfirdn2d(x, f, up=2, padding=(2, 1, 2, 1)),
        backend="aot_eager",
        fullgraph=True,
        dynamic=True,
    )
    for size in (5, 8):
        x = numbers(1, 2, size, size + 1, dtype=torch.float32)
        assert torch.equal(compiled(x), avatar_ops.upfirdn2d(x, f, up=2, padding=(2, 1, 2, 1)))
