"""What is special to modulated_conv2d and its module."""

import importlib

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import avatar_ops
from avatar_ops import reference
from avatar_ops.nn import ModulatedConv2d

# The package's attribute of this name is the function.
modulated_conv2d = importlib.import_module("avatar_ops.modulated_conv2d")
MODES = {"plain": {}, "up": {"up": 2}, "down": {"down": 2}}


def inputs(batch=2, channels=2, outputs=2, size=4, kernel=3, dtype=torch.float64):
    x = torch.randn(batch, channels, size, size, dtype=dtype)
    weight = torch.randn(outputs, channels, kernel, kernel, dtype=dtype)
    return x, weight, torch.randn(batch, channels, dtype=dtype) + 1


@pytest.mark.parametrize("activation", ["linear", "lrelu"])
@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_first_and_second_derivatives(mode, demodulate, activation):
    x, weight, styles = inputs()
    size = {"plain": 4, "up": 8, "down": 2}[mode]
    noise, bias = torch.randn(size, size, dtype=x.dtype), torch.randn(2, dtype=x.dtype)
    leaves = [t.requires_grad_() for t in (x, weight, styles, noise, bias)]

    def run(x, weight, styles, noise, bias):
        return avatar_ops.modulated_conv2d(
            x,
            weight,
            styles,
            noise=noise,
            bias=bias,
            demodulate=demodulate,
            activation=activation,
            **MODES[mode],
        )

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("mode", MODES)
def test_path_length_and_gradient_penalties_match_the_reference(mode):
    """The gradients of penalties on gradients, as R1 and path-length regularisation form them."""

    def penalty_gradients(function):
        torch.manual_seed(0)
        leaves = [t.requires_grad_() for t in inputs(3, 4, 5, 6)]
        y = function(*leaves, activation="lrelu", **MODES[mode])
        first = torch.autograd.grad((y * torch.randn_like(y)).sum(), leaves, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        return torch.autograd.grad(penalty, leaves)

    expected = penalty_gradients(reference.modulated_conv2d)
    for a, e in zip(penalty_gradients(avatar_ops.modulated_conv2d), expected, strict=True):
        torch.testing.assert_close(a, e)


def test_third_derivative_exists():
    leaves = [t.requires_grad_() for t in inputs()]
    value = avatar_ops.modulated_conv2d(*leaves, activation="lrelu").square().sum()
    for _ in range(3):
        gradients = torch.autograd.grad(value, leaves, create_graph=True)
        value = sum(g.square().sum() for g in gradients)
    assert value.isfinite()


@pytest.mark.parametrize(
    ("mode", "batch", "outputs", "size"), [*((mode, 10, 24, 4) for mode in MODES), ("plain", 40, 64, 8)]
)
def test_forms_no_weight_per_sample(mode, batch, outputs, size):
    """Neither the forward pass nor first and second derivatives hold anything of size (B, O, I, k, k)."""
    channels, kernel = 96, 3
    # Above the weight counted in bytes, which is what triton's interpreter moves.
    limit = batch * outputs * channels * kernel**2
    leaves = [t.requires_grad_() for t in inputs(batch, channels, outputs, size, kernel, torch.float32)]
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True) as recorded:
        y = avatar_ops.modulated_conv2d(*leaves, activation="lrelu", **MODES[mode])
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    shapes = [shape for event in recorded.events() for shape in event.input_shapes if shape]
    sizes = [torch.Size(shape).numel() for shape in shapes if all(isinstance(s, int) for s in shape)]
    assert outputs * channels * kernel**2 in sizes
    assert max(sizes) < limit / 2
    assert max(event.self_cpu_memory_usage for event in recorded.events()) < limit * 4 / 2


@pytest.mark.parametrize("mode", MODES)
def test_gradients_do_not_depend_on_what_the_forward_pass_kept(mode):
    x, weight, styles = inputs(2, 3, 4, 6)
    f = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype) / 8 if MODES[mode] else None
    bias = torch.randn(4, dtype=x.dtype)
    up, down = MODES[mode].get("up", 1), MODES[mode].get("down", 1)
    for demodulate, clamp in ((True, None), (True, 1.0), (False, 1.0)):
        results = []
        for keep in (True, False):
            leaves = [t.detach().clone().requires_grad_() for t in (x, weight, styles, bias)]
            y, _ = torch.ops.avatar_ops.modulated_conv2d(
                *leaves[:3], f, None, leaves[3], demodulate, up, down, 1, 0.2, 1.4, clamp, 1e-8, keep
            )
            results.append(torch.autograd.grad(y.pow(3).sum(), leaves))
        for a, e in zip(*results, strict=True):
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_through_bfloat16_images(mode, monkeypatch):
    """As where matrix units multiply them: first and second derivatives are as accurate as torch's own."""

    size = {"plain": 6, "up": 12, "down": 3}[mode]

    def derivatives(function, dtype):
        torch.manual_seed(0)
        leaves = [t.to(dtype).requires_grad_() for t in inputs(3, 16, 24, 6)]
        noise = torch.randn(size, size).to(dtype).requires_grad_()
        bias = torch.randn(24).to(dtype).requires_grad_()
        y = function(*leaves, noise=noise, bias=bias, activation="lrelu", **MODES[mode])
        leaves += [noise, bias]
        first = torch.autograd.grad((y * torch.randn(y.shape)).sum().float(), leaves, create_graph=True)
        penalty = sum(g.float().square().mean() for g in first)
        return [*first, *torch.autograd.grad(penalty, leaves[:3])]

    exact = derivatives(reference.modulated_conv2d, torch.float64)
    eager = derivatives(reference.modulated_conv2d, torch.bfloat16)
    monkeypatch.setattr(modulated_conv2d, "_gradient_dtype", lambda x: x.dtype)
    actual = derivatives(avatar_ops.modulated_conv2d, torch.bfloat16)
    for a, e, x in zip(actual, eager, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - x).norm() <= 2 * (e - x).norm() + 0.01 * x.norm()


def test_inference_keeps_nothing():
    x, weight, styles = inputs()
    weight.requires_grad_()
    with torch.no_grad():
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            avatar_ops.modulated_conv2d(x, weight, styles)
    assert not kept


@pytest.mark.parametrize("demodulate", [True, False])
def test_half_does_not_overflow_between_modulation_and_demodulation(demodulate):
    x, weight, styles = inputs(2, 64, 8, 8)
    x, styles = x * 3000, styles * 200
    weight = weight * (100 if demodulate else 1e-6)
    x, weight, styles = x.half(), weight.half(), styles.half()
    y = avatar_ops.modulated_conv2d(x, weight, styles, demodulate=demodulate)
    exact = reference.modulated_conv2d(x.double(), weight.double(), styles.double(), demodulate=demodulate)
    assert y.isfinite().all()
    assert (y.double() - exact).norm() <= 1e-3 * exact.norm()


def test_demodulation_cancels_the_scale_of_styles_and_weights():
    x, weight, styles = inputs()
    expected = avatar_ops.modulated_conv2d(x, weight, styles)
    torch.testing.assert_close(avatar_ops.modulated_conv2d(x, weight, styles * 100), expected)
    torch.testing.assert_close(avatar_ops.modulated_conv2d(x, weight * 50, styles), expected)


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_default_sizes(kernel):
    x, weight, styles = inputs(size=8, kernel=kernel)
    assert avatar_ops.modulated_conv2d(x, weight, styles).shape[2:] == (8, 8)
    assert avatar_ops.modulated_conv2d(x, weight, styles, up=2).shape[2:] == (16, 16)
    assert avatar_ops.modulated_conv2d(x, weight, styles, down=2).shape[2:] == (4, 4)


def test_scaled_filter_is_normalised():
    x, weight, styles = inputs()
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype)
    expected = avatar_ops.modulated_conv2d(x, weight, styles, up=2)
    for f in (taps, 5 * taps, torch.outer(taps, taps)):
        torch.testing.assert_close(
            avatar_ops.modulated_conv2d(x, weight, styles, up=2, resample_filter=f), expected
        )


def test_autocast_accepts_what_an_earlier_layer_left_in_low_precision():
    x, weight, styles = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert avatar_ops.modulated_conv2d(x.bfloat16(), weight, styles).dtype == torch.bfloat16
        assert (
            avatar_ops.modulated_conv2d(x.double(), weight.double(), styles.double()).dtype == torch.float64
        )
        with pytest.raises(TypeError, match=r"weight: got dtype torch\.float32"):
            avatar_ops.modulated_conv2d(x.double(), weight, styles.double())


def test_compiles_for_dynamic_sizes():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *tensors: avatar_ops.modulated_conv2d(*tensors, up=2, activation="lrelu"),
        backend="aot_eager",
        fullgraph=True,
        dynamic=True,
    )
    for batch, size in ((2, 6), (3, 9)):
        tensors = inputs(batch, 3, 4, size, dtype=torch.float32)
        expected = avatar_ops.modulated_conv2d(*tensors, up=2, activation="lrelu")
        torch.testing.assert_close(compiled(*tensors), expected)


def layer(**options):
    return ModulatedConv2d(4, 5, style_dim=6, **options)


def test_module_starts_as_stylegan2_does():
    module = ModulatedConv2d(64, 32, style_dim=128)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "weight": (32, 64, 3, 3),
        "bias": (32,),
        "affine_weight": (64, 128),
        "affine_bias": (64,),
        "noise_strength": (),
    }
    assert (module.affine_bias == 1).all()
    assert (module.bias == 0).all()
    assert module.noise_strength == 0
    assert abs(module.weight.std() - 1) < 0.05
    assert abs(module.affine_weight.std() - 1) < 0.05


@pytest.mark.parametrize("mode", MODES)
def test_module_computes_the_op(mode):
    module = layer(**MODES[mode]).double()
    module.noise_strength.data.fill_(0.7)
    module.bias.data.normal_()
    x, w = torch.randn(3, 4, 8, 8, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    size = {"plain": 8, "up": 16, "down": 4}[mode]
    noise = torch.randn(3, 1, size, size, dtype=torch.float64)
    styles = w @ module.affine_weight.t() / 6**0.5 + 1
    expected = reference.modulated_conv2d(
        x, module.weight, styles, noise=0.7 * noise, bias=module.bias, activation="lrelu", **MODES[mode]
    )
    torch.testing.assert_close(module(x, w, noise), expected)


def test_module_without_demodulation_scales_by_the_fan_in():
    module = ModulatedConv2d(4, 3, 1, style_dim=6, demodulate=False, noise=False, activation="linear")
    x, w = torch.randn(2, 4, 8, 8), torch.randn(2, 6)
    styles = (w @ module.affine_weight.t() / 6**0.5 + 1) / 2
    expected = reference.modulated_conv2d(x, module.weight, styles, demodulate=False)
    torch.testing.assert_close(module(x, w), expected)
    assert "noise_strength" not in module.state_dict()


def test_module_draws_fresh_noise_unless_it_is_given():
    module = layer()
    x, w = torch.randn(2, 4, 8, 8), torch.randn(2, 6)
    assert torch.equal(module(x, w), module(x, w))
    module.noise_strength.data.fill_(1.0)
    assert not torch.equal(module(x, w), module(x, w))
    fixed = torch.randn(8, 8)
    assert torch.equal(module(x, w, fixed), module(x, w, fixed))
    torch.manual_seed(3)
    first = module(x, w)
    torch.manual_seed(3)
    assert torch.equal(module(x, w), first)


def test_module_noise_strength_learns():
    module = layer()
    module(torch.randn(2, 4, 8, 8), torch.randn(2, 6)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_module_rejects():
    for options, message in (
        ({"kernel_size": 2}, "kernel_size: got 2"),
        ({"up": 3}, "up: got 3"),
        ({"up": 2, "down": 2}, "down: got 2"),
        ({"activation": "relu"}, "activation: got 'relu'"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(**options)
    x, w = torch.randn(2, 4, 8, 8), torch.randn(2, 6)
    with pytest.raises(ValueError, match=r"w: got .*expected"):
        layer()(x, w[:, 1:])
    with pytest.raises(ValueError, match=r"noise: got .*this layer has no noise"):
        layer(noise=False)(x, w, torch.randn(8, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_module_in_low_precision_and_under_autocast(dtype):
    module, x, w = layer(), torch.randn(2, 4, 8, 8), torch.randn(2, 6)
    expected = module(x, w)
    half = layer().to(dtype)
    half.load_state_dict(module.state_dict())
    torch.testing.assert_close(half(x.to(dtype), w.to(dtype)).float(), expected, atol=0.06, rtol=0.03)
    with torch.autocast("cpu", dtype):
        result = module(x, w)
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), expected, atol=0.06, rtol=0.03)


def test_module_compiles_and_exports():
    torch._dynamo.reset()
    module, x, w = layer(up=2), torch.randn(2, 4, 8, 8), torch.randn(2, 6)
    noise = torch.randn(16, 16)
    module.noise_strength.data.fill_(0.3)
    expected = module(x, w, noise)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, w, noise), expected)
    exported = torch.export.export(module, (x, w, noise)).module()
    torch.testing.assert_close(exported(x, w, noise), expected)


def test_module_refuses_codes_of_another_dtype():
    layer = avatar_ops.nn.ModulatedConv2d(4, 6, style_dim=5)
    with pytest.raises(TypeError, match=r"w: got dtype torch\.float64"):
        layer(torch.randn(2, 4, 8, 8), torch.randn(2, 5).double())


@pytest.mark.parametrize("eps", ["2", None, -1.0])
def test_eps_that_is_no_size_is_named(eps):
    with pytest.raises(ValueError, match="eps: got"):
        avatar_ops.modulated_conv2d(torch.ones(1, 2, 4, 4), torch.ones(3, 2, 3, 3), torch.ones(1, 2), eps=eps)
