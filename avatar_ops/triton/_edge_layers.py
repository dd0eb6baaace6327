"""The layers of edge_mlp on tiles of edges, in Triton.

A tile has ROWS * SLOTS edges, of which _position.py says more. What a program has of a tile's layers beyond the first
goes through a workspace of its own, (edges, channels) for one layer after the other.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._launch import dot_precision, power_of_two
from ._position import MOST_SLOTS, WIDEST_BLOCK, block_pointers, incoming, leaky_relu, unknown

# Channels that a product takes at a time, of the layer that it starts from.
STEP = 16
# A layer's channels that the backward pass, which keeps more in registers, takes at a time.
GRADIENT_BLOCK = 64
# Edges of a tile by the dtype and the widest block of channels.
EDGES = {
    torch.float32: {16: 128, 32: 128, 64: 64, 128: 64},
    torch.float64: {16: 16, 32: 16, 64: 16, 128: 16},
}
# Numbers that a workspace of all programs may have, where p and q do not have more.
LEAST_WORKSPACE = 1 << 24

# Layers are constants: WIDTHS of each; PADDED with zeros to a multiple of its BLOCKS entry; PLACES, where a layer's
# channels stand among those of all, and their number; MATRICES, where in `parameters` the matrix [in, out] that leads
# to a layer stands, then where the scales of all channels do, which their shifts follow.


@triton.jit
def linear_channels(
    p, q, scratch, row, point, valid, start,
    LAYER: tl.constexpr, WIDTHS: tl.constexpr, PADDED: tl.constexpr, PLACES: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """(edges, COUNT): channels of a linear layer from `start` on; of the first, 0 where there is no edge."""
    if LAYER == 0:
        column = start + tl.arange(0, COUNT)
        mask = valid[:, None] & (column < WIDTHS[0])[None, :]
        own = tl.load(p + row[:, None] * WIDTHS[0] + column[None, :], mask=mask, other=0.0)
        neighbor = tl.load(q + point[:, None] * WIDTHS[0] + column[None, :], mask=mask, other=0.0)
        linear = own - neighbor
    else:
        scratch += row.shape[0] * (PLACES[LAYER] - PADDED[0])
        linear = tl.load(block_pointers(scratch, 0, start, PADDED[LAYER], 1, row.shape[0], COUNT))
    return linear


@triton.jit
def normalization(
    parameters, start, LAYER: tl.constexpr, PLACES: tl.constexpr, MATRICES: tl.constexpr, COUNT: tl.constexpr
):
    """Scales and shifts (1, COUNT) of a layer's channels from `start` on."""
    scales = parameters + MATRICES[len(PLACES) - 1] + PLACES[LAYER] + start + tl.arange(0, COUNT)
    return tl.load(scales)[None, :], tl.load(scales + PLACES[len(PLACES) - 1])[None, :]


@triton.jit
def activation_channels(
    p, q, parameters, scratch, row, point, valid, start,
    LAYER: tl.constexpr, WIDTHS: tl.constexpr, PADDED: tl.constexpr, PLACES: tl.constexpr, MATRICES: tl.constexpr,
    SLOPE: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """(edges, COUNT): activations of a layer, from channel `start` on; 0 beyond its width."""
    linear = linear_channels(p, q, scratch, row, point, valid, start, LAYER, WIDTHS, PADDED, PLACES, COUNT)
    scale, shift = normalization(parameters, start, LAYER, PLACES, MATRICES, COUNT)
    activation = leaky_relu(linear * scale + shift, SLOPE)
    # Infinite numbers times a padding of zeros would be NaN.
    inside = (start + tl.arange(0, COUNT) < WIDTHS[LAYER])[None, :]
    return tl.where(inside, activation, 0.0)


@triton.jit
def linear_block(
    p, q, parameters, scratch, row, point, valid, start,
    LAYER: tl.constexpr, WIDTHS: tl.constexpr, PADDED: tl.constexpr, BLOCKS: tl.constexpr, PLACES: tl.constexpr,
    MATRICES: tl.constexpr, SLOPE: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(edges, block): channels of a linear layer from `start` on, from the layer before."""
    if LAYER == 0:
        total = linear_channels(
            p, q, scratch, row, point, valid, start, LAYER, WIDTHS, PADDED, PLACES, BLOCKS[LAYER]
        )
    else:
        total = tl.zeros([row.shape[0], BLOCKS[LAYER]], p.dtype.element_ty)
        for inner in tl.range(0, unknown(PADDED[LAYER - 1]), STEP, disable_licm=True):
            left = activation_channels(
                p, q, parameters, scratch, row, point, valid, inner,
                LAYER - 1, WIDTHS, PADDED, PLACES, MATRICES, SLOPE, STEP,
            )  # fmt: skip
            matrix = parameters + MATRICES[LAYER]
            right = tl.load(block_pointers(matrix, inner, start, PADDED[LAYER], 1, STEP, BLOCKS[LAYER]))
            total = tl.dot(left, right, total, input_precision=PRECISION, out_dtype=total.dtype)
    return total


@triton.jit
def hidden_layers(
    p, q, parameters, scratch, row, point, valid,
    WIDTHS: tl.constexpr, PADDED: tl.constexpr, BLOCKS: tl.constexpr, PLACES: tl.constexpr, MATRICES: tl.constexpr,
    SLOPE: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes the linear layers between the first and the last to `scratch`."""
    for layer in tl.static_range(1, len(WIDTHS) - 1):
        # Until all threads have read what the tile before, or written what the layer before, has left.
        tl.debug_barrier()
        for start in tl.range(0, unknown(PADDED[layer]), BLOCKS[layer], disable_licm=True):
            block = linear_block(
                p, q, parameters, scratch, row, point, valid, start,
                layer, WIDTHS, PADDED, BLOCKS, PLACES, MATRICES, SLOPE, STEP, PRECISION,
            )  # fmt: skip
            store_channels(scratch, block, start, layer, PADDED, PLACES)
    tl.debug_barrier()


@triton.jit
def store_channels(scratch, block, start, LAYER: tl.constexpr, PADDED: tl.constexpr, PLACES: tl.constexpr):
    EDGES: tl.constexpr = block.shape[0]
    scratch += EDGES * (PLACES[LAYER] - PADDED[0])
    tl.store(block_pointers(scratch, 0, start, PADDED[LAYER], 1, EDGES, block.shape[1]), block)


def padded_width(width: int) -> int:
    if width > WIDEST_BLOCK:
        return triton.cdiv(width, WIDEST_BLOCK) * WIDEST_BLOCK
    return max(STEP, power_of_two(width))


def slots_of(k: int, edges: int) -> int:
    """Slots of a chunk: those that leave least of the last one empty, then the most."""
    sizes = [size for size in (4, 8, 16, MOST_SLOTS) if size <= edges]
    return min(sizes, key=lambda size: (triton.cdiv(k, size) * size, -size))


class Layers:
    """Inputs of the ops, packed for the kernels."""

    def __init__(self, p, q, points, weights, scales, shifts, slope, backward=False):
        self.rows, self.k = points.shape
        self.p, self.q, self.points = p.contiguous(), q.contiguous(), points.contiguous()
        self.widths = (p.shape[1], *(weight.shape[0] for weight in weights))
        self.padded = tuple(map(padded_width, self.widths))
        self.places = tuple(accumulate(self.padded, initial=0))
        sizes = [a * b for a, b in zip(self.padded, self.padded[1:], strict=False)]
        self.matrices = (0, *accumulate(sizes, initial=0))
        self.size = self.matrices[-1] + 2 * self.places[-1]
        self.parameters = p.new_zeros(self.size)
        matrices, of_scales, of_shifts = self.unpack(self.parameters)
        for target, source in zip(matrices, weights, strict=True):
            target.copy_(source.mT)
        # The last layer of statistics has neither.
        for targets, sources in ((of_scales, scales), (of_shifts, shifts)):
            for target, source in zip(targets, sources, strict=False):
                target.copy_(source)
        widest = GRADIENT_BLOCK if backward else WIDEST_BLOCK
        blocks = tuple(min(width, widest) for width in self.padded)
        edges = EDGES[p.dtype][max(blocks)]
        slots = slots_of(self.k, edges)
        self.options = {
            "WIDTHS": self.widths,
            "PADDED": self.padded,
            "BLOCKS": blocks,
            "PLACES": self.places,
            "MATRICES": self.matrices,
            "SLOPE": slope,
            "K": self.k,
            "ROWS": edges // slots,
            "SLOTS": slots,
            "STEP": STEP,
            "PRECISION": dot_precision(p.dtype),
            "num_warps": 8 if backward or max(blocks) > 64 else 4,
            # Loops are not pipelined: some read what the step before has written.
            "num_stages": 1,
            "maxnreg": 255,
        }
        self.tiles = triton.cdiv(self.rows, edges // slots) if self.k else 0
        # Programs that share a tile in the kernels that take one block of the last layer.
        self.first_blocks, self.last_blocks = self.padded[0] // blocks[0], self.padded[-1] // blocks[-1]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.p, self.q, self.points, self.parameters

    def unpack(self, flat: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Views of `parameters`, or of their gradient: matrices [in, out], scales and shifts of every layer."""
        matrices = [
            flat[begin : begin + inner * outer].view(inner, outer)[:inputs, :outputs]
            for begin, inner, outer, inputs, outputs in zip(
                self.matrices[1:-1], self.padded, self.padded[1:], self.widths, self.widths[1:], strict=False
            )
        ]
        scales, shifts = flat[self.matrices[-1] :].view(2, -1)
        scales, shifts = (
            [part[begin : begin + width] for begin, width in zip(self.places, self.widths, strict=False)]
            for part in (scales, shifts)
        )
        return matrices, scales, shifts

    def scratch_size(self, layers: int) -> int:
        """Numbers that `layers` layers after the first have of a tile."""
        channels = self.places[1 + layers] - self.padded[0]
        return self.options["ROWS"] * self.options["SLOTS"] * channels

    def fitting(self, numbers: int) -> int:
        """How many programs, or tiles, may have a workspace of so many numbers each."""
        most = max(self.p.numel() + self.q.numel(), LEAST_WORKSPACE)
        return max(1, most // max(numbers, 1))

    def incoming(self, per_round: int) -> tuple[Tensor, Tensor]:
        """The edges by round, then by the point that they lead to, as `incoming` gives them."""
        rounds, rows = triton.cdiv(self.tiles, per_round), per_round * self.options["ROWS"]
        points = F.pad(self.points, (0, 0, 0, max(0, rounds * rows - self.rows)), value=-1)
        return incoming(points[: rounds * rows].view(rounds, rows, self.k), self.rows)

    def padded_channels(self, tensor: Tensor) -> Tensor:
        """A vector over the last layer's channels, padded."""
        return F.pad(tensor, (0, self.padded[-1] - self.widths[-1]))
