"""The position network of local_attention_pool and edge_moments on tiles of edges, in Triton.

A tile has ROWS * SLOTS edges: ROWS points with SLOTS of their edges each, either to their neighbours or from
the points whose neighbour they are. Widths are padded with zeros to BLOCK, a power of two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import power_of_two

# Products of wider tiles do not fit into a multiprocessor's shared memory in every dtype.
WIDEST_BLOCK = 128
NARROWEST_BLOCK = 16
MOST_SLOTS = 32
# Sums over all edges run in slices of the points; where memory allows, between so many.
LEAST_SLICES, MOST_SLICES = 64, 256
# Edges of a tile by the dtype of sums and the width of a block.
EDGES = {
    torch.float32: {16: 32, 32: 32, 64: 32, 128: 32},
    torch.float64: {16: 32, 32: 32, 64: 32, 128: 16},
}


@triton.jit
def rows_of(tile, place, cloud, ROWS: tl.constexpr):
    """Rows (int64, of all clouds) of places in a tile, which of them exist, and the first row of the cloud.

    Every tile lies in one cloud.
    """
    tiles = (cloud + ROWS - 1) // ROWS
    row = tile % tiles * ROWS + place
    first = tl.full(place.shape, 1, tl.int64) * (tile // tiles) * cloud
    return first + row, row < cloud, first


@triton.jit
def outgoing_edges(neighbors, tile, chunk, cloud, k, ROWS: tl.constexpr, SLOTS: tl.constexpr):
    """Centre, neighbour (rows of all clouds) and existence of the edges of one chunk of slots."""
    edge = tl.arange(0, ROWS * SLOTS)
    center, inside, first = rows_of(tile, edge // SLOTS, cloud, ROWS)
    slot = chunk * SLOTS + edge % SLOTS
    index = tl.load(neighbors + center * k + slot, mask=inside & (slot < k), other=-1)
    tl.device_assert((index >= -1) & (index < cloud), "neighbors: an index outside [-1, N)")
    return center, first + index, (index >= 0) & (index < cloud)


@triton.jit
def incoming_chunks(offsets, tile, cloud, ROWS: tl.constexpr, SLOTS: tl.constexpr):
    """Number of chunks of slots that hold every edge to the points of a tile."""
    row, inside, _ = rows_of(tile, tl.arange(0, ROWS), cloud, ROWS)
    begin = tl.load(offsets + row, mask=inside, other=0)
    end = tl.load(offsets + row + 1, mask=inside, other=0)
    return (tl.max(end - begin, 0) + SLOTS - 1) // SLOTS


@triton.jit
def incoming_edges(offsets, centers, tile, chunk, cloud, ROWS: tl.constexpr, SLOTS: tl.constexpr):
    """As outgoing_edges, for the edges that lead to the points of a tile."""
    edge = tl.arange(0, ROWS * SLOTS)
    neighbor, inside, _ = rows_of(tile, edge // SLOTS, cloud, ROWS)
    begin = tl.load(offsets + neighbor, mask=inside, other=0)
    end = tl.load(offsets + neighbor + 1, mask=inside, other=0)
    place = begin + chunk * SLOTS + edge % SLOTS
    valid = place < end
    return tl.load(centers + place, mask=valid, other=0), neighbor, valid


@triton.jit
def square_block(matrix, row, column, stride, BLOCK: tl.constexpr):
    """Pointers to block (row, column) of a matrix."""
    place = tl.arange(0, BLOCK)
    return matrix + (row * BLOCK + place)[:, None] * stride + (column * BLOCK + place)[None, :]


@triton.jit
def add_to(pointers, value):
    """Adds to numbers that this program alone writes."""
    tl.store(pointers, tl.load(pointers) + value)


@triton.jit
def coordinates(points, center, neighbor, valid, dimension, DIMS: tl.constexpr, ACC: tl.constexpr):
    p = tl.load(points + center * DIMS + dimension, mask=valid, other=0.0).to(ACC)
    q = tl.load(points + neighbor * DIMS + dimension, mask=valid, other=0.0).to(ACC)
    return p, q


@triton.jit
def leaky_relu(value, SLOPE: tl.constexpr):
    return tl.where(value > 0, value, SLOPE * value)


@triton.jit
def position_network(
    points, center, neighbor, valid, code_weight, layer_weight, bias, depth,
    SLOPE: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(edges, BLOCK): the first `depth` layers on the code of each edge; of no meaning where none exists.

    code_weight (3 DIMS + 1, BLOCK) and layer_weight (layers, BLOCK, BLOCK) are [in, out]. The code enters by
    exact differences and multiply-adds: products of rounded coordinates would cancel far from the origin.
    """
    ACC: tl.constexpr = bias.dtype.element_ty
    column = tl.arange(0, BLOCK)
    hidden = tl.zeros([center.shape[0], BLOCK], ACC) + tl.load(bias + column)[None, :]
    squared = tl.zeros([center.shape[0]], ACC)
    for d in range(DIMS):
        p, q = coordinates(points, center, neighbor, valid, d, DIMS, ACC)
        difference = p - q
        squared += difference * difference
        hidden += p[:, None] * tl.load(code_weight + d * BLOCK + column)[None, :]
        hidden += q[:, None] * tl.load(code_weight + (DIMS + d) * BLOCK + column)[None, :]
        hidden += difference[:, None] * tl.load(code_weight + (2 * DIMS + d) * BLOCK + column)[None, :]
    hidden += tl.sqrt(squared)[:, None] * tl.load(code_weight + 3 * DIMS * BLOCK + column)[None, :]
    hidden = leaky_relu(hidden, SLOPE)
    for layer in range(1, depth):
        weight = tl.load(square_block(layer_weight, layer - 1, 0, BLOCK, BLOCK))
        hidden = tl.dot(hidden, weight, input_precision=PRECISION, out_dtype=ACC)
        hidden = leaky_relu(hidden + tl.load(bias + layer * BLOCK + column)[None, :], SLOPE)
    return hidden


@triton.jit
def position_network_backward(
    gradient, output, points, center, neighbor, valid, code_weight, layer_weight, bias, partial, depth,
    WEIGHTS: tl.constexpr, SLOPE: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of what the first LeakyReLU is given, from that of the output; 0 where no edge exists.

    With WEIGHTS, the gradients of code_weight, layer_weight and bias are added to `partial`, which holds them
    in this order.
    """
    ACC: tl.constexpr = bias.dtype.element_ty
    column = tl.arange(0, BLOCK)
    layers = partial + (3 * DIMS + 1) * BLOCK
    biases = layers + (depth - 1) * BLOCK * BLOCK
    for step in range(1, depth):
        layer = depth - step
        gradient = tl.where(output > 0, gradient, SLOPE * gradient)
        output = position_network(
            points, center, neighbor, valid, code_weight, layer_weight, bias, layer,
            SLOPE, DIMS, BLOCK, PRECISION,
        )  # fmt: skip
        if WEIGHTS:
            product = tl.dot(tl.trans(output), gradient, input_precision=PRECISION, out_dtype=ACC)
            add_to(square_block(layers, layer - 1, 0, BLOCK, BLOCK), product)
            add_to(biases + layer * BLOCK + column, tl.sum(gradient, 0))
        weight = tl.load(square_block(layer_weight, layer - 1, 0, BLOCK, BLOCK))
        gradient = tl.dot(gradient, tl.trans(weight), input_precision=PRECISION, out_dtype=ACC)
    gradient = tl.where(output > 0, gradient, SLOPE * gradient)
    if WEIGHTS:
        add_to(biases + column, tl.sum(gradient, 0))
        squared = tl.zeros([center.shape[0]], ACC)
        for d in range(DIMS):
            p, q = coordinates(points, center, neighbor, valid, d, DIMS, ACC)
            squared += (p - q) * (p - q)
            add_to(partial + d * BLOCK + column, tl.sum(gradient * p[:, None], 0))
            add_to(partial + (DIMS + d) * BLOCK + column, tl.sum(gradient * q[:, None], 0))
            add_to(partial + (2 * DIMS + d) * BLOCK + column, tl.sum(gradient * (p - q)[:, None], 0))
        by_distance = tl.sum(gradient * tl.sqrt(squared)[:, None], 0)
        add_to(partial + 3 * DIMS * BLOCK + column, by_distance)
    return gradient


@triton.jit
def add_points_gradient(
    gradient, points, center, neighbor, valid, code_weight, grad_points, tile, cloud,
    CENTER: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Adds to grad_points (rows, DIMS) what the tile's edges send to their centres, or to their neighbours."""
    ACC: tl.constexpr = gradient.dtype
    column = tl.arange(0, BLOCK)
    squared = tl.zeros([center.shape[0]], ACC)
    for d in range(DIMS):
        p, q = coordinates(points, center, neighbor, valid, d, DIMS, ACC)
        squared += (p - q) * (p - q)
    by_distance = tl.sum(gradient * tl.load(code_weight + 3 * DIMS * BLOCK + column)[None, :], 1)
    by_distance = tl.where(squared > 0, by_distance / tl.sqrt(tl.where(squared > 0, squared, 1.0)), 0.0)
    row, inside, _ = rows_of(tile, tl.arange(0, ROWS), cloud, ROWS)
    for d in range(DIMS):
        p, q = coordinates(points, center, neighbor, valid, d, DIMS, ACC)
        weight = tl.load(code_weight + (2 * DIMS + d) * BLOCK + column)
        if CENTER:
            weight = tl.load(code_weight + d * BLOCK + column) + weight
            edge = tl.sum(gradient * weight[None, :], 1) + by_distance * (p - q)
        else:
            weight = tl.load(code_weight + (DIMS + d) * BLOCK + column) - weight
            edge = tl.sum(gradient * weight[None, :], 1) - by_distance * (p - q)
        total = tl.sum(tl.reshape(tl.where(valid, edge, 0.0), ROWS, SLOTS), 1)
        target = grad_points + row * DIMS + d
        tl.store(target, tl.load(target, mask=inside, other=0.0) + total, mask=inside)


@dataclass(frozen=True)
class PositionLayers:
    """The layers of a position network, padded and transposed for the kernels."""

    code_weight: Tensor  # (3 D + 1, block)
    layer_weight: Tensor  # (layers - 1, block, block)
    bias: Tensor  # (layers, block)
    widths: tuple[int, ...]

    @property
    def depth(self) -> int:
        return len(self.widths)

    @property
    def size(self) -> int:
        """Numbers of a gradient of all of them."""
        return self.code_weight.numel() + self.layer_weight.numel() + self.bias.numel()

    def gradients(self, flat: Tensor) -> list[Tensor]:
        """Gradients of the weights, then of the biases, from the numbers that the kernels add up."""
        parts = (self.code_weight, self.layer_weight, self.bias)
        code, layers, bias = (
            part.view(like.shape)
            for part, like in zip(flat.split([p.numel() for p in parts]), parts, strict=True)
        )
        weights = [code[:, : self.widths[0]].mT]
        for layer, (inputs, outputs) in zip(
            layers, zip(self.widths, self.widths[1:], strict=False), strict=True
        ):
            weights.append(layer[:inputs, :outputs].mT)
        return [
            t.clone(memory_format=torch.contiguous_format)
            for t in (*weights, *(b[:w] for b, w in zip(bias, self.widths, strict=True)))
        ]


def pack_layers(
    weights: list[Tensor], biases: list[Tensor], block: int, dtype: torch.dtype
) -> PositionLayers:
    """The layers (out, in) and (out,) in `dtype`, padded with zeros to `block`."""
    like = weights[0]
    code = like.new_zeros(like.shape[1], block, dtype=dtype)
    code[:, : like.shape[0]] = like.mT
    layers = like.new_zeros(len(weights) - 1, block, block, dtype=dtype)
    for layer, weight in zip(layers, weights[1:], strict=True):
        layer[: weight.shape[1], : weight.shape[0]] = weight.mT
    packed = like.new_zeros(len(weights), block, dtype=dtype)
    for row, bias in zip(packed, biases, strict=True):
        row[: bias.shape[0]] = bias
    return PositionLayers(code, layers, packed, tuple(weight.shape[0] for weight in weights))


def block_of(op: str, widths: list[int]) -> int:
    """The padded width of a position network's layers."""
    widest = max(widths)
    if widest > WIDEST_BLOCK:
        raise ValueError(
            f"position_weight: got {widest} outputs of a layer, expected at most {WIDEST_BLOCK} for {op} on CUDA"
        )
    return max(NARROWEST_BLOCK, power_of_two(widest))


def tile_options(k: int, block: int, dtype: torch.dtype) -> dict[str, int]:
    """Launch options of a kernel on rows of k edges, such that a tile's numbers fit into registers."""
    edges = EDGES[dtype][block]
    slots = min(power_of_two(k), MOST_SLOTS, edges)
    return {
        "BLOCK": block,
        "ROWS": edges // slots,
        "SLOTS": slots,
        "num_warps": 8 if block >= 64 else 4,
        "num_stages": 1,
    }


def slice_count(tiles: int, result: int, numbers: int) -> int:
    """Into how many slices `tiles` go when each slice keeps `numbers`: the same on every device.

    Beyond the least number they take no more memory than four results of `result` numbers.
    """
    return min(tiles, MOST_SLICES, max(4 * result // numbers, LEAST_SLICES))


def incoming(neighbors: Tensor) -> tuple[Tensor, Tensor]:
    """The edges by the point that they lead to.

    Returns:
        offsets: (B N + 1,) int64; those to point i of all clouds stand at offsets[i] ... offsets[i + 1] - 1.
        centers: (B N K,) int64 the points, of all clouds, that they come from, ascending for each point.
    """
    batch, cloud, k = neighbors.shape
    rows = batch * cloud
    first = torch.arange(batch, device=neighbors.device).view(-1, 1, 1) * cloud
    targets = torch.where(neighbors >= 0, neighbors + first, rows).flatten()
    targets, order = targets.sort(stable=True)
    offsets = torch.searchsorted(targets, torch.arange(rows + 1, device=neighbors.device))
    return offsets, order.div_(k, rounding_mode="floor")
