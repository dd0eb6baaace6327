"""StyleGAN2's modulated convolution on the GPU: implicit GEMM, resampling and epilogue."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from ..modulated_conv2d import composed, filter_padding, output_size
from ._launch import launch, power_of_two

# From this many elements on, kernels index with 64 bits: the last block may reach past the last element.
WIDE_FROM = 2**31 - 1024
MOST_SPLITS = 16
# Pixels of a block of the kernels that filter.
FILTERED_PIXELS = 64


@triton.jit
def power_above(largest):
    """The smallest power of two above the largest of float16 magnitudes; 1 where that is 0."""
    bits = tl.minimum(largest, 65504.0).to(tl.int32, bitcast=True)
    power = ((bits & 0x7F800000) + 0x00800000).to(tl.float32, bitcast=True)
    return tl.where(largest > 0, power, 1.0)


# One program a filter and BLOCK_B samples. GUARD divides the filter and each sample's styles by powers of two,
# so that no product leaves float16's range, and multiplies the result's scale by them.
@triton.jit
def prepare_kernel(
    weight,  # (O, I, TAPS)
    styles,  # (B, I)
    packed,  # (TAPS, O, I)
    modulation,  # (B, I)
    scale,  # (B, O)
    batch, inputs, outputs, eps, TAPS: tl.constexpr, DEMODULATE: tl.constexpr, GUARD: tl.constexpr,
    INDEX: tl.constexpr, BLOCK_TAPS: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_B: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0).to(INDEX)
    b = (tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)).to(INDEX)
    tap = tl.arange(0, BLOCK_TAPS)
    weight_divisor = tl.full((), 1, tl.float32)
    style_divisor = tl.full((BLOCK_B,), 1, tl.float32)
    if GUARD:
        largest_weight = tl.zeros((), tl.float32)
        largest_style = tl.zeros((BLOCK_B,), tl.float32)
        for start in range(0, inputs, BLOCK_I):
            i = start + tl.arange(0, BLOCK_I)
            mask = (i < inputs)[:, None] & (tap < TAPS)[None, :]
            w = tl.load(weight + (o * inputs + i[:, None]) * TAPS + tap[None, :], mask=mask, other=0)
            largest_weight = tl.maximum(largest_weight, tl.max(tl.abs(w.to(tl.float32))))
            mask = (b < batch)[:, None] & (i < inputs)[None, :]
            s = tl.load(styles + b[:, None] * inputs + i[None, :], mask=mask, other=0)
            largest_style = tl.maximum(largest_style, tl.max(tl.abs(s.to(tl.float32)), 1))
        weight_divisor = power_above(largest_weight)
        style_divisor = power_above(largest_style)
    energy = tl.zeros((BLOCK_B,), tl.float32)
    for start in range(0, inputs, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        mask = (i < inputs)[:, None] & (tap < TAPS)[None, :]
        w = tl.load(weight + (o * inputs + i[:, None]) * TAPS + tap[None, :], mask=mask, other=0)
        w = w.to(tl.float32)
        if tl.program_id(1) == 0:
            target = packed + (tap[None, :].to(INDEX) * outputs + o) * inputs + i[:, None]
            tl.store(target, (w / weight_divisor).to(packed.dtype.element_ty), mask=mask)
        mask = (b < batch)[:, None] & (i < inputs)[None, :]
        s = tl.load(styles + b[:, None] * inputs + i[None, :], mask=mask, other=0).to(tl.float32)
        if DEMODULATE:
            energy += tl.sum(s * s * tl.sum(w * w, 1)[None, :], 1)
        if tl.program_id(0) == 0:
            tl.store(modulation + b[:, None] * inputs + i[None, :], s / style_divisor[:, None], mask=mask)
    result = weight_divisor * style_divisor
    if DEMODULATE:
        result = result / tl.sqrt(energy + eps)
    tl.store(scale + b * outputs + o, result, mask=b < batch)


@triton.jit
def filter_tap(filter, u, v, taps, SEPARABLE: tl.constexpr):
    if SEPARABLE:
        return tl.load(filter + u).to(tl.float32) * tl.load(filter + v).to(tl.float32)
    else:
        return tl.load(filter + u * taps + v).to(tl.float32)


# x times its styles in the order (B, H', W', I), which lets the convolution load 16 bytes at a time; with a
# resampling filter of `taps` taps, filtered on the way.
@triton.jit
def modulate_kernel(
    x,  # (B, I, H, W) with any strides
    modulation,  # (B, I)
    filter,  # (taps,) if SEPARABLE, else (taps, taps)
    result,  # (B, rows, columns, I)
    inputs, height, width, stride_b, stride_i, stride_h, stride_w,
    pixels,  # B * rows * columns
    rows, columns, taps, before, FILTER: tl.constexpr, SEPARABLE: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(inputs, BLOCK_I)
    tile = tl.program_id(0)
    i = (tile % tiles).to(INDEX) * BLOCK_I + tl.arange(0, BLOCK_I)
    pixel = (tile // tiles).to(INDEX) * BLOCK_P + tl.arange(0, BLOCK_P)
    b = pixel // (tl.cast(rows, INDEX) * columns)
    row, column = pixel // columns % rows, pixel % columns
    mask = (i < inputs)[:, None] & (pixel < pixels)[None, :]
    source = x + (i * stride_i)[:, None] + (b * stride_b)[None, :]
    if FILTER:
        value = tl.zeros((BLOCK_I, BLOCK_P), tl.float32)
        for u in range(taps):
            h = row + (taps - 1 - u - before)
            for v in range(taps):
                w = column + (taps - 1 - v - before)
                inside = (h >= 0) & (h < height) & (w >= 0) & (w < width)
                tap = filter_tap(filter, u, v, taps, SEPARABLE)
                offset = (h * stride_h + w * stride_w)[None, :]
                value += tap * tl.load(source + offset, mask=mask & inside[None, :], other=0).to(tl.float32)
    else:
        value = tl.load(source + (row * stride_h + column * stride_w)[None, :], mask=mask, other=0)
        value = value.to(tl.float32)
    value *= tl.load(modulation + b[None, :] * inputs + i[:, None], mask=mask, other=0)
    target = result + pixel[:, None] * inputs + i[None, :]
    tl.store(target, tl.trans(value.to(result.dtype.element_ty)), mask=tl.trans(mask))


@triton.jit
def store_result(
    value,  # (BLOCK_O, BLOCK_P), demodulated
    b, row, column,
    valid,  # (BLOCK_P,)
    o,
    y,  # (B, O, rows, columns)
    demodulated,  # as y
    noise, noise_b, noise_h, noise_w, bias, outputs, rows, columns, slope, gain, clamp, KEEP: tl.constexpr,
    NOISE: tl.constexpr, BIAS: tl.constexpr, ACTIVATE: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    offset = (((b * outputs)[None, :] + o[:, None]) * rows + row[None, :]) * columns + column[None, :]
    mask = (o < outputs)[:, None] & valid[None, :]
    if KEEP:
        tl.store(demodulated + offset, value.to(y.dtype.element_ty), mask=mask)
    if NOISE:
        n = tl.load(noise + b * noise_b + row * noise_h + column * noise_w, mask=valid, other=0)
        value += n.to(value.dtype)[None, :]
    if BIAS:
        value += tl.load(bias + o, mask=o < outputs, other=0).to(value.dtype)[:, None]
    if ACTIVATE:
        value = tl.where(value > 0, value, value * slope)
    value *= gain
    if CLAMP:
        # Comparisons that let NaN through.
        value = tl.where(value > clamp, clamp, value)
        value = tl.where(value < -clamp, -clamp, value)
    tl.store(y + offset, value.to(y.dtype.element_ty), mask=mask)


# Implicit GEMM of BLOCK_P pixels by BLOCK_O filters. UP: stride-2 transposed convolution, one of its four
# output phases a program, each with the taps that meet samples and none that meet inserted zeros. PARTIAL
# writes `y` (splits, phases, B, rows, columns, O), scaled; otherwise the finished (B, O, rows, columns).
@triton.jit
def convolve_kernel(
    x,  # (B, H, W, I), modulated
    weight,  # (K * K, O, I)
    scale,  # (B, O)
    y, demodulated, noise, noise_b, noise_h, noise_w, bias, inputs, outputs, height, width,
    pixels,  # B * rows * columns
    rows, columns, padding, slope, gain, clamp, K: tl.constexpr, STRIDE: tl.constexpr, UP: tl.constexpr,
    PARTIAL: tl.constexpr, KEEP: tl.constexpr, NOISE: tl.constexpr, BIAS: tl.constexpr,
    ACTIVATE: tl.constexpr, CLAMP: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(outputs, BLOCK_O)
    tile = tl.program_id(0)
    o = (tile % tiles).to(INDEX) * BLOCK_O + tl.arange(0, BLOCK_O)
    pixel = (tile // tiles).to(INDEX) * BLOCK_P + tl.arange(0, BLOCK_P)
    phase, split = tl.program_id(1), tl.program_id(2)
    valid = pixel < pixels
    b = pixel // (tl.cast(rows, INDEX) * columns)
    row, column = pixel // columns % rows, pixel % columns
    if UP:
        taps_h = (K + 1) // 2 - phase // 2
        taps_w = (K + 1) // 2 - phase % 2
        h0, w0 = row, column
    else:
        taps_h, taps_w = K, K
        h0, w0 = row * STRIDE - padding, column * STRIDE - padding
    origin = x + ((b * height + h0) * width + w0) * inputs
    filters = weight + o * inputs
    steps = taps_h * taps_w * tl.cdiv(inputs, BLOCK_I)
    per_split = tl.cdiv(steps, tl.num_programs(2))
    value = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    # Taps vary fastest: neighbouring windows of the same channels stay in the cache.
    for step in range(split * per_split, min(steps, (split + 1) * per_split)):
        tap = step % (taps_h * taps_w)
        u, v = tap // taps_w, tap % taps_w
        if UP:
            du, dv = -u, -v
            place = (K - 1 - phase // 2 - 2 * u) * K + K - 1 - phase % 2 - 2 * v
        else:
            du, dv = u, v
            place = tap
        i = step // (taps_h * taps_w) * BLOCK_I + tl.arange(0, BLOCK_I)
        h, w = h0 + du, w0 + dv
        inside = valid & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        window = origin + (du * width + dv).to(INDEX) * inputs
        left = tl.load(window[:, None] + i[None, :], mask=inside[:, None] & (i < inputs)[None, :], other=0)
        right = tl.load(
            filters[None, :] + place.to(INDEX) * outputs * inputs + i[:, None],
            mask=(o < outputs)[None, :] & (i < inputs)[:, None],
            other=0,
        )
        value = tl.dot(left, right, value, input_precision=PRECISION)
    mask = valid[:, None] & (o < outputs)[None, :]
    value *= tl.load(scale + (b * outputs)[:, None] + o[None, :], mask=mask, other=0)
    if PARTIAL:
        part = (split * tl.num_programs(1) + phase).to(INDEX) * pixels + pixel
        tl.store(y + part[:, None] * outputs + o[None, :], value.to(y.dtype.element_ty), mask=mask)
    else:
        store_result(
            tl.trans(value), b, row, column, valid, o, y, demodulated, noise, noise_b, noise_h, noise_w, bias,
            outputs, rows, columns, slope, gain, clamp, KEEP, NOISE, BIAS, ACTIVATE, CLAMP,
        )  # fmt: skip


# Kernels of one tap: x is read where it lies, 16 bytes of pixels at a time, and modulated on the way.
@triton.jit
def pointwise_kernel(
    x,  # (B, I, rows, columns)
    weight,  # (O, I)
    modulation,  # (B, I)
    scale,  # (B, O)
    y, demodulated, noise, noise_b, noise_h, noise_w, bias, inputs, outputs, rows, columns, slope, gain,
    clamp, KEEP: tl.constexpr, NOISE: tl.constexpr, BIAS: tl.constexpr, ACTIVATE: tl.constexpr,
    CLAMP: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    plane = tl.cast(rows, INDEX) * columns
    tiles_o, tiles_p = tl.cdiv(outputs, BLOCK_O), tl.cdiv(plane, BLOCK_P)
    tile = tl.program_id(0)
    o = (tile % tiles_o).to(INDEX) * BLOCK_O + tl.arange(0, BLOCK_O)
    pixel = (tile // tiles_o % tiles_p).to(INDEX) * BLOCK_P + tl.arange(0, BLOCK_P)
    b = (tile // tiles_o // tiles_p).to(INDEX)
    valid = pixel < plane
    value = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    for start in range(0, inputs, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I).to(INDEX)
        left = tl.load(
            x + (b * inputs + i)[:, None] * plane + pixel[None, :],
            mask=(i < inputs)[:, None] & valid[None, :],
            other=0,
        )
        styles = tl.load(modulation + b * inputs + i, mask=i < inputs, other=0)
        left = (left.to(tl.float32) * styles[:, None]).to(left.dtype)
        right = tl.load(
            weight + o[None, :] * inputs + i[:, None],
            mask=(o < outputs)[None, :] & (i < inputs)[:, None],
            other=0,
        )
        value = tl.dot(tl.trans(left), right, value, input_precision=PRECISION)
    value *= tl.load(scale + b * outputs + o, mask=o < outputs, other=0)[None, :]
    store_result(
        tl.trans(value), b + tl.zeros_like(pixel), pixel // columns, pixel % columns, valid, o, y, demodulated,
        noise, noise_b, noise_h, noise_w, bias, outputs, rows, columns, slope, gain, clamp, KEEP, NOISE, BIAS,
        ACTIVATE, CLAMP,
    )  # fmt: skip


# Adds the splits of a convolution, filters its phases where UP, and finishes it.
@triton.jit
def finish_kernel(
    z,  # (splits, phases, B, z_rows, z_columns, O)
    filter,  # (taps,) if SEPARABLE, else (taps, taps)
    y, demodulated, noise, noise_b, noise_h, noise_w, bias, outputs,
    pixels,  # B * rows * columns
    rows, columns,
    z_pixels,  # B * z_rows * z_columns
    z_rows, z_columns,
    height,  # of the image that the phases make up
    width, splits, taps, before, slope, gain, clamp, UP: tl.constexpr, SEPARABLE: tl.constexpr,
    KEEP: tl.constexpr, NOISE: tl.constexpr, BIAS: tl.constexpr, ACTIVATE: tl.constexpr,
    CLAMP: tl.constexpr, INDEX: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(outputs, BLOCK_O)
    tile = tl.program_id(0)
    o = (tile % tiles).to(INDEX) * BLOCK_O + tl.arange(0, BLOCK_O)
    pixel = (tile // tiles).to(INDEX) * BLOCK_P + tl.arange(0, BLOCK_P)
    valid = pixel < pixels
    b = pixel // (tl.cast(rows, INDEX) * columns)
    row, column = pixel // columns % rows, pixel % columns
    mask = valid[:, None] & (o < outputs)[None, :]
    value = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    if UP:
        for u in range(taps):
            h = row + (taps - 1 - u - before)
            for v in range(taps):
                w = column + (taps - 1 - v - before)
                inside = (h >= 0) & (h < height) & (w >= 0) & (w < width)
                tap = filter_tap(filter, u, v, taps, SEPARABLE)
                part = (h % 2 * 2 + w % 2) * z_pixels + (b * z_rows + h // 2) * z_columns + w // 2
                for split in range(splits):
                    source = z + (part + tl.cast(split, INDEX) * 4 * z_pixels)[:, None] * outputs
                    sample = tl.load(source + o[None, :], mask=mask & inside[:, None], other=0)
                    value += 4 * tap * sample.to(tl.float32)
    else:
        for split in range(splits):
            source = z + (pixel + tl.cast(split, INDEX) * z_pixels)[:, None] * outputs + o[None, :]
            value += tl.load(source, mask=mask, other=0).to(tl.float32)
    store_result(
        tl.trans(value), b, row, column, valid, o, y, demodulated, noise, noise_b, noise_h, noise_w, bias,
        outputs, rows, columns, slope, gain, clamp, KEEP, NOISE, BIAS, ACTIVATE, CLAMP,
    )  # fmt: skip


@dataclass(frozen=True)
class Tile:
    """Block shape of an implicit GEMM, the parts its sum is split into, and how a block runs."""

    pixels: int
    outputs: int
    inputs: int
    splits: int
    warps: int
    stages: int

    def options(self) -> dict:
        return {
            "BLOCK_P": self.pixels,
            "BLOCK_O": self.outputs,
            "BLOCK_I": self.inputs,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def choose_tile(
    itemsize: int,
    precision: str,
    pixels: int,
    outputs: int,
    inputs: int,
    taps: int,
    phases: int,
    processors: int,
) -> Tile:
    """The tile for `phases` products, each of `pixels` by `outputs` numbers and in all over inputs * taps."""

    def size(count: int, largest: int) -> int:
        return min(largest, max(16, power_of_two(count)))

    if itemsize == 2:
        shapes, depth, stages = ((128, 128), (64, 64)), 64, 3
    else:
        shapes, depth, stages = ((128, 64), (64, 64)), 32, 3
    block_i = size(inputs, depth)
    # The smaller shape where the larger leaves multiprocessors without work.
    for tallest, widest in shapes:
        block_p, block_o = size(pixels, tallest), size(outputs, widest)
        tiles = cdiv(pixels, block_p) * cdiv(outputs, block_o) * phases
        if tiles >= processors:
            break
    steps = cdiv(taps, phases) * cdiv(inputs, block_i)
    splits = min(2 * processors // max(1, tiles), steps // 4, MOST_SPLITS)
    # Three products a number, with the parts that they multiply, take twice the registers.
    warps = 8 if block_p * block_o * (2 if precision == "tf32x3" else 1) > 64 * 128 else 4
    return Tile(block_p, block_o, block_i, max(1, splits), warps, stages)


def product_precision(dtype: torch.dtype) -> str:
    """The input_precision of `tl.dot`, which matters to float32 alone.

    One TensorFloat-32 product where torch's switch for convolutions allows that, else three of them, which
    are nearly as accurate as float32's own.
    """
    allowed = dtype != torch.float32 or torch.backends.cudnn.conv.fp32_precision == "tf32"
    return "tf32" if allowed else "tf32x3"


@functools.cache
def processors(device: torch.device) -> int:
    """The multiprocessors of a GPU; in triton's interpreter so few that some sums are split and some not."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _index_type(*extents: int) -> tl.dtype:
    """Type of the offsets into tensors of these extents."""
    return tl.int64 if max(extents) >= WIDE_FROM else tl.int32


def _prepare(weight: Tensor, styles: Tensor, demodulate: bool, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The weight as (k * k, O, I), what multiplies x (B, I), and what multiplies the convolution (B, O)."""
    outputs, inputs, k, _ = weight.shape
    batch = styles.shape[0]
    packed = weight.new_empty(k * k, outputs, inputs)
    modulation = weight.new_empty(batch, inputs, dtype=torch.float32)
    scale = weight.new_empty(batch, outputs, dtype=torch.float32)
    block_taps = power_of_two(k * k)
    launch(
        prepare_kernel, (outputs, cdiv(batch, 16)),
        weight.contiguous(), styles.contiguous(), packed, modulation, scale, batch, inputs, outputs, eps,
        TAPS=k * k, DEMODULATE=demodulate, GUARD=weight.dtype == torch.float16, BLOCK_TAPS=block_taps,
        BLOCK_I=min(256, max(16, 1024 // block_taps)), BLOCK_B=16,
        INDEX=_index_type(weight.numel(), styles.numel(), scale.numel()),
    )  # fmt: skip
    return packed, modulation, scale


def _modulate(x: Tensor, modulation: Tensor, f: Tensor | None, size: tuple[int, int], before: int) -> Tensor:
    """(B, *size, I): x times its styles, filtered by f where that is given."""
    batch, inputs = x.shape[:2]
    result = x.new_empty(batch, *size, inputs)
    pixels = batch * size[0] * size[1]
    extent = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    launch(
        modulate_kernel, (cdiv(pixels, FILTERED_PIXELS) * cdiv(inputs, 64),),
        x, modulation, f, result, inputs, *x.shape[2:], *x.stride(), pixels, *size,
        0 if f is None else f.shape[0], before, FILTER=f is not None,
        SEPARABLE=f is not None and f.dim() == 1, BLOCK_P=FILTERED_PIXELS, BLOCK_I=64, num_warps=8,
        INDEX=_index_type(extent, result.numel()),
    )  # fmt: skip
    return result


def modulated_conv2d(
    x, weight, styles, f, noise, bias, demodulate, up, down, padding, slope, gain, clamp, eps, keep
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The op of the same name on a GPU; float64, which is for gradient checks, is composed of torch's ops.

    A convolution of several taps reads a copy of x in the order (B, H, W, I), modulated and for down-sampling
    filtered as it is made: matrix units are fed 16 bytes at a time, which a window of a row of pixels, that
    begins anywhere, does not allow. Kernels of one tap modulate x where it lies.

    Up-sampling is the transposed convolution and then the filter, as the op is defined. One convolution with
    the product of both kernels would multiply four times as much (for k = 3 and four taps 9 times a pixel of
    each of the four phases, instead of 9 times for all of them).
    """
    if x.dtype == torch.float64:
        return composed(
            x, weight, styles, f, noise, bias, demodulate, up, down, padding, slope, gain, clamp, eps, keep
        )
    batch, inputs, height, width = x.shape
    outputs, k = weight.shape[0], weight.shape[2]
    taps = 0 if f is None else f.shape[0]
    sides = filter_padding(k, taps, padding, up)
    rows, columns = output_size((height, width), k, taps, padding, up, down)
    y = x.new_empty(batch, outputs, rows, columns)
    demodulated = torch.empty_like(y) if keep else x.new_empty(0)
    if y.numel() == 0:
        return y, demodulated
    precision = product_precision(x.dtype)
    f = None if f is None else f.contiguous()
    noise_strides = (0, 0, 0)
    if noise is not None:
        noise = noise.contiguous().expand(batch, 1, rows, columns)
        noise_strides = (noise.stride(0), noise.stride(2), noise.stride(3))
    targets = (y, demodulated, noise, *noise_strides, None if bias is None else bias.contiguous())
    activation = (slope, gain, 0.0 if clamp is None else clamp)
    epilogue = {
        "KEEP": keep,
        "NOISE": noise is not None,
        "BIAS": bias is not None,
        "ACTIVATE": slope != 1,
        "CLAMP": clamp is not None,
    }
    packed, modulation, scale = _prepare(weight, styles, demodulate, eps)

    if k == 1 and up == down == 1 and padding == 0:
        tile = choose_tile(x.itemsize, precision, rows * columns, outputs, inputs, 1, 1, 1)
        launch(
            pointwise_kernel,
            (batch * cdiv(rows * columns, tile.pixels) * cdiv(outputs, tile.outputs),),
            x.contiguous(), packed, modulation, scale, *targets, inputs, outputs, rows, columns,
            *activation, PRECISION=precision, **epilogue, **tile.options(),
            INDEX=_index_type(x.numel(), y.numel()),
        )  # fmt: skip
        return y, demodulated

    if down == 2:
        height, width = (size + sides[0] + sides[1] - taps + 1 for size in (height, width))
        modulated, padding = _modulate(x, modulation, f, (height, width), sides[0]), 0
    else:
        modulated = _modulate(x, modulation, None, (height, width), 0)

    # The image that the convolution makes: the result, or a phase of what becomes that.
    phases, z_rows, z_columns = (4, height + k // 2, width + k // 2) if up == 2 else (1, rows, columns)
    pixels = batch * z_rows * z_columns
    tile = choose_tile(x.itemsize, precision, pixels, outputs, inputs, k * k, phases, processors(x.device))
    partial = up == 2 or tile.splits > 1
    z = y
    if partial:
        dtype = x.dtype if tile.splits == 1 else torch.float32
        z = x.new_empty(tile.splits, phases, pixels, outputs, dtype=dtype)
    launch(
        convolve_kernel,
        (cdiv(pixels, tile.pixels) * cdiv(outputs, tile.outputs), phases, tile.splits),
        modulated, packed, scale, z, *targets[1:], inputs, outputs, height, width, pixels, z_rows,
        z_columns, padding, *activation, K=k, STRIDE=down, UP=up == 2, PARTIAL=partial, PRECISION=precision,
        **(dict.fromkeys(epilogue, False) if partial else epilogue), **tile.options(),
        INDEX=_index_type(modulated.numel(), z.numel(), packed.numel()),
    )  # fmt: skip
    if partial:
        block_o = min(64, max(16, power_of_two(outputs)))
        launch(
            finish_kernel, (cdiv(batch * rows * columns, FILTERED_PIXELS) * cdiv(outputs, block_o),),
            z, f, *targets, outputs, batch * rows * columns, rows, columns, pixels, z_rows, z_columns,
            (height - 1) * 2 + k, (width - 1) * 2 + k, tile.splits, taps, sides[0], *activation, UP=up == 2,
            SEPARABLE=f is not None and f.dim() == 1, BLOCK_P=FILTERED_PIXELS, BLOCK_O=block_o, num_warps=8,
            **epilogue, INDEX=_index_type(z.numel(), y.numel()),
        )  # fmt: skip
    return y, demodulated
