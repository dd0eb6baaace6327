"""Winograd's form of modulated_conv2d on the CPU: accuracy, derivatives, and which calls take it."""

import importlib

import pytest
import torch

import avatar_ops
from avatar_ops import reference

# The package's attribute of this name is the function.
shared_conv2d = importlib.import_module("avatar_ops._shared_conv2d")
modulated_conv2d = importlib.import_module("avatar_ops.modulated_conv2d")
MODES = {"plain": {}, "up": {"up": 2}, "down": {"down": 2}}
FILTERS = {
    "default": None,
    "one-tap": torch.tensor([1.0]),
    "asymmetric": torch.tensor([1.0, -0.4, 2.0]),
    "not-separable": torch.tensor([[1.0, 3, 0, 1], [0, 2, 1, 5], [2, 0, 0, 1], [4, 1, 1, 0]]),
    "eight-taps": torch.arange(8.0) - 2,
}


def assert_accurate(actual, expected):
    assert (actual.double() - expected).norm() <= 4e-6 * expected.norm()


def winograd_pays(x, weight, size, f=None, padding=1, up=1, down=1):
    if f is None and up * down == 2:
        f = torch.ones(4)
    geometry = modulated_conv2d._geometry(3, f, padding, up, down)
    return shared_conv2d.winograd_pays(x, weight, f, geometry, size)


def image_layer(batch, channels, outputs, height, width):
    x = torch.randn(batch, channels, height, width)
    return x, torch.randn(outputs, channels, 3, 3), torch.randn(batch, channels) + 1


def widened(values):
    return {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in values.items()}


@pytest.mark.parametrize("padding", [0, 1, 2, 5])
@pytest.mark.parametrize(
    "shape", [(2, 32, 64, 16, 16), (1, 33, 37, 29, 31), (3, 16, 50, 13, 40), (7, 512, 16, 12, 12)], ids=str
)
def test_winograd_keeps_the_accuracy_bound(shape, padding, isa):
    x, weight, styles = image_layer(*shape)
    batch, _, outputs, height, width = shape
    size = (height + 2 * padding - 2, width + 2 * padding - 2)
    assert winograd_pays(x, weight, size, padding=padding)
    bias = torch.randn(outputs)
    for options in (
        {"noise": torch.randn(batch, 1, *size), "bias": bias, "activation": "lrelu"},
        {"noise": torch.randn(size), "activation": "lrelu", "clamp": 0.5, "gain": 0.7},
        {"bias": bias, "demodulate": False},
    ):
        actual = avatar_ops.modulated_conv2d(x, weight, styles, padding=padding, **options)
        expected = reference.modulated_conv2d(
            x.double(), weight.double(), styles.double(), padding=padding, **widened(options)
        )
        assert_accurate(actual, expected)


def test_winograd_takes_images_of_one_row_and_empty_batches(isa):
    weight = torch.randn(16, 16, 3, 3)
    for shape in ((1, 16, 1, 1), (2, 16, 1, 90), (2, 16, 90, 1), (0, 16, 8, 8)):
        x, styles = torch.randn(shape), torch.randn(shape[:2])
        y = torch.full((shape[0], 16, *shape[2:]), torch.nan)
        torch.ops.avatar_ops.modulated_conv2d_winograd(
            x, weight, styles, None, None, None, y, None, None, 1, 1, 1, False, 1.0, 1.0, 1.0, None
        )
        exact = reference.modulated_conv2d(x.double(), weight.double(), styles.double(), demodulate=False)
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("padding", [0, 1, 2, 3])
def test_derivatives_through_winograd_keep_the_accuracy_bound(padding, isa):
    """First and second derivatives; with a padding above 2 the gradients are computed directly."""

    def derivatives(function, dtype):
        torch.manual_seed(0)
        leaves = [t.to(dtype).requires_grad_() for t in image_layer(3, 18, 17, 28, 30)]
        bias = torch.randn(17).to(dtype).requires_grad_()
        y = function(*leaves, bias=bias, activation="lrelu", padding=padding)
        assert winograd_pays(leaves[0].float(), leaves[1].float(), y.shape[2:], padding=padding)
        leaves.append(bias)
        first = torch.autograd.grad((y * torch.randn(y.shape)).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), leaves[:3])
        return [y, *first, *second]

    expected = derivatives(reference.modulated_conv2d, torch.float64)
    for a, e in zip(derivatives(avatar_ops.modulated_conv2d, torch.float32), expected, strict=True):
        assert_accurate(a, e)


def test_winograd_weight_gradient_of_no_images_is_zero():
    grad = torch.ops.avatar_ops.modulated_conv2d_winograd_weight(
        torch.ones(0, 5, 8, 8), torch.ones(0, 3, 8, 8), None, None, None, 1, 1, 1, False, 1.0
    )
    assert torch.equal(grad, torch.zeros(5, 3, 3, 3))


def test_winograd_gives_the_same_bits_for_any_thread_count(isa):
    """Also where the work is cut between outputs, and where the weights come in several rounds."""
    before = torch.get_num_threads()
    try:
        for shape in ((2, 40, 130, 30, 30), (1, 512, 520, 16, 16)):
            tensors = image_layer(*shape)
            results = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                y = avatar_ops.modulated_conv2d(*tensors)
                grad_weight = torch.ops.avatar_ops.modulated_conv2d_winograd_weight(
                    y.cos(), tensors[0], None, None, None, 1, 1, 1, False, 1.0
                )
                results.append((y, grad_weight))
            for result in results[1:]:
                assert all(torch.equal(a, e) for a, e in zip(result, results[0], strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("f", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("mode", ["up", "down"])
def test_resampled_winograd_keeps_the_accuracy_bound(mode, padding, f, isa):
    """Sizes that no tile divides, more channels and outputs than a block, and every part of the epilogue."""
    x, weight, styles = image_layer(2, 33, 37, 37, 30)
    geometry = {"padding": padding, "resample_filter": f, **MODES[mode]}
    shape = reference.modulated_conv2d(x, weight, styles, **geometry).shape
    assert winograd_pays(x, weight, shape[2:], **MODES[mode])
    bias = torch.randn(37)
    for options in (
        {"noise": torch.randn(2, 1, *shape[2:]), "bias": bias, "activation": "lrelu"},
        {"noise": torch.randn(shape[2:]), "activation": "lrelu", "clamp": 0.5, "gain": 0.7},
        {"bias": bias, "demodulate": False},
    ):
        actual = avatar_ops.modulated_conv2d(x, weight, styles, **options, **geometry)
        wide = widened({**options, **geometry})
        assert_accurate(
            actual, reference.modulated_conv2d(x.double(), weight.double(), styles.double(), **wide)
        )


@pytest.mark.parametrize("mode", ["up", "down"])
@pytest.mark.parametrize(
    "shape",
    [(1, 16, 16, 1, 1), (1, 16, 16, 1, 90), (2, 16, 20, 90, 3), (30, 17, 16, 4, 4), (0, 16, 16, 8, 8)],
    ids=str,
)  # fmt: skip
def test_resampled_winograd_takes_images_of_any_size(mode, shape, isa, monkeypatch):
    """Also where it would not pay."""
    monkeypatch.setattr(modulated_conv2d, "winograd_pays", lambda *args: True)
    x, weight, styles = image_layer(*shape)
    geometry = {"padding": 2, **MODES[mode]}
    actual = avatar_ops.modulated_conv2d(x, weight, styles, **geometry)
    exact = reference.modulated_conv2d(x.double(), weight.double(), styles.double(), **geometry)
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("f", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("mode", ["up", "down"])
def test_derivatives_through_resampled_winograd_keep_the_accuracy_bound(mode, f, isa):
    """First and second derivatives, with and without the graph of the first ones."""

    def derivatives(function, dtype):
        torch.manual_seed(0)
        size = (28, 30) if mode == "up" else (59, 61)
        leaves = [t.to(dtype).requires_grad_() for t in image_layer(3, 18, 17, *size)]
        bias = torch.randn(17).to(dtype).requires_grad_()
        taps = None if f is None else f.to(dtype)
        y = function(*leaves, bias=bias, activation="lrelu", resample_filter=taps, **MODES[mode])
        assert winograd_pays(leaves[0], leaves[1].float(), y.shape[2:], **MODES[mode])
        leaves.append(bias)
        value = (y * torch.randn(y.shape)).sum()
        alone = torch.autograd.grad(value, leaves, retain_graph=True)
        first = torch.autograd.grad(value, leaves, create_graph=True)
        second = torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), leaves[:3])
        return [y, *alone, *first, *second]

    expected = derivatives(reference.modulated_conv2d, torch.float64)
    for a, e in zip(derivatives(avatar_ops.modulated_conv2d, torch.float32), expected, strict=True):
        assert_accurate(a, e)


@pytest.mark.parametrize("mode", ["up", "down"])
def test_gradient_in_the_resampling_filter_matches_the_reference(mode):
    def gradients(function, dtype):
        torch.manual_seed(0)
        leaves = [t.to(dtype).requires_grad_() for t in image_layer(2, 16, 16, 32, 32)]
        leaves.append(FILTERS["not-separable"].to(dtype).requires_grad_())
        y = function(*leaves[:3], resample_filter=leaves[3], **MODES[mode])
        return torch.autograd.grad((y * torch.randn(y.shape)).sum(), leaves)

    expected = gradients(reference.modulated_conv2d, torch.float64)
    for a, e in zip(gradients(avatar_ops.modulated_conv2d, torch.float32), expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-5 * float(e.norm()))


@pytest.mark.parametrize("mode", MODES)
def test_strided_and_expanded_images_give_the_same_bits(mode):
    x, weight, styles = image_layer(2, 16, 16, 32, 32)
    expected = avatar_ops.modulated_conv2d(x, weight, styles, demodulate=False, **MODES[mode])
    views = (
        x.to(memory_format=torch.channels_last),
        weight.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        styles.t().contiguous().t(),
    )
    assert torch.equal(avatar_ops.modulated_conv2d(*views, demodulate=False, **MODES[mode]), expected)


@pytest.mark.parametrize("mode", ["up", "down"])
def test_resampled_winograd_gives_the_same_bits_for_any_thread_count(mode, isa):
    """Also where stripes start within a sample, and where the work is cut between outputs."""
    f = FILTERS["not-separable"]
    geometry = modulated_conv2d._geometry(3, f, 1, MODES[mode].get("up", 1), MODES[mode].get("down", 1))
    ops = torch.ops.avatar_ops
    before = torch.get_num_threads()
    try:
        for shape in ((1, 20, 70, 90, 50), (5, 16, 33, 12, 8)):
            x, weight, styles = image_layer(*shape)
            size = [2 * n if mode == "up" else n // 2 for n in shape[3:]]
            grad = torch.randn(shape[0], shape[2], *size)
            results = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                y = ops.modulated_conv2d_shared(x, weight, styles, f, *geometry, *size)
                grad_weight = ops.modulated_conv2d_winograd_weight(grad, x, None, styles, f, *geometry)
                results.append((y, grad_weight))
            for result in results[1:]:
                assert all(torch.equal(a, e) for a, e in zip(result, results[0], strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_images_take_winograd_in_float32(mode, dtype):
    """The only error is that of rounding the result."""
    x, weight, styles = (t.to(dtype) for t in image_layer(2, 16, 24, 32, 32))
    y = avatar_ops.modulated_conv2d(x, weight, styles, **MODES[mode])
    wide = avatar_ops.modulated_conv2d(x.float(), weight.float(), styles.float(), **MODES[mode])
    assert torch.equal(y, wide.to(dtype))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_images_are_those_of_float32_rounded(mode, dtype, isa):
    """Of all sizes of numbers and none, in rows that no vector divides, with every part of the epilogue."""
    ops = torch.ops.avatar_ops
    up, down = MODES[mode].get("up", 1), MODES[mode].get("down", 1)
    f = None if mode == "plain" else FILTERS["asymmetric"]
    geometry = modulated_conv2d._geometry(3, f, 1, up, down)
    for height, width in ((18, 150), (8, 10), (5, 3)):
        x, weight, styles = image_layer(3, 16, 18, height, width)
        x = (x * 10.0 ** torch.randint(-9, 5, (3, 16, 1, 1))).to(dtype)
        x[0, 0, 0, 0], x[1, 2, -1, -1] = torch.nan, torch.inf
        scale = 10.0 ** torch.randint(-6, 1, (3, 18))
        size = [n * up // down for n in (height, width)]
        noise, bias = torch.randn(3, 1, *size), torch.randn(18)
        results = []
        for images in (x, x.float()):
            y = images.new_empty(3, 18, *size)
            demodulated = torch.empty_like(y)
            ops.modulated_conv2d_winograd(
                images, weight, styles, scale, noise, bias, y, demodulated, f, *geometry, 0.2, 1.4, None
            )
            results.append((y.to(dtype), demodulated.to(dtype)))
        for half, wide in zip(*results, strict=True):
            torch.testing.assert_close(half, wide, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("mode", MODES)
def test_transposed_weight_is_read_as_it_is(mode, isa):
    ops = torch.ops.avatar_ops
    f = None if mode == "plain" else FILTERS["asymmetric"]
    geometry = modulated_conv2d._geometry(3, f, 1, MODES[mode].get("up", 1), MODES[mode].get("down", 1))
    x, weight = torch.randn(2, 19, 12, 12), torch.randn(19, 34, 3, 3)
    size = {"plain": 12, "up": 24, "down": 6}[mode]
    actual = ops.modulated_conv2d_shared(x, weight, None, f, *geometry, size, size, True)
    turned = shared_conv2d.transposed_weight(weight)
    assert torch.equal(actual, ops.modulated_conv2d_shared(x, turned, None, f, *geometry, size, size))


@pytest.mark.parametrize("mode", MODES)
def test_weight_times_factors_is_added_to_its_gradient(mode, isa):
    """With all sums at once and with those of several blocks of tiles."""
    ops = torch.ops.avatar_ops
    f = None if mode == "plain" else FILTERS["asymmetric"]
    geometry = modulated_conv2d._geometry(3, f, 1, MODES[mode].get("up", 1), MODES[mode].get("down", 1))
    for batch, size in ((1, 12), (2, 48)):
        x, weight, factors = (
            torch.randn(batch, 33, size, size),
            torch.randn(37, 33, 3, 3),
            torch.randn(37, 33),
        )
        grad_size = {"plain": size, "up": 2 * size, "down": size // 2}[mode]
        grad = torch.randn(batch, 37, grad_size, grad_size)
        plain = ops.modulated_conv2d_winograd_weight(grad, x, None, None, f, *geometry)
        actual = ops.modulated_conv2d_winograd_weight(grad, x, None, None, f, *geometry, weight, factors)
        torch.testing.assert_close(actual, plain + weight * factors[:, :, None, None])
        leaf = grad.clone().requires_grad_()
        added = ops.modulated_conv2d_winograd_weight(leaf, x, None, None, f, *geometry, weight, factors)
        with pytest.raises(RuntimeError, match="has no derivative"):
            added.sum().backward()


@pytest.mark.parametrize("mode", MODES)
def test_opcheck_where_winograd_pays(mode):
    x, weight, styles = (t.requires_grad_() for t in image_layer(1, 16, 16, 32, 32))
    f = None if mode == "plain" else torch.tensor([1.0, 3, 3, 1]) / 8
    up, down = MODES[mode].get("up", 1), MODES[mode].get("down", 1)
    geometry = modulated_conv2d._geometry(3, f, 1, up, down)
    y = avatar_ops.modulated_conv2d(x, weight, styles, **MODES[mode])
    ops = torch.ops.avatar_ops
    torch.library.opcheck(
        ops.modulated_conv2d.default,
        (x, weight, styles, f, None, None, True, up, down, 1, 0.2, 1.4, None, 1e-8, True),
    )
    size = y.shape[2:]
    for transposed in (False, True):
        arguments = (x, weight, None, f, *geometry, *size, transposed)
        torch.library.opcheck(ops.modulated_conv2d_shared.default, arguments)
    grad = torch.randn(y.shape, requires_grad=True)
    torch.library.opcheck(ops.modulated_conv2d_winograd_weight.default, (grad, x, None, None, f, *geometry))


@pytest.mark.parametrize("mode", MODES)
def test_compiles_with_its_derivatives_where_winograd_pays(mode):
    torch._dynamo.reset()

    def gradients(function):
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = function(*leaves)
        return y, *torch.autograd.grad(y.square().sum(), leaves)

    tensors = image_layer(1, 16, 16, 40, 40)

    def layer(x, weight, styles):
        return avatar_ops.modulated_conv2d(x, weight, styles, activation="lrelu", **MODES[mode])

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for a, e in zip(gradients(compiled), gradients(layer), strict=True):
        torch.testing.assert_close(a, e)


def test_a_pass_with_factors_has_no_derivative():
    x, weight, styles = image_layer(1, 16, 16, 8, 8)
    y = torch.ops.avatar_ops.modulated_conv2d_shared(
        x.requires_grad_(), weight, styles, None, 1, 1, 1, False, 1.0, 8, 8
    )
    with pytest.raises(RuntimeError, match="has no derivative"):
        y.sum().backward()
