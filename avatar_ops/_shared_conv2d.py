"""Convolutions of stride 1 or 2 with one weight for all samples, their resampling and their derivatives.

On a CPU those of 3x3 in float32 take Winograd's form where it pays.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._library import define, reached_inputs, tensor_inputs
from .upfirdn2d import filter_gradient, transposed

# 3x3 convolution and epilogue in one, on the CPU; y and demodulated are written. Images are of one dtype, not
# float64, the rest float32. The geometry is that of Geometry. transposed: of transposed_weight(weight).
define(
    "modulated_conv2d_winograd(Tensor x, Tensor weight, Tensor? styles, Tensor? scale, Tensor? noise, "
    "Tensor? bias, Tensor(a!) y, Tensor(b!)? demodulated, Tensor? f, int up, int down, int before, bool flip, "
    "float filter_gain, float slope, float gain, float? clamp, bool transposed=False) -> ()"
)
# The same without an epilogue: (B, O, height, width). With styles it has no derivative.
define(
    "modulated_conv2d_shared(Tensor x, Tensor weight, Tensor? styles, Tensor? f, int up, int down, int before, "
    "bool flip, float filter_gain, int height, int width, bool transposed=False) -> Tensor"
)
# The gradient in weight of the convolution of x times styles (B, I), from the gradient of its result times scale
# (B, O); plus weight (O, I, 3, 3) times factors (O, I). With any of the four it has no derivative.
define(
    "modulated_conv2d_winograd_weight(Tensor grad, Tensor x, Tensor? scale, Tensor? styles, Tensor? f, int up, "
    "int down, int before, bool flip, float filter_gain, Tensor? weight=None, Tensor? factors=None) -> Tensor"
)

# The most taps of a resampling filter in Winograd's form.
WINOGRAD_TAPS = 8


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
        """That of the gradient in the input, with transposed_weight."""
        around = k - 1 if f is None else f.shape[0] - 1
        return Geometry(self.down, self.up, around - self.before, not self.flip, self.filter_gain)


def transposed_weight(weight: Tensor) -> Tensor:
    """The weight of conv_transpose2d that up-sampling uses."""
    return weight.flip(2, 3).transpose(0, 1)


def _sides(size, size_out, f: Tensor, before: int) -> tuple[int, int, int, int]:
    """The padding of the filter between images of these sizes."""
    after = [out + f.shape[0] - 1 - length - before for length, out in zip(size, size_out, strict=True)]
    return before, after[1], before, after[0]


def resample(z: Tensor, f: Tensor, geometry: Geometry, size) -> Tensor:
    sides = _sides(z.shape[2:], size, f, geometry.before)
    return torch.ops.avatar_ops.upfirdn2d(z, f, 1, 1, *sides, geometry.flip, geometry.filter_gain)


def _strided_size(size, k: int) -> list[int]:
    """The pixels that a convolution of stride 2 reads for a result of this size."""
    return [(length - 1) * 2 + k for length in size]


def convolve(x: Tensor, weight: Tensor, f: Tensor | None, geometry: Geometry, size) -> Tensor:
    """The convolution with one weight for all samples, with its resampling, by torch's."""
    k = weight.shape[2]
    if x.numel() == 0 or weight.numel() == 0:
        return x.new_zeros(x.shape[0], weight.shape[0], *size)
    if geometry.up == 2:
        return resample(F.conv_transpose2d(x, transposed_weight(weight), stride=2), f, geometry, size)
    if geometry.down == 2:
        return F.conv2d(resample(x, f, geometry, _strided_size(size, k)), weight, stride=2)
    return F.conv2d(x, weight, padding=geometry.before)


def winograd_pays(x: Tensor, weight: Tensor, f: Tensor | None, geometry: Geometry, size) -> bool:
    """Whether Winograd's form is faster: a 3x3 convolution with enough full tiles, on a CPU.

    size: height and width of the result. The form gives no gradient in f.
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
    # What is done once, which is to transform the weights, takes about as long as this many tiles.
    overhead = 12
    return x.shape[0] * height * width >= 8 * (tiles + overhead)


def convolve_backward(
    grad: Tensor,
    scale: Tensor | None,
    x: Tensor,
    styles: Tensor | None,
    weight: Tensor,
    f: Tensor | None,
    geometry: Geometry,
    needed,
    wide_weight: Tensor | None = None,
    weight_factors: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of convolve at x times styles (B, I) from that of its result, which is grad times scale (B, O).

    In x times styles, weight and f where `needed`; from differentiable ops where torch records them. That in
    weight is of the dtype of wide_weight, if given, and gets wide_weight times weight_factors (O, I) added.
    """
    if x.numel() == 0 or weight.numel() == 0:
        return torch.zeros_like(x), torch.zeros_like(weight), None if f is None else torch.zeros_like(f)
    need_x, need_weight, need_f = needed
    k, size = weight.shape[2], grad.shape[2:]
    back = geometry.transposed(k, f)
    native_x = need_x and winograd_pays(grad, weight, f, back, x.shape[2:])
    # The gradient of that in x is a convolution with `back` too.
    twice = f is not None or back.before >= 0
    native_weight = need_weight and twice and winograd_pays(x, weight, f, geometry, size)
    native = not need_f and (native_x or not need_x) and (native_weight or not need_weight)
    if torch.is_grad_enabled() or not native:
        # Gradients in x read its shape alone.
        x, styles = _scaled(x, styles) if need_weight or need_f else x, None
        grad, scale = _scaled(grad, scale), None
    grad_x = grad_weight = grad_f = None
    if native_x:
        grad_x, need_x = _shared_convolution(grad, weight, scale, f, True, back, x.shape[2:]), False
    adds = need_weight and weight_factors is not None
    if native_weight:
        # The op that adds as well has no derivative.
        added = (wide_weight, weight_factors) if adds and not torch.is_grad_enabled() else ()
        grad_weight = _shared_weight_gradient(grad, x, scale, styles, f, geometry, *added)
        adds, need_weight = adds and not added, False
    if need_x or need_weight or need_f:
        others = _direct_backward(grad, x, weight, f, geometry, (need_x, need_weight, need_f))
        grad_x, grad_weight, grad_f = (
            theirs if own is None else own
            for own, theirs in zip((grad_x, grad_weight, grad_f), others, strict=True)
        )
    if grad_weight is not None and wide_weight is not None:
        grad_weight = grad_weight.to(wide_weight.dtype)
    if adds:
        grad_weight = grad_weight + wide_weight * weight_factors.unsqueeze(-1).unsqueeze(-1)
    return grad_x, grad_weight, grad_f


def _direct_backward(
    grad: Tensor, x: Tensor, weight: Tensor, f: Tensor | None, geometry: Geometry, needed
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of convolve that are needed, by torch's convolutions."""
    need_x, need_weight, need_f = needed
    k, size = weight.shape[2], grad.shape[2:]
    grad_x = grad_weight = grad_f = None

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
        reversed_weight = transposed_weight(weight)
        z_size = _strided_size(x.shape[2:], k)
        sides = _sides(z_size, size, f, geometry.before)
        if need_f:
            z = F.conv_transpose2d(x, reversed_weight, stride=2)
            grad_f = filter_gradient(grad, z, f, 1, 1, sides, flip, gain)
        if need_x or need_weight:
            grad_z = transposed(grad, f, z_size, 1, 1, sides, flip, gain)
            direct = convolution_backward(grad_z, x, reversed_weight, 2, 0, True, need_x)
            grad_x = direct[0]
            grad_weight = transposed_weight(direct[1]) if need_weight else None
        return grad_x, grad_weight, grad_f
    if geometry.down == 2:
        z_size = _strided_size(size, k)
        sides = _sides(x.shape[2:], z_size, f, geometry.before)
        z = resample(x, f, geometry, z_size)
        grad_z, direct = convolution_backward(grad, z, weight, 2, 0, False, need_x or need_f)
        if need_f:
            grad_f = filter_gradient(grad_z, x, f, 1, 1, sides, flip, gain)
        if need_x:
            grad_x = transposed(grad_z, f, x.shape[2:], 1, 1, sides, flip, gain)
        return grad_x, direct if need_weight else None, grad_f
    grad_x, direct = convolution_backward(grad, x, weight, 1, geometry.before, False, need_x)
    return grad_x, direct if need_weight else None, None


def _scaled(images: Tensor, factors: Tensor | None) -> Tensor:
    return images if factors is None else images * factors.unsqueeze(-1).unsqueeze(-1)


def _shared_convolution(
    x: Tensor,
    weight: Tensor,
    styles: Tensor | None,
    f: Tensor | None,
    transposed: bool,
    geometry: Geometry,
    size,
) -> Tensor:
    return torch.ops.avatar_ops.modulated_conv2d_shared(x, weight, styles, f, *geometry, *size, transposed)


def _shared_weight_gradient(
    grad: Tensor,
    x: Tensor,
    scale: Tensor | None,
    styles: Tensor | None,
    f: Tensor | None,
    geometry: Geometry,
    weight: Tensor | None = None,
    factors: Tensor | None = None,
) -> Tensor:
    tensors = [None if t is None else t.contiguous() for t in (grad, x, scale, styles, f, weight, factors)]
    return torch.ops.avatar_ops.modulated_conv2d_winograd_weight(*tensors[:5], *geometry, *tensors[5:])


@torch.library.register_fake("avatar_ops::modulated_conv2d_winograd")
def _(
    x, weight, styles, scale, noise, bias, y, demodulated, f, up, down, before, flip, filter_gain, slope, gain,
    clamp, transposed=False,
):  # fmt: skip
    return None


def _shared(x, weight, styles, f, up, down, before, flip, filter_gain, height, width, transposed=False):
    y = x.new_empty(x.shape[0], weight.shape[1 if transposed else 0], height, width)
    styles, f = (None if t is None else t.contiguous() for t in (styles, f))
    torch.ops.avatar_ops.modulated_conv2d_winograd(
        x.contiguous(), weight.contiguous(), styles, None, None, None, y, None, f, up, down, before, flip,
        filter_gain, 1.0, 1.0, None, transposed,
    )  # fmt: skip
    return y


torch.library.impl("avatar_ops::modulated_conv2d_shared", "CPU", _shared)


@torch.library.register_fake("avatar_ops::modulated_conv2d_shared")
def _(x, weight, styles, f, up, down, before, flip, filter_gain, height, width, transposed=False):
    return x.new_empty(x.shape[0], weight.shape[1 if transposed else 0], height, width)


@torch.library.register_fake("avatar_ops::modulated_conv2d_winograd_weight")
def _(grad, x, scale, styles, f, up, down, before, flip, filter_gain, weight=None, factors=None):
    return x.new_empty(grad.shape[1], x.shape[1], 3, 3)


def _refuse_factors(*factors: Tensor | None) -> None:
    if any(factor is not None for factor in factors):
        raise RuntimeError("modulated_conv2d: a pass that nothing was to differentiate has no derivative")


def _setup_shared_context(ctx, inputs, output):
    x, weight, styles, f, *geometry, ctx.transposed = inputs
    ctx.geometry, ctx.tensors = Geometry(*geometry[:5]), tensor_inputs(inputs)
    ctx.save_for_backward(x, weight, styles, f)


def _shared_backward(ctx, grad):
    x, weight, styles, f = ctx.saved_tensors
    _refuse_factors(styles)
    needed = (*reached_inputs(ctx, ctx.tensors)[:2], False)
    if ctx.transposed:
        weight = transposed_weight(weight)
    grad_x, grad_weight, _ = convolve_backward(grad, None, x, None, weight, f, ctx.geometry, needed)
    if ctx.transposed and grad_weight is not None:
        grad_weight = transposed_weight(grad_weight)
    return grad_x, grad_weight, *[None] * 10


torch.library.register_autograd(
    "avatar_ops::modulated_conv2d_shared", _shared_backward, setup_context=_setup_shared_context
)


def _setup_weight_context(ctx, inputs, output):
    grad, x, scale, styles, f, *geometry, weight, factors = inputs
    ctx.geometry, ctx.tensors = Geometry(*geometry), tensor_inputs(inputs)
    ctx.save_for_backward(grad, x, scale, styles, f, weight, factors)


def _weight_backward(ctx, grad_weight):
    grad, x, scale, styles, f, weight, factors = ctx.saved_tensors
    _refuse_factors(scale, styles, weight, factors)
    need_grad, need_x = reached_inputs(ctx, ctx.tensors)[:2]
    grad_grad = grad_x = None
    if need_grad:
        grad_grad = _shared_convolution(x, grad_weight, None, f, False, ctx.geometry, grad.shape[2:])
    if need_x:
        back = ctx.geometry.transposed(3, f)
        grad_x = _shared_convolution(grad, grad_weight, None, f, True, back, x.shape[2:])
    return grad_grad, grad_x, *[None] * 10


torch.library.register_autograd(
    "avatar_ops::modulated_conv2d_winograd_weight", _weight_backward, setup_context=_setup_weight_context
)
