"""StyleGAN2's modulated convolution: schema, public function, composed kernel, fake, autograd."""

from __future__ import annotations

import numbers

import torch
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
    reached_inputs,
    tensor_inputs,
)
from ._shared_conv2d import Geometry, convolve, convolve_backward, winograd_pays
from ._small_conv2d import small_convolve, small_pays
from .bias_act import activation_options, check_bias, sign_from_output
from .modulated_conv2d_scale import (
    filter_energy,
    per_channel,
    pixel_products,
    scale_and_sum,
    scale_and_sum_in_place,
)

# resample_filter sums to 1 and may be of the dtype that x accumulates in; noise is (1 or B, 1, ., .).
# `demodulated` is the result before noise and bias, for the backward pass; empty unless `keep` is set.
define(
    "modulated_conv2d(Tensor x, Tensor weight, Tensor styles, Tensor? resample_filter, Tensor? noise, "
    "Tensor? bias, bool demodulate, int up, int down, int padding, float slope, float gain, float? clamp, "
    "float eps, bool keep) -> (Tensor y, Tensor demodulated)"
)
# x (B, I, H, W) times styles (B, I), by weight (O, I); the latter two and the result in the accumulating dtype.
define("modulated_conv2d_pointwise(Tensor x, Tensor weight, Tensor styles) -> Tensor")
define(
    "modulated_conv2d_epilogue(Tensor(a!) convolution, Tensor(b!)? output, Tensor? scale, Tensor? noise, "
    "Tensor? bias, float slope, float gain, float? clamp) -> ()"
)


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
    On a CPU, 3x3 convolutions of float32 and half images with at least 16 channels on either side and enough
    pixels, and their gradients, take Winograd's form (not with a filter of more than 8 taps or one that
    requires a gradient): about as accurate as the direct one, but all outputs of a tile, 4x4 or 8x8 and what
    the filter spreads them to, are NaN where one of the inputs it reads is not finite.
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


def _geometry(k: int, f: Tensor | None, padding: int, up: int, down: int) -> Geometry:
    """That of the op."""
    before = padding if f is None else filter_padding(k, f.shape[0], padding, up)[0]
    return Geometry(up, down, before, False, 4.0 if up == 2 else 1.0)


def _energy(filters: Tensor, styles: Tensor, eps: float) -> Tensor:
    """(B, O): the squared norm of all filters of an output, plus eps; `filters` are those of filter_energy."""
    return styles.square() @ filters.t() + eps


def _few_outputs(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether this is a convolution of 1x1 with few outputs, as toRGB's, that the kernel over pixels takes."""
    return x.device.type == "cpu" and weight.shape[0] <= 8 and weight.shape[2] == 1 and geometry == (
        1, 1, 0, False, 1.0,
    )  # fmt: skip


@torch.library.register_fake("avatar_ops::modulated_conv2d_pointwise")
def _(x, weight, styles):
    return weight.new_empty(x.shape[0], weight.shape[0], *x.shape[2:])


# float16 and bfloat16 are widened on the way into the convolution, so nothing overflows between the
# modulation and the demodulation.
def composed(
    x, weight, styles, f, noise, bias, demodulate, up, down, padding, slope, gain, clamp, eps, keep
):  # fmt: skip
    """The op as torch's convolution between the scalings, and the native epilogue; float64's on a GPU too."""
    dtype = _accumulate_dtype(x.dtype)
    weight, styles = weight.to(dtype).contiguous(), styles.to(dtype)
    scale = _energy(filter_energy(weight), styles, eps).rsqrt() if demodulate else None
    geometry = _geometry(weight.shape[2], f, padding, up, down)
    size = output_size(x.shape[2:], weight.shape[2], 0 if f is None else f.shape[0], padding, up, down)
    if noise is not None:
        noise = noise.to(dtype).expand(-1, -1, *size).contiguous()
    if bias is not None:
        bias = bias.to(dtype).contiguous()
    if not small_pays(x, weight, geometry) and winograd_pays(x, weight, f, geometry, size):
        y = x.new_empty(x.shape[0], weight.shape[0], *size)
        z = torch.empty_like(y) if keep else None
        torch.ops.avatar_ops.modulated_conv2d_winograd(
            x.contiguous(), weight, styles.contiguous(), scale, noise, bias, y, z,
            None if f is None else f.contiguous(), *geometry, slope, gain, clamp,
        )  # fmt: skip
        return y, z if keep else x.new_empty(0)
    if small_pays(x, weight, geometry):
        z = small_convolve(x.to(dtype), weight, styles, f, geometry, size)
    elif _few_outputs(x, weight, geometry):
        z = torch.ops.avatar_ops.modulated_conv2d_pointwise(
            x.contiguous(), weight.flatten(1), styles.contiguous()
        )
    else:
        z = convolve(x.contiguous() * per_channel(styles), weight, f, geometry, size).contiguous()
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


def _setup_context(ctx, inputs, output):
    x, weight, styles, f, noise, bias, *ctx.options = inputs
    y, demodulated = output
    ctx.tensors = tensor_inputs(inputs)
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
    needed = reached_inputs(ctx, ctx.tensors)
    need_x, need_weight, need_styles, need_f, need_noise, need_bias = needed[:6]
    in_dtype, dtype, wide = x.dtype, _gradient_dtype(x), _accumulate_dtype(x.dtype)
    grad_noise = grad_bias = None
    with torch.autocast(x.device.type, enabled=False):
        x, weight, styles = x.to(dtype), weight.to(wide), styles.to(wide)
        factors, filters = per_channel(styles).to(dtype), weight.to(dtype)
        energies = filter_energy(weight) if demodulate else None
        energy = _energy(energies, styles, eps) if demodulate else None
        geometry = _geometry(weight.shape[2], f, padding, up, down)
        if not keep and (demodulate or _activation_needs_input(slope, gain, clamp)):
            taps = 0 if f is None else f.shape[0]
            size = output_size(x.shape[2:], weight.shape[2], taps, padding, up, down)
            demodulated = convolve(x * factors, filters, f, geometry, size)
            if demodulate:
                demodulated = demodulated * per_channel(energy.rsqrt()).to(dtype)

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

        # One pass over the images, where it is recorded for a derivative of its own, beats folding its factors
        # into convolutions that then have none.
        records = torch.is_grad_enabled()
        scale = energy.rsqrt() if demodulate else None
        per_filter = grad_styles = grad_x = None
        if demodulate:
            if need_weight or need_styles:
                # d rsqrt(energy) = -rsqrt(energy) / (2 energy) d energy, and demodulated holds the rsqrt.
                if records:
                    (grad, products), scale = scale_and_sum(grad, demodulated.to(dtype), scale), None
                else:
                    products = pixel_products(grad, demodulated.to(dtype)).to(wide)
                grad_energy = -0.5 * products / energy
            if need_weight:
                per_filter = 2 * (grad_energy.t() @ styles.square())
            if need_styles:
                grad_styles = 2 * styles * (grad_energy @ energies)
        grad_modulated, grad_weight, grad_f = convolve_backward(
            grad, None if scale is None else scale.to(dtype), x, styles.to(dtype), filters, f, geometry,
            (need_x or need_styles, need_weight, need_f), weight, per_filter,
        )  # fmt: skip
        if need_styles:
            if need_x and records:
                grad_x, through_styles = scale_and_sum(grad_modulated, x, styles)
            elif need_x:
                # Memory that comes fresh from the system takes longer than the product.
                grad_x = grad_modulated
                through_styles = scale_and_sum_in_place(grad_modulated, x, styles)
            else:
                through_styles = pixel_products(grad_modulated, x).to(wide)
            grad_styles = through_styles if grad_styles is None else grad_styles + through_styles
        if need_x and grad_x is None:
            grad_x = grad_modulated * factors if records else grad_modulated.mul_(factors)
    gradients = (grad_x, grad_weight, grad_styles, grad_noise, grad_bias if need_bias else None)
    grad_x, grad_weight, grad_styles, grad_noise, grad_bias = (
        None if t is None else t.to(in_dtype) for t in gradients
    )
    return grad_x, grad_weight, grad_styles, grad_f, grad_noise, grad_bias, *[None] * 9


torch.library.register_autograd("avatar_ops::modulated_conv2d", _backward, setup_context=_setup_context)
autocast_to_active("modulated_conv2d")
launch_with_triton("modulated_conv2d", "modulated_conv2d")
