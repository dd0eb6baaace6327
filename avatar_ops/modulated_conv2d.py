"""StyleGAN2's modulated convolution: schema, public function, composed kernel, fake, autograd."""

from __future__ import annotations

import numbers
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._library import (
    autocast_to_active,
    check_device,
    check_floating,
    check_option,
    check_rank,
    check_shape,
    define,
    launch_with_triton,
)
from .bias_act import activation_options, check_bias, sign_from_output
from .upfirdn2d import filter_gradient, transposed

# resample_filter sums to 1 and may be of the dtype that x accumulates in; noise is (1 or B, 1, ., .).
# `demodulated` is the result before noise and bias, for the backward pass; empty unless `keep` is set.
define(
    "modulated_conv2d(Tensor x, Tensor weight, Tensor styles, Tensor? resample_filter, Tensor? noise, "
    "Tensor? bias, bool demodulate, int up, int down, int padding, float slope, float gain, float? clamp, "
    "float eps, bool keep) -> (Tensor y, Tensor demodulated)"
)
define(
    "modulated_conv2d_epilogue(Tensor(a!) convolution, Tensor(b!)? output, Tensor? scale, Tensor? noise, "
    "Tensor? bias, float slope, float gain, float? clamp) -> ()"
)
# float32 3x3 convolution and epilogue in one, on the CPU; y and demodulated are written. The geometry is that
# of Geometry.
define(
    "modulated_conv2d_winograd(Tensor x, Tensor weight, Tensor? styles, Tensor? scale, Tensor? noise, "
    "Tensor? bias, Tensor(a!) y, Tensor(b!)? demodulated, Tensor? f, int up, int down, int before, bool flip, "
    "float filter_gain, float slope, float gain, float? clamp) -> ()"
)
# The same without styles and epilogue, for derivatives: (B, O, height, width).
define(
    "modulated_conv2d_shared(Tensor x, Tensor weight, Tensor? f, int up, int down, int before, bool flip, "
    "float filter_gain, int height, int width) -> Tensor"
)
# The gradient in weight of that convolution, from the gradient of its result; x is modulated.
define(
    "modulated_conv2d_winograd_weight(Tensor grad, Tensor x, Tensor? f, int up, int down, int before, bool flip, "
    "float filter_gain) -> Tensor"
)


# The most taps of a resampling filter in Winograd's form.
WINOGRAD_TAPS = 8


def modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    *,
    demodulate: bool = True,
    up: int = 1,
    down: int = 1,
    padding: int | None = None,
    resample_filter: Tensor | None = None,
    noise: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "linear",
    gain: float | None = None,
    clamp: float | None = None,
    eps: float = 1e-8,
) -> Tensor:
    """Convolution whose weight every sample scales by its own styles, with noise, bias and activation.

        w[b, o, i] = styles[b, i] * weight[o, i]
        w[b, o] /= sqrt(sum(w[b, o]**2) + eps)                                   with demodulate
        y[b] = clip(activation(conv2d(x[b], w[b]) + noise + bias) * gain, -clamp, clamp)

    With a resampling filter f of n by n taps and p = padding, the convolution is
    up=2:   conv_transpose2d(x, w flipped, stride=2), then upfirdn2d(f, padding=(a, b, a, b), gain=4),
            a = p + (n + 1) // 2 - (k - 1), b = p + (n - 2) // 2 - (k - 2);
    down=2: upfirdn2d(f, padding=(a, b, a, b)), a = p + (n - 1) // 2, b = p + (n - 2) // 2, then
            conv2d(w, stride=2).

    Args:
        x: (B, I, H, W) float16, bfloat16, float32 or float64.
        weight: (O, I, k, k), k odd.
        styles: (B, I).
        demodulate: whether each filter of each sample is normalised.
        up, down: 1 or 2, not both 2; the default sizes are (2H, 2W) and, for even sizes, (H/2, W/2).
        padding: p >= 0, default k // 2.
        resample_filter: (n,) separable or (n, n), default [1, 3, 3, 1]; divided by its sum. Unused, but
            checked, without up and down.
        noise: broadcastable to (B, 1, H', W').
        bias: (O,).
        activation: "linear" or "lrelu" (leaky ReLU with slope 0.2).
        gain: default sqrt(2) for lrelu, else 1.
        clamp: the largest magnitude, >= 0, or None.
        eps: >= 0.

    Returns:
        (B, O, H', W') in the dtype of x.

    Raises:
        TypeError: unsupported or mixed dtype.   ValueError: rank, shape, device or option; too small an x.

    Differentiable in everything floating, any number of times. Styles scale the input and norms the output of
    one convolution with the shared weight; no weight per sample is formed. On a GPU its float32 products use
    TensorFloat-32 where torch.backends.cudnn.conv.fp32_precision is "tf32", as torch's own convolutions do. Of
    those gradients and float64 are made, and follow their switches, that for determinism too.
    On a CPU, float32 convolutions of 3x3 with up = down = 1, at least 16 channels on either side and enough
    pixels, and their gradients, take Winograd's form F(4x4, 3x3): as accurate as the direct one, but all 16
    outputs of a tile are NaN where one of the 6x6 inputs it reads is not finite.
    Source: Karras et al., Analyzing and Improving the Image Quality of StyleGAN, CVPR 2020, sec. 2.2.
    Reference: reference.modulated_conv2d.
    """
    check_floating("x", x)
    check_floating("weight", weight, x)
    check_floating("styles", styles, x)
    check_rank("x", x, (4,), "(B, I, H, W)")
    check_shape("weight", weight, (None, x.shape[1], None, None), "(O, I, k, k)")
    k = weight.shape[2]
    if weight.shape[3] != k or k % 2 == 0:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected (O, I, k, k) with odd k")
    check_shape("styles", styles, (x.shape[0], x.shape[1]), "(B, I)")
    check_device("weight", weight, x)
    check_device("styles", styles, x)
    for name, factor in (("up", up), ("down", down)):
        if not isinstance(factor, int):
            raise ValueError(f"{name}: got {factor!r}, expected 1 or 2")
        check_option(name, factor, (1, 2))
    if up == 2 and down == 2:
        raise ValueError("down: got 2 with up = 2, expected at most one of them")
    if padding is None:
        padding = k // 2
    elif not isinstance(padding, int) or padding < 0:
        raise ValueError(f"padding: got {padding!r}, expected an integer >= 0 or None")
    if not (isinstance(eps, numbers.Real) and eps >= 0):
        raise ValueError(f"eps: got {eps!r}, expected a number >= 0")
    slope, gain, clamp = activation_options(activation, gain, clamp)
    check_bias(bias, x, weight.shape[0])
    f = _normalised_filter(x, resample_filter, up * down == 2)
    height, width = output_size(x.shape[2:], k, 0 if f is None else f.shape[0], padding, up, down)
    if height < 1 or width < 1:
        raise ValueError(f"x: got shape {tuple(x.shape)}, with which the result would be {height} x {width}")
    noise = _checked_noise(noise, x, height, width)
    inputs = [t for t in (x, weight, styles, f, noise, bias) if t is not None]
    differentiates = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    keep = differentiates and (demodulate or _activation_needs_input(slope, gain, clamp))
    y, _ = torch.ops.avatar_ops.modulated_conv2d(
        x,
        weight,
        styles,
        f,
        noise,
        bias,
        bool(demodulate),
        up,
        down,
        padding,
        slope,
        gain,
        clamp,
        float(eps),
        keep,
    )
    return y


def output_size(size, k: int, taps: int, padding: int, up: int, down: int) -> tuple[int, int]:
    """Height and width of the result, below 1 where the image is too small."""
    a, b, _, _ = filter_padding(k, taps, padding, up)
    if up == 2:
        return tuple((length - 1) * 2 + k + a + b - taps + 1 for length in size)
    if down == 2:
        return tuple((length + a + b - taps + 1 - k) // 2 + 1 for length in size)
    return tuple(length + 2 * padding - k + 1 for length in size)


def filter_padding(k: int, taps: int, padding: int, up: int) -> tuple[int, int, int, int]:
    """Padding of the resampling filter: left, right, top, bottom."""
    if up == 2:
        a, b = padding + (taps + 1) // 2 - (k - 1), padding + (taps - 2) // 2 - (k - 2)
    else:
        a, b = padding + (taps - 1) // 2, padding + (taps - 2) // 2
    return a, b, a, b


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _normalised_filter(x: Tensor, f: Tensor | None, used: bool) -> Tensor | None:
    """The checked resampling filter divided by its sum, or None where none is used."""
    if f is not None:
        check_floating("resample_filter", f, x)
        check_device("resample_filter", f, x)
        if f.dim() not in (1, 2) or f.numel() == 0 or f.shape[0] != f.shape[-1]:
            raise ValueError(f"resample_filter: got shape {tuple(f.shape)}, expected (n,) or (n, n)")
    if not used:
        return None
    dtype = _accumulate_dtype(x.dtype)
    if f is None:
        # [1, 3, 3, 1] / 8, made where it is used: nothing is copied to a device.
        index = torch.arange(4, device=x.device, dtype=dtype)
        return (1 + index * (3 - index)) / 8
    f = f.to(dtype)
    return f / f.sum()


def _checked_noise(noise: Tensor | None, x: Tensor, height: int, width: int) -> Tensor | None:
    """The noise with four dimensions."""
    if noise is None:
        return None
    check_floating("noise", noise, x)
    check_device("noise", noise, x)
    full = (x.shape[0], 1, height, width)
    sizes = (1,) * (4 - noise.dim()) + tuple(noise.shape)
    if noise.dim() > 4 or any(size not in (1, want) for size, want in zip(sizes, full, strict=True)):
        raise ValueError(
            f"noise: got shape {tuple(noise.shape)}, expected one broadcastable to (B, 1, H', W') = {full}"
        )
    return noise.reshape(sizes)


def _activation_needs_input(slope: float, gain: float, clamp: float | None) -> bool:
    """Whether the derivative of the activation cannot be told from its output."""
    return not (sign_from_output(gain, clamp) or (slope == 1 and clamp is None))


def _transposed_weight(weight: Tensor) -> Tensor:
    """The weight of conv_transpose2d that up-sampling uses."""
    return weight.flip(2, 3).transpose(0, 1)


class Geometry(NamedTuple):
    """Where pixels, weight and resampling filter meet; sizes are those of the images, which are 0 outside.

    before: rows and columns of zeros above and to the left of the image that the filter is applied to, or of
    the input where there is none. flip: whether the filter correlates. filter_gain: its factor.
    """

    up: int
    down: int
    before: int
    flip: bool
    filter_gain: float

    def transposed(self, k: int, f: Tensor | None) -> Geometry:
        """That of the gradient in the input, with _transposed_weight."""
        around = k - 1 if f is None else f.shape[0] - 1
        return Geometry(self.down, self.up, around - self.before, not self.flip, self.filter_gain)


def _geometry(k: int, f: Tensor | None, padding: int, up: int, down: int) -> Geometry:
    """That of the op."""
    before = padding if f is None else filter_padding(k, f.shape[0], padding, up)[0]
    return Geometry(up, down, before, False, 4.0 if up == 2 else 1.0)


def _sides(size, size_out, f: Tensor, before: int) -> tuple[int, int, int, int]:
    """The padding of the filter between images of these sizes."""
    after = [out + f.shape[0] - 1 - length - before for length, out in zip(size, size_out, strict=True)]
    return before, after[1], before, after[0]


def _resample(z: Tensor, f: Tensor, geometry: Geometry, size) -> Tensor:
    sides = _sides(z.shape[2:], size, f, geometry.before)
    return torch.ops.avatar_ops.upfirdn2d(z, f, 1, 1, *sides, geometry.flip, geometry.filter_gain)


def _strided_size(size, k: int) -> list[int]:
    """The pixels that a convolution of stride 2 reads for a result of this size."""
    return [(length - 1) * 2 + k for length in size]


def _convolve(x: Tensor, weight: Tensor, f: Tensor | None, geometry: Geometry, size) -> Tensor:
    """The convolution with one weight for all samples, with its resampling, by torch's."""
    k = weight.shape[2]
    if x.numel() == 0 or weight.numel() == 0:
        return x.new_zeros(x.shape[0], weight.shape[0], *size)
    if geometry.up == 2:
        return _resample(F.conv_transpose2d(x, _transposed_weight(weight), stride=2), f, geometry, size)
    if geometry.down == 2:
        return F.conv2d(_resample(x, f, geometry, _strided_size(size, k)), weight, stride=2)
    return F.conv2d(x, weight, padding=geometry.before)


def _winograd_pays(
    x: Tensor, weight: Tensor, f: Tensor | None, geometry: Geometry, size, overhead: int = 12
) -> bool:
    """Whether Winograd's form is clearly faster: a 3x3 convolution with enough full tiles, on a CPU.

    overhead: tiles that take about as long as what is done once, which is to transform the weights.
    """
    if x.device.type != "cpu" or weight.dtype != torch.float32 or weight.shape[2] != 3:
        return False
    if f is None:
        if geometry.before < 0:
            return False
    elif f.requires_grad or f.shape[0] > WINOGRAD_TAPS:
        return False
    if min(weight.shape[:2]) < 16:
        return False
    height, width = x.shape[2:] if geometry.up == 2 else size
    tiles = x.shape[0] * -(-height // 4) * -(-width // 4)
    return x.shape[0] * height * width >= 8 * (tiles + overhead)


def _convolve_backward(
    grad: Tensor, x: Tensor, weight: Tensor, f: Tensor | None, geometry: Geometry, needed
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of _convolve in x, weight and f where `needed`, from differentiable ops."""
    if x.numel() == 0 or weight.numel() == 0:
        return torch.zeros_like(x), torch.zeros_like(weight), None if f is None else torch.zeros_like(f)
    need_x, need_weight, need_f = needed
    k, size = weight.shape[2], grad.shape[2:]
    back, reversed_weight = geometry.transposed(k, f), _transposed_weight(weight)
    grad_x = grad_weight = grad_f = None
    if need_x and _winograd_pays(grad, reversed_weight, f, back, x.shape[2:]):
        grad_x, need_x = _shared_convolution(grad, reversed_weight, f, back, x.shape[2:]), False
    twice = f is not None or back.before >= 0
    if need_weight and twice and _winograd_pays(x, weight, f, geometry, size, 64):
        grad_weight, need_weight = _shared_weight_gradient(grad, x, f, geometry), False
    if not (need_x or need_weight or need_f):
        return grad_x, grad_weight, grad_f

    def convolution_backward(grad, x, weight, stride, padding, transposed, need_x):
        if not (need_x or need_weight):
            return None, None
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, [stride] * 2, [padding] * 2, [1, 1], transposed, [0, 0], 1,
            [need_x, need_weight, False],
        )  # fmt: skip
        return grad_x if need_x else None, grad_weight if need_weight else None

    flip, gain = geometry.flip, geometry.filter_gain
    if geometry.up == 2:
        z_size = _strided_size(x.shape[2:], k)
        sides = _sides(z_size, size, f, geometry.before)
        if need_f:
            z = F.conv_transpose2d(x, reversed_weight, stride=2)
            grad_f = filter_gradient(grad, z, f, 1, 1, sides, flip, gain)
        if need_x or need_weight:
            grad_z = transposed(grad, f, z_size, 1, 1, sides, flip, gain)
            direct = convolution_backward(grad_z, x, reversed_weight, 2, 0, True, need_x)
            grad_x = direct[0] if need_x else grad_x
            grad_weight = _transposed_weight(direct[1]) if need_weight else grad_weight
        return grad_x, grad_weight, grad_f
    if geometry.down == 2:
        z_size = _strided_size(size, k)
        sides = _sides(x.shape[2:], z_size, f, geometry.before)
        z = _resample(x, f, geometry, z_size)
        grad_z, direct = convolution_backward(grad, z, weight, 2, 0, False, need_x or need_f)
        if need_f:
            grad_f = filter_gradient(grad_z, x, f, 1, 1, sides, flip, gain)
        if need_x:
            grad_x = transposed(grad_z, f, x.shape[2:], 1, 1, sides, flip, gain)
        return grad_x, direct if need_weight else grad_weight, grad_f
    direct = convolution_backward(grad, x, weight, 1, geometry.before, False, need_x)
    return direct[0] if need_x else grad_x, direct[1] if need_weight else grad_weight, None


def _shared_convolution(x: Tensor, weight: Tensor, f: Tensor | None, geometry: Geometry, size) -> Tensor:
    return torch.ops.avatar_ops.modulated_conv2d_shared(x, weight, f, *geometry, *size)


def _shared_weight_gradient(grad: Tensor, x: Tensor, f: Tensor | None, geometry: Geometry) -> Tensor:
    return torch.ops.avatar_ops.modulated_conv2d_winograd_weight(
        grad.contiguous(), x.contiguous(), None if f is None else f.contiguous(), *geometry
    )


def _energy(weight: Tensor, styles: Tensor, eps: float) -> Tensor:
    """(B, O): the squared norm of each filter of each sample, plus eps."""
    return styles.square() @ weight.square().sum((2, 3)).t() + eps


def _per_channel(values: Tensor) -> Tensor:
    return values.unsqueeze(-1).unsqueeze(-1)


def _pixel_products(a: Tensor, b: Tensor) -> Tensor:
    """(B, C): sums over the pixels of a * b, without that product in memory."""
    return (a.flatten(2).unsqueeze(2) @ b.flatten(2).unsqueeze(3)).flatten(1)


# float16 and bfloat16 are widened on the way into the convolution, so nothing overflows between the
# modulation and the demodulation.
def composed(
    x, weight, styles, f, noise, bias, demodulate, up, down, padding, slope, gain, clamp, eps, keep
):  # fmt: skip
    """The op as torch's convolution between the scalings, and the native epilogue; float64's on a GPU too."""
    dtype = _accumulate_dtype(x.dtype)
    weight, styles = weight.to(dtype).contiguous(), styles.to(dtype)
    scale = _energy(weight, styles, eps).rsqrt() if demodulate else None
    geometry = _geometry(weight.shape[2], f, padding, up, down)
    size = output_size(x.shape[2:], weight.shape[2], 0 if f is None else f.shape[0], padding, up, down)
    if noise is not None:
        noise = noise.to(dtype).expand(-1, -1, *size).contiguous()
    if bias is not None:
        bias = bias.to(dtype).contiguous()
    if _winograd_pays(x, weight, f, geometry, size):
        y = torch.empty(x.shape[0], weight.shape[0], *size, dtype=dtype)
        z = torch.empty_like(y) if keep else None
        torch.ops.avatar_ops.modulated_conv2d_winograd(
            x.to(dtype).contiguous(), weight, styles.contiguous(), scale, noise, bias, y, z,
            None if f is None else f.contiguous(), *geometry, slope, gain, clamp,
        )  # fmt: skip
        return y.to(x.dtype), z.to(x.dtype) if keep else x.new_empty(0)
    z = _convolve(x.contiguous() * _per_channel(styles), weight, f, geometry, size).contiguous()
    y = torch.empty_like(z) if keep else None
    torch.ops.avatar_ops.modulated_conv2d_epilogue(z, y, scale, noise, bias, slope, gain, clamp)
    if keep:
        return y.to(x.dtype), z.to(x.dtype)
    return z.to(x.dtype), x.new_empty(0)


torch.library.impl("avatar_ops::modulated_conv2d", "CPU", composed)


@torch.library.register_fake("avatar_ops::modulated_conv2d")
def _(
    x, weight, styles, f, noise, bias, demodulate, up, down, padding, slope, gain, clamp, eps, keep
):  # fmt: skip
    taps = 0 if f is None else f.shape[0]
    size = output_size(x.shape[2:], weight.shape[2], taps, padding, up, down)
    y = x.new_empty(x.shape[0], weight.shape[0], *size)
    return y, torch.empty_like(y) if keep else x.new_empty(0)


@torch.library.register_fake("avatar_ops::modulated_conv2d_epilogue")
def _(convolution, output, scale, noise, bias, slope, gain, clamp):
    return None


@torch.library.register_fake("avatar_ops::modulated_conv2d_winograd")
def _(
    x, weight, styles, scale, noise, bias, y, demodulated, f, up, down, before, flip, filter_gain, slope, gain,
    clamp,
):  # fmt: skip
    return None


def _shared(x, weight, f, up, down, before, flip, filter_gain, height, width):
    y = x.new_empty(x.shape[0], weight.shape[0], height, width)
    torch.ops.avatar_ops.modulated_conv2d_winograd(
        x.contiguous(), weight.contiguous(), None, None, None, None, y, None,
        None if f is None else f.contiguous(), up, down, before, flip, filter_gain, 1.0, 1.0, None,
    )  # fmt: skip
    return y


torch.library.impl("avatar_ops::modulated_conv2d_shared", "CPU", _shared)


@torch.library.register_fake("avatar_ops::modulated_conv2d_shared")
def _(x, weight, f, up, down, before, flip, filter_gain, height, width):
    return x.new_empty(x.shape[0], weight.shape[0], height, width)


def _setup_shared_context(ctx, inputs, output):
    x, weight, f, *geometry = inputs
    ctx.geometry = Geometry(*geometry[:5])
    ctx.save_for_backward(x, weight, f)


def _shared_backward(ctx, grad):
    x, weight, f = ctx.saved_tensors
    needed = (*ctx.needs_input_grad[:2], False)
    grad_x, grad_weight, _ = _convolve_backward(grad, x, weight, f, ctx.geometry, needed)
    return grad_x, grad_weight, *[None] * 8


torch.library.register_autograd(
    "avatar_ops::modulated_conv2d_shared", _shared_backward, setup_context=_setup_shared_context
)


@torch.library.register_fake("avatar_ops::modulated_conv2d_winograd_weight")
def _(grad, x, f, up, down, before, flip, filter_gain):
    return x.new_empty(grad.shape[1], x.shape[1], 3, 3)


def _setup_weight_context(ctx, inputs, output):
    grad, x, f, *geometry = inputs
    ctx.geometry = Geometry(*geometry)
    ctx.save_for_backward(grad, x, f)


def _weight_backward(ctx, grad_weight):
    grad, x, f = ctx.saved_tensors
    need_grad, need_x = ctx.needs_input_grad[:2]
    grad_grad = grad_x = None
    if need_grad:
        grad_grad = _shared_convolution(x, grad_weight, f, ctx.geometry, grad.shape[2:])
    if need_x:
        back = ctx.geometry.transposed(3, f)
        grad_x = _shared_convolution(grad, _transposed_weight(grad_weight), f, back, x.shape[2:])
    return grad_grad, grad_x, *[None] * 6


torch.library.register_autograd(
    "avatar_ops::modulated_conv2d_winograd_weight", _weight_backward, setup_context=_setup_weight_context
)


def _setup_context(ctx, inputs, output):
    x, weight, styles, f, noise, bias, *ctx.options = inputs
    y, demodulated = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, styles, f, noise, bias, y, demodulated)


def _gradient_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the images in the backward pass.

    On a GPU bfloat16 stays what it is, for its matrix units. float16, which gradients may overflow, is widened;
    TensorFloat-32, which torch's convolutions then use, is as precise. Sums and scales are never narrow.
    """
    narrow = x.is_cuda and x.dtype == torch.bfloat16
    return x.dtype if narrow else _accumulate_dtype(x.dtype)


def _backward(ctx, grad_y, grad_demodulated):
    x, weight, styles, f, noise, bias, y, demodulated = ctx.saved_tensors
    demodulate, up, down, padding, slope, gain, clamp, eps, keep = ctx.options
    need_x, need_weight, need_styles, need_f, need_noise, need_bias = ctx.needs_input_grad[:6]
    in_dtype, dtype, wide = x.dtype, _gradient_dtype(x), _accumulate_dtype(x.dtype)
    grad_noise = grad_bias = None
    with torch.autocast(x.device.type, enabled=False):
        x, weight, styles = x.to(dtype), weight.to(wide), styles.to(wide)
        factors = _per_channel(styles).to(dtype)
        modulated, filters = x * factors, weight.to(dtype)
        energy = _energy(weight, styles, eps) if demodulate else None
        geometry = _geometry(weight.shape[2], f, padding, up, down)
        if not keep and (demodulate or _activation_needs_input(slope, gain, clamp)):
            taps = 0 if f is None else f.shape[0]
            size = output_size(x.shape[2:], weight.shape[2], taps, padding, up, down)
            demodulated = _convolve(modulated, filters, f, geometry, size)
            if demodulate:
                demodulated = demodulated * _per_channel(energy.rsqrt()).to(dtype)

        grad = None if grad_demodulated is None else grad_demodulated.to(dtype)
        if grad_y is not None:
            if slope == 1 and clamp is None:
                saved = shift = None
            elif sign_from_output(gain, clamp):
                saved, shift = y, None
            else:
                saved, shift = demodulated if noise is None else demodulated + noise, bias
            grad_value, grad_bias = torch.ops.avatar_ops.bias_act_backward(
                grad_y.to(dtype), saved, shift, need_bias, slope, gain, clamp
            )
            if need_noise:
                grad_noise = grad_value.sum_to_size(noise.shape)
            grad = grad_value if grad is None else grad + grad_value
        if grad is None:
            return (None,) * 15

        grad_weight = grad_styles = None
        if demodulate:
            if need_weight or need_styles:
                # d rsqrt(energy) = -rsqrt(energy) / (2 energy) d energy, and demodulated holds the rsqrt.
                grad_energy = -0.5 * _pixel_products(grad, demodulated.to(dtype)).to(wide) / energy
            if need_weight:
                per_filter = grad_energy.t() @ styles.square()
                grad_weight = 2 * weight * _per_channel(per_filter)
            if need_styles:
                grad_styles = 2 * styles * (grad_energy @ weight.square().sum((2, 3)))
            grad = grad * _per_channel(energy.rsqrt()).to(dtype)
        grad_modulated, through_weight, grad_f = _convolve_backward(
            grad, modulated, filters, f, geometry, (need_x or need_styles, need_weight, need_f)
        )
        if need_weight:
            through_weight = through_weight.to(wide)
            grad_weight = through_weight if grad_weight is None else grad_weight + through_weight
        if need_styles:
            through_styles = _pixel_products(grad_modulated, x).to(wide)
            grad_styles = through_styles if grad_styles is None else grad_styles + through_styles
        grad_x = grad_modulated * factors if need_x else None
    gradients = (grad_x, grad_weight, grad_styles, grad_noise, grad_bias if need_bias else None)
    grad_x, grad_weight, grad_styles, grad_noise, grad_bias = (
        None if t is None else t.to(in_dtype) for t in gradients
    )
    return grad_x, grad_weight, grad_styles, grad_f, grad_noise, grad_bias, *[None] * 9


torch.library.register_autograd("avatar_ops::modulated_conv2d", _backward, setup_context=_setup_context)
autocast_to_active("modulated_conv2d")
launch_with_triton("modulated_conv2d", "modulated_conv2d")
