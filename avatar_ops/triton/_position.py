"""The position network of local_attention_pool and edge_moments on tiles of edges, in Triton.

A tile has ROWS * SLOTS edges: ROWS points with SLOTS of their edges each, either to their neighbours or from
the points whose neighbour they are. Widths are padded with zeros to BLOCK, a power of two, and the 3 DIMS + 1
numbers of an edge's code to CODE.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch, power_of_two

# A layer's square matrix has to fit into a multiprocessor's shared memory in every dtype.
WIDEST_BLOCK = 128
NARROWEST_BLOCK = 16
MOST_SLOTS = 32
# Sums over all edges run in slices of the points; where memory allows, between so many.
LEAST_SLICES, MOST_SLICES = 128, 1024
# Of a kernel whose programs take several tiles.
MOST_PROGRAMS = 2048
# Edges of a tile by the dtype of sums and the width of a block; in kernels that add up weights' gradients,
# which keep more in registers.
EDGES = {
    torch.float32: {16: 64, 32: 64, 64: 32, 128: 32},
    torch.float64: {16: 16, 32: 16, 64: 16, 128: 16},
}
WEIGHT_GRADIENT_EDGES = {
    torch.float32: {16: 64, 32: 32, 64: 32, 128: 16},
    torch.float64: {16: 16, 32: 16, 64: 16, 128: 16},
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
def outgoing_edges(neighbors, tile, chunk, cloud, K: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr):
    """Centre, neighbour (rows of all clouds) and existence of the edges of one chunk of slots."""
    edge = tl.arange(0, ROWS * SLOTS)
    center, inside, first = rows_of(tile, edge // SLOTS, cloud, ROWS)
    slot = chunk * SLOTS + edge % SLOTS
    index = tl.load(neighbors + center * K + slot, mask=inside & (slot < K), other=-1)
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
def incoming_edges(
    offsets, order, tile, chunk, cloud, K: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr
):
    """As outgoing_edges, for the edges that lead to the points of a tile."""
    edge = tl.arange(0, ROWS * SLOTS)
    neighbor, inside, _ = rows_of(tile, edge // SLOTS, cloud, ROWS)
    begin = tl.load(offsets + neighbor, mask=inside, other=0)
    end = tl.load(offsets + neighbor + 1, mask=inside, other=0)
    place = begin + chunk * SLOTS + edge % SLOTS
    valid = place < end
    return tl.load(order + place, mask=valid, other=0) // K, neighbor, valid


@triton.jit
def block_pointers(matrix, row, column, row_stride, column_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to (ROWS, COLUMNS) of a matrix, from a row and a column on."""
    rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    return matrix + rows[:, None] * row_stride + columns[None, :] * column_stride


@triton.jit
def share(scratch, value):
    """Writes a tile where every thread may read parts of it that Triton could not take from registers."""
    tl.debug_barrier()
    ROWS: tl.constexpr = value.shape[0]
    COLUMNS: tl.constexpr = value.shape[1]
    tl.store(block_pointers(scratch, 0, 0, COLUMNS, 1, ROWS, COLUMNS), value)
    tl.debug_barrier()


@triton.jit
def unknown(number):
    """`number`, as a bound that compilers do not know: they unroll short loops until registers spill."""
    return tl.minimum(number, tl.num_programs(0) * number)


@triton.jit
def multiply_add(
    total, value, scratch, matrix, row, column, row_stride, column_stride,
    STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + value @ a block of a matrix in memory, STEP of its rows at a time."""
    INPUTS: tl.constexpr = value.shape[1]
    OUTPUTS: tl.constexpr = total.shape[1]
    if INPUTS > STEP:
        share(scratch, value)
        for start in tl.range(0, unknown(INPUTS), STEP, disable_licm=True):
            left = tl.load(block_pointers(scratch, 0, start, INPUTS, 1, value.shape[0], STEP))
            right = tl.load(
                block_pointers(matrix, row + start, column, row_stride, column_stride, STEP, OUTPUTS)
            )
            total = tl.dot(left, right, total, input_precision=PRECISION, out_dtype=total.dtype)
    else:
        right = tl.load(block_pointers(matrix, row, column, row_stride, column_stride, INPUTS, OUTPUTS))
        total = tl.dot(value, right, total, input_precision=PRECISION, out_dtype=total.dtype)
    return total


@triton.jit
def add_product_to(
    matrix, left, right, scratch, row, column, stride, STEP: tl.constexpr, PRECISION: tl.constexpr
):
    """Adds left^T @ right to a block of a matrix in memory, STEP of its rows at a time."""
    OUTPUTS: tl.constexpr = left.shape[1]
    if OUTPUTS > STEP:
        share(scratch, left)
        for start in tl.range(0, unknown(OUTPUTS), STEP, disable_licm=True):
            part = tl.load(block_pointers(scratch, start, 0, 1, OUTPUTS, STEP, left.shape[0]))
            product = tl.dot(part, right, input_precision=PRECISION, out_dtype=right.dtype)
            add_to(block_pointers(matrix, row + start, column, stride, 1, STEP, right.shape[1]), product)
    else:
        product = tl.dot(tl.trans(left), right, input_precision=PRECISION, out_dtype=right.dtype)
        add_to(block_pointers(matrix, row, column, stride, 1, OUTPUTS, right.shape[1]), product)


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
    points, center, neighbor, valid, code_weight, layer_weight, bias, scratch, depth,
    SLOPE: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(edges, BLOCK): the first `depth` layers on the code of each edge; of no meaning where none exists.

    code_weight (CODE, BLOCK) and layer_weight (layers, BLOCK, BLOCK) are [in, out]. The code enters by exact
    differences and multiply-adds: products of rounded coordinates would cancel far from the origin.
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
    for layer in tl.range(1, depth, disable_licm=True):
        total = tl.zeros(hidden.shape, ACC) + tl.load(bias + layer * BLOCK + column)[None, :]
        row = (layer - 1) * BLOCK
        hidden = multiply_add(total, hidden, scratch, layer_weight, row, 0, BLOCK, 1, STEP, PRECISION)
        hidden = leaky_relu(hidden, SLOPE)
    return hidden


@triton.jit
def edge_codes(points, center, neighbor, valid, DIMS: tl.constexpr, CODE: tl.constexpr, ACC: tl.constexpr):
    """(edges, CODE): [p_i ; p_j ; p_i - p_j ; |p_i - p_j|] and zeros."""
    place = tl.arange(0, CODE)
    part, dimension = place // DIMS, place % DIMS
    mask = valid[:, None] & (part < 3)[None, :]
    p = tl.load(points + center[:, None] * DIMS + dimension[None, :], mask=mask, other=0.0).to(ACC)
    q = tl.load(points + neighbor[:, None] * DIMS + dimension[None, :], mask=mask, other=0.0).to(ACC)
    difference = tl.where((part == 2)[None, :], p - q, 0.0)
    distance = tl.sqrt(tl.sum(difference * difference, 1))
    code = difference + tl.where((part == 0)[None, :], p, 0.0) + tl.where((part == 1)[None, :], q, 0.0)
    return tl.where((place == 3 * DIMS)[None, :], distance[:, None], code)


@triton.jit
def position_network_backward(
    gradient, output, points, center, neighbor, valid, code_weight, layer_weight, bias, scratch, partial,
    SLOPE: tl.constexpr, DEPTH: tl.constexpr, DIMS: tl.constexpr, CODE: tl.constexpr, BLOCK: tl.constexpr,
    STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of what the first LeakyReLU is given, from that of the output; 0 where no edge exists.

    The gradients of code_weight, layer_weight and bias are added to `partial`, which holds them in this order.
    """
    ACC: tl.constexpr = bias.dtype.element_ty
    column = tl.arange(0, BLOCK)
    layers = partial + CODE * BLOCK
    biases = layers + (DEPTH - 1) * BLOCK * BLOCK
    for step in tl.range(1, DEPTH, disable_licm=True):
        layer = DEPTH - step
        gradient = tl.where(output > 0, gradient, SLOPE * gradient)
        output = position_network(
            points, center, neighbor, valid, code_weight, layer_weight, bias, scratch, layer,
            SLOPE, DIMS, BLOCK, STEP, PRECISION,
        )  # fmt: skip
        row = (layer - 1) * BLOCK
        add_product_to(layers, output, gradient, scratch, row, 0, BLOCK, STEP, PRECISION)
        add_to(biases + layer * BLOCK + column, tl.sum(gradient, 0))
        total = tl.zeros(gradient.shape, ACC)
        # The matrix transposed: rows of that are columns of this.
        gradient = multiply_add(
            total, gradient, scratch, layer_weight + row * BLOCK, 0, 0, 1, BLOCK, STEP, PRECISION
        )
    gradient = tl.where(output > 0, gradient, SLOPE * gradient)
    add_to(biases + column, tl.sum(gradient, 0))
    code = edge_codes(points, center, neighbor, valid, DIMS, CODE, ACC)
    add_product_to(partial, code, gradient, scratch, 0, 0, BLOCK, STEP, PRECISION)
    return gradient


@triton.jit
def send_to_points(
    gradient, points, center, neighbor, valid, code_weight, grad_points, grad_edges, tile, chunk, cloud,
    K: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Adds to grad_points (rows, DIMS) what a tile's edges send to their centres.

    What they send to their neighbours goes to grad_edges (rows, K, DIMS), for sum_edges_kernel.
    """
    ACC: tl.constexpr = gradient.dtype
    column = tl.arange(0, BLOCK)
    squared = tl.zeros([center.shape[0]], ACC)
    for d in range(DIMS):
        p, q = coordinates(points, center, neighbor, valid, d, DIMS, ACC)
        squared += (p - q) * (p - q)
    by_distance = tl.sum(gradient * tl.load(code_weight + 3 * DIMS * BLOCK + column)[None, :], 1)
    by_distance = tl.where(squared > 0, by_distance / tl.sqrt(tl.where(squared > 0, squared, 1.0)), 0.0)
    row, inside, _ = rows_of(tile, tl.arange(0, ROWS), cloud, ROWS)
    edge = center * K + chunk * SLOTS + tl.arange(0, ROWS * SLOTS) % SLOTS
    for d in range(DIMS):
        p, q = coordinates(points, center, neighbor, valid, d, DIMS, ACC)
        of_center = tl.load(code_weight + d * BLOCK + column)
        of_neighbor = tl.load(code_weight + (DIMS + d) * BLOCK + column)
        of_difference = tl.load(code_weight + (2 * DIMS + d) * BLOCK + column)
        along = by_distance * (p - q)
        to_neighbor = tl.sum(gradient * (of_neighbor - of_difference)[None, :], 1) - along
        tl.store(grad_edges + edge * DIMS + d, to_neighbor, mask=valid)
        to_center = tl.sum(gradient * (of_center + of_difference)[None, :], 1) + along
        total = tl.sum(tl.reshape(tl.where(valid, to_center, 0.0), ROWS, SLOTS), 1)
        target = grad_points + row * DIMS + d
        tl.store(target, tl.load(target, mask=inside, other=0.0) + total, mask=inside)


@triton.jit
def sum_edges_kernel(
    grad_edges, offsets, order, grad_points, rows, DIMS: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr
):
    """Adds to grad_points (rows, DIMS) what edges send to the point that they lead to."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    begin = tl.load(offsets + row, mask=row < rows, other=0)
    end = tl.load(offsets + row + 1, mask=row < rows, other=0)
    chunks = (tl.max(end - begin, 0) + SLOTS - 1) // SLOTS
    for d in range(DIMS):
        total = tl.load(grad_points + row * DIMS + d, mask=row < rows, other=0.0)
        for chunk in tl.range(chunks, disable_licm=True):
            place = begin[:, None] + chunk * SLOTS + tl.arange(0, SLOTS)[None, :]
            edge = tl.load(order + place, mask=place < end[:, None], other=0)
            total += tl.sum(tl.load(grad_edges + edge * DIMS + d, mask=place < end[:, None], other=0.0), 1)
        tl.store(grad_points + row * DIMS + d, total, mask=row < rows)


@dataclass(frozen=True)
class PositionLayers:
    """The layers of a position network, padded and transposed for the kernels."""

    code_weight: Tensor  # (code, block): 3 D + 1 rows and zeros
    layer_weight: Tensor  # (layers - 1, block, block)
    bias: Tensor  # (layers, block)
    widths: tuple[int, ...]
    columns: int  # 3 D + 1

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
        weights = [code[: self.columns, : self.widths[0]].mT]
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
    columns = like.shape[1]
    code = like.new_zeros(max(NARROWEST_BLOCK, power_of_two(columns)), block, dtype=dtype)
    code[:columns, : like.shape[0]] = like.mT
    layers = like.new_zeros(len(weights) - 1, block, block, dtype=dtype)
    for layer, weight in zip(layers, weights[1:], strict=True):
        layer[: weight.shape[1], : weight.shape[0]] = weight.mT
    packed = like.new_zeros(len(weights), block, dtype=dtype)
    for row, bias in zip(packed, biases, strict=True):
        row[: bias.shape[0]] = bias
    return PositionLayers(code, layers, packed, tuple(weight.shape[0] for weight in weights), columns)


def block_of(op: str, widths: list[int]) -> int:
    """The padded width of a position network's layers."""
    widest = max(widths)
    if widest > WIDEST_BLOCK:
        raise ValueError(
            f"position_weight: got {widest} outputs of a layer, expected at most {WIDEST_BLOCK} for {op} on CUDA"
        )
    return max(NARROWEST_BLOCK, power_of_two(widest))


def tile_options(k: int, block: int, dtype: torch.dtype, edges=EDGES) -> dict[str, int]:
    """Launch options of a kernel on rows of k edges, such that a tile's numbers fit into registers.

    Loops are not pipelined (num_stages): some read what the step before has written. Unless it may
    have all registers (maxnreg), ptxas spills a few here and there to have more programs resident.
    """
    count = edges[dtype][block]
    slots = min(power_of_two(k), MOST_SLOTS, count)
    return {
        "K": k,
        "BLOCK": block,
        "ROWS": count // slots,
        "SLOTS": slots,
        "STEP": 32,
        "num_warps": 4 if block <= 16 else 8,
        "num_stages": 1,
        "maxnreg": 255,
    }


def weight_gradient_options(k: int, block: int, layers: PositionLayers) -> dict[str, int]:
    options = tile_options(k, block, layers.bias.dtype, WEIGHT_GRADIENT_EDGES)
    return options | {"STEP": 16, "CODE": layers.code_weight.shape[0]}


def new_scratch(like: Tensor, programs: int, options: dict[str, int]) -> Tensor:
    """(programs, ...): what `share` writes, if products are made step by step."""
    widest = max(options["BLOCK"], options.get("CODE", 0))
    width = widest if widest > options["STEP"] else 0
    return like.new_empty(programs, options["ROWS"] * options["SLOTS"] * width)


def program_count(tiles: int) -> int:
    """How many programs share tiles of which each gives a part of the result: bounds the scratch memory."""
    return min(tiles, MOST_PROGRAMS)


def slice_count(tiles: int, result: int, numbers: int) -> int:
    """Into how many slices `tiles` go when each slice keeps `numbers`: the same on every device.

    Beyond the least number they take no more memory than four results of `result` numbers.
    """
    return min(tiles, MOST_SLICES, max(4 * result // numbers, LEAST_SLICES))


def incoming(neighbors: Tensor, cloud: int | None = None) -> tuple[Tensor, Tensor]:
    """The edges (B, M, K) by the point that they lead to, of `cloud` points (default: M) of each cloud.

    Returns:
        offsets: (B N + 1,) int64; those to point i of all clouds stand at offsets[i] ... offsets[i + 1] - 1.
        order: (B M K,) int64 the places of edges in `neighbors`, ascending for each point.
    """
    batch, cloud = neighbors.shape[0], neighbors.shape[1] if cloud is None else cloud
    rows = batch * cloud
    # A sort takes time by the byte.
    dtype = torch.int32 if rows < 2**31 - 1 else torch.int64
    first = torch.arange(batch, device=neighbors.device).view(-1, 1, 1) * cloud
    targets = torch.where(neighbors >= 0, neighbors + first, rows).to(dtype).flatten()
    targets, order = targets.sort(stable=True)
    offsets = torch.searchsorted(targets, torch.arange(rows + 1, device=neighbors.device, dtype=dtype))
    return offsets, order


def add_edges_to_points(grad_edges: Tensor, edges: tuple[Tensor, Tensor], grad_points: Tensor) -> None:
    """Adds grad_edges (B, N, K, D), by the point that each edge leads to, to grad_points (B, N, D)."""
    rows, dims = grad_points.shape[0] * grad_points.shape[1], grad_points.shape[2]
    launch(
        sum_edges_kernel, (triton.cdiv(rows, 32),),
        grad_edges, *edges, grad_points, rows, DIMS=dims, ROWS=32, SLOTS=8, num_warps=4,
    )  # fmt: skip
