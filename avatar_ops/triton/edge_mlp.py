"""edge_layers, on which edge_mlp is built, in Triton: kernels, then launchers.

The first linear layer of edge (i, j) is p_i - q_j, gathered; each further one is a product with the activations of
the one before, on matrix units. Programs work on tiles of edges (_position.py). What a tile's layers beyond the
first hold goes through a workspace of each program's own, so neither depth nor width is bounded and memory does not
grow with edges.

The backward pass computes the layers again. What an edge sends to its neighbour waits in a buffer, that of some rows
at a time, until the points that they lead to add it up: less traffic than the products once more for each incoming
edge would be work. Sums have a fixed order: there are no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._edge_layers import (
    Layers,
    activation_channels,
    hidden_layers,
    linear_block,
    linear_channels,
    normalization,
    store_channels,
)
from ._launch import launch
from ._position import (
    add_to,
    block_pointers,
    leaky_relu,
    outgoing_edges,
    program_count,
    rows_of,
    slice_count,
    unknown,
)

# Of the kernel that adds up by the point that edges lead to.
INCOMING = {"ROWS": 8, "SLOTS": 4, "num_warps": 4, "maxnreg": 255}


@triton.jit(do_not_specialize=["rows", "tiles"])
def maximum_kernel(
    p, q, points, parameters, output, slots, scratch, rows, tiles, scratch_size,
    SAVE: tl.constexpr, WIDTHS: tl.constexpr, PADDED: tl.constexpr, BLOCKS: tl.constexpr, PLACES: tl.constexpr,
    MATRICES: tl.constexpr, SLOPE: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
    STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of the last layer's channels: the maximum over edges and, with SAVE, the first slot that has it."""
    LAST: tl.constexpr = len(WIDTHS) - 1
    BLOCK: tl.constexpr = BLOCKS[LAST]
    ACC: tl.constexpr = p.dtype.element_ty
    scratch += (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * scratch_size
    start = tl.program_id(1) * BLOCK
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), disable_licm=True):
        best = tl.full([ROWS, BLOCK], float("-inf"), ACC)
        place = tl.full([ROWS, BLOCK], -1, tl.int32)
        some = tl.zeros([ROWS], tl.int32)
        for chunk in tl.range(tl.cdiv(K, SLOTS), disable_licm=True):
            row, point, valid = outgoing_edges(points, tile, chunk, rows, K, ROWS, SLOTS)
            hidden_layers(
                p, q, parameters, scratch, row, point, valid,
                WIDTHS, PADDED, BLOCKS, PLACES, MATRICES, SLOPE, STEP, PRECISION,
            )  # fmt: skip
            linear = linear_block(
                p, q, parameters, scratch, row, point, valid, start,
                LAST, WIDTHS, PADDED, BLOCKS, PLACES, MATRICES, SLOPE, STEP, PRECISION,
            )  # fmt: skip
            scale, shift = normalization(parameters, start, LAST, PLACES, MATRICES, BLOCK)
            value = leaky_relu(linear * scale + shift, SLOPE)
            is_nan = value != value
            value = tl.where(valid[:, None], tl.where(is_nan, float("inf"), value), float("-inf"))
            value = tl.reshape(value, ROWS, SLOTS, BLOCK)
            is_nan = tl.reshape((is_nan & valid[:, None]).to(tl.int32), ROWS, SLOTS, BLOCK)
            largest, nan = tl.max(value, 1), tl.max(is_nan, 1)
            better = (largest > best) | ((nan > 0) & (best == best))
            if SAVE:
                slot = tl.arange(0, SLOTS)[None, :, None]
                exists = tl.reshape(valid, ROWS, SLOTS)[:, :, None]
                # Of edges with NaN, if any has it, else of those with the largest number.
                chosen = exists & (value == largest[:, None, :]) & (is_nan >= nan[:, None, :])
                first = tl.min(tl.where(chosen, slot, SLOTS), 1)
                better |= (place < 0) & (first < SLOTS)
                place = tl.where(better, chunk * SLOTS + first, place)
            best = tl.where(better, tl.where(nan > 0, float("nan"), largest), best)
            some = tl.maximum(some, tl.max(tl.reshape(valid.to(tl.int32), ROWS, SLOTS), 1))
        row, exists, _ = rows_of(tile, tl.arange(0, ROWS), rows, ROWS)
        column = start + tl.arange(0, BLOCK)
        target = row[:, None] * WIDTHS[LAST] + column[None, :]
        mask = exists[:, None] & (column < WIDTHS[LAST])[None, :]
        tl.store(output + target, tl.where(some[:, None] > 0, best, 0.0), mask=mask)
        if SAVE:
            tl.store(slots + target, place, mask=mask)


@triton.jit(do_not_specialize=["rows", "tiles"])
def statistics_kernel(
    p, q, points, parameters, counts, means, squares, scratch, rows, tiles, scratch_size,
    WIDTHS: tl.constexpr, PADDED: tl.constexpr, BLOCKS: tl.constexpr, PLACES: tl.constexpr,
    MATRICES: tl.constexpr, SLOPE: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
    STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of one slice of the edges and one block of channels of the last linear layer, all in float64.

    counts (slices,) of edges; means and squares (slices, channels) of deviations from these means, added up
    from 0.
    """
    LAST: tl.constexpr = len(WIDTHS) - 1
    BLOCK: tl.constexpr = BLOCKS[LAST]
    scratch += (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * scratch_size
    start = tl.program_id(1) * BLOCK
    target = tl.program_id(0) * PADDED[LAST] + start + tl.arange(0, BLOCK)
    own = tl.arange(0, 1) + tl.program_id(0)
    count = tl.zeros([1], tl.float64)
    # Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979.
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), disable_licm=True):
        for chunk in tl.range(tl.cdiv(K, SLOTS), disable_licm=True):
            row, point, valid = outgoing_edges(points, tile, chunk, rows, K, ROWS, SLOTS)
            hidden_layers(
                p, q, parameters, scratch, row, point, valid,
                WIDTHS, PADDED, BLOCKS, PLACES, MATRICES, SLOPE, STEP, PRECISION,
            )  # fmt: skip
            linear = linear_block(
                p, q, parameters, scratch, row, point, valid, start,
                LAST, WIDTHS, PADDED, BLOCKS, PLACES, MATRICES, SLOPE, STEP, PRECISION,
            )  # fmt: skip
            edges = tl.sum(valid.to(tl.int32), 0)
            center = tl.sum(tl.where(valid[:, None], linear, 0.0), 0) / tl.maximum(edges, 1).to(linear.dtype)
            deviation = tl.where(valid[:, None], linear - center[None, :], 0.0)
            edges = tl.zeros([1], tl.float64) + edges.to(tl.float64)
            share = edges / tl.maximum(count + edges, 1.0)
            # In registers, every thread might hold all channels.
            step = center.to(tl.float64) - tl.load(means + target)
            add_to(means + target, step * share)
            square = tl.sum(deviation * deviation, 0).to(tl.float64)
            add_to(squares + target, square + step * step * (count * share))
            count += edges
    tl.store(counts + own, count, mask=own * 0 + tl.program_id(1) == 0)


@triton.jit
def through_activation(
    gradient, linear, chosen, parameters, partial, start,
    LAYER: tl.constexpr, PLACES: tl.constexpr, MATRICES: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """The gradient of a linear layer from that of its activation, of the edges and channels that are `chosen`.

    Those of scale and shift are added to `partial`.
    """
    COUNT: tl.constexpr = gradient.shape[1]
    scale, shift = normalization(parameters, start, LAYER, PLACES, MATRICES, COUNT)
    gradient = tl.where(linear * scale + shift > 0, gradient, SLOPE * gradient)
    gradient = tl.where(chosen, gradient, 0.0)
    target = partial + MATRICES[len(PLACES) - 1] + PLACES[LAYER] + start + tl.arange(0, COUNT)
    add_to(target, tl.sum(tl.where(chosen, gradient * linear, 0.0), 0))
    add_to(target + PLACES[len(PLACES) - 1], tl.sum(gradient, 0))
    return gradient * scale


@triton.jit
def leave_first_layer(
    gradient, grad_p, edges, tile, chunk, row, valid, rows, first_edge, start,
    WIDTH: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Keeps the first layer's gradient in `edges`, for the neighbours, and adds it to that of the centres."""
    COUNT: tl.constexpr = gradient.shape[1]
    column = start + tl.arange(0, COUNT)
    inside = (column < WIDTH)[None, :]
    edge = row * K + chunk * SLOTS + tl.arange(0, ROWS * SLOTS) % SLOTS - first_edge
    tl.store(edges + edge[:, None] * WIDTH + column[None, :], gradient, mask=valid[:, None] & inside)
    center, exists, _ = rows_of(tile, tl.arange(0, ROWS), rows, ROWS)
    target = grad_p + center[:, None] * WIDTH + column[None, :]
    mask = exists[:, None] & inside
    before = tl.load(target, mask=mask & (chunk > 0), other=0.0)
    tl.store(target, before + tl.sum(tl.reshape(gradient, ROWS, SLOTS, COUNT), 1), mask=mask)


@triton.jit
def seed_block(
    grad, slots, constant, factor, linear, chunk, row, valid, parameters, partial, start,
    WIDTHS: tl.constexpr, PLACES: tl.constexpr, MATRICES: tl.constexpr, SLOPE: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """(edges, block): the gradient of the last linear layer."""
    LAST: tl.constexpr = len(WIDTHS) - 1
    column = start + tl.arange(0, linear.shape[1])
    if slots is not None:
        mask = valid[:, None] & (column < WIDTHS[LAST])[None, :]
        place = row[:, None] * WIDTHS[LAST] + column[None, :]
        slot = chunk * SLOTS + tl.arange(0, linear.shape[0]) % SLOTS
        chosen = tl.load(slots + place, mask=mask, other=-1) == slot[:, None]
        gradient = tl.load(grad + place, mask=chosen, other=0.0)
        gradient = through_activation(
            gradient, linear, chosen, parameters, partial, start, LAST, PLACES, MATRICES, SLOPE
        )
    else:
        gradient = tl.load(constant + column)[None, :] + tl.load(factor + column)[None, :] * linear
        gradient = tl.where(valid[:, None], gradient, 0.0)
    return gradient


@triton.jit
def add_matrix_gradient(
    p, q, parameters, scratch, partial, row, point, valid,
    LAYER: tl.constexpr, WIDTHS: tl.constexpr, PADDED: tl.constexpr, BLOCKS: tl.constexpr, PLACES: tl.constexpr,
    MATRICES: tl.constexpr, SLOPE: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to `partial` the gradient of the matrix that leads to a layer, whose own is in `scratch`."""
    for inner in tl.range(0, unknown(PADDED[LAYER - 1]), STEP, disable_licm=True):
        left = activation_channels(
            p, q, parameters, scratch, row, point, valid, inner,
            LAYER - 1, WIDTHS, PADDED, PLACES, MATRICES, SLOPE, STEP,
        )  # fmt: skip
        for start in tl.range(0, unknown(PADDED[LAYER]), BLOCKS[LAYER], disable_licm=True):
            right = linear_channels(
                p, q, scratch, row, point, valid, start, LAYER, WIDTHS, PADDED, PLACES, BLOCKS[LAYER]
            )
            product = tl.dot(tl.trans(left), right, input_precision=PRECISION, out_dtype=right.dtype)
            matrix = partial + MATRICES[LAYER]
            add_to(block_pointers(matrix, inner, start, PADDED[LAYER], 1, STEP, BLOCKS[LAYER]), product)


@triton.jit
def gradient_block(
    scratch, parameters, start,
    LAYER: tl.constexpr, PADDED: tl.constexpr, BLOCKS: tl.constexpr, PLACES: tl.constexpr, MATRICES: tl.constexpr,
    EDGES: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(edges, block): the gradient of activations from `start` on, from that of the next linear layer in `scratch`."""
    total = tl.zeros([EDGES, BLOCKS[LAYER]], parameters.dtype.element_ty)
    scratch += EDGES * (PLACES[LAYER + 1] - PADDED[0])
    for inner in tl.range(0, unknown(PADDED[LAYER + 1]), STEP, disable_licm=True):
        left = tl.load(block_pointers(scratch, 0, inner, PADDED[LAYER + 1], 1, EDGES, STEP))
        # The matrix transposed: rows of that are columns of this.
        matrix = parameters + MATRICES[LAYER + 1]
        right = tl.load(block_pointers(matrix, inner, start, 1, PADDED[LAYER + 1], STEP, BLOCKS[LAYER]))
        total = tl.dot(left, right, total, input_precision=PRECISION, out_dtype=total.dtype)
    return total


@triton.jit(do_not_specialize=["rows", "begin", "end"])
def backward_kernel(
    p, q, points, parameters, grad, slots, constant, factor, partial, grad_p, edges, scratch, rows, begin, end, size,
    scratch_size,
    WIDTHS: tl.constexpr, PADDED: tl.constexpr, BLOCKS: tl.constexpr, PLACES: tl.constexpr,
    MATRICES: tl.constexpr, SLOPE: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
    STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For one slice of the tiles in [begin, end): what is kept of each edge, grad_p, and a share of the rest.

    partial (slices, size) is laid out as `parameters` and added to; edges (edges from the first tile on, channels).
    """
    LAST: tl.constexpr = len(WIDTHS) - 1
    partial += tl.program_id(0).to(tl.int64) * size
    scratch += tl.program_id(0).to(tl.int64) * scratch_size
    first_edge = tl.full([], begin, tl.int64) * ROWS * K
    for tile in tl.range(begin + tl.program_id(0), end, tl.num_programs(0), disable_licm=True):
        for chunk in tl.range(tl.cdiv(K, SLOTS), disable_licm=True):
            row, point, valid = outgoing_edges(points, tile, chunk, rows, K, ROWS, SLOTS)
            # Also: numbers added to before may be read by another thread now.
            hidden_layers(
                p, q, parameters, scratch, row, point, valid,
                WIDTHS, PADDED, BLOCKS, PLACES, MATRICES, SLOPE, STEP, PRECISION,
            )  # fmt: skip
            for start in tl.range(0, unknown(PADDED[LAST]), BLOCKS[LAST], disable_licm=True):
                linear = linear_block(
                    p, q, parameters, scratch, row, point, valid, start,
                    LAST, WIDTHS, PADDED, BLOCKS, PLACES, MATRICES, SLOPE, STEP, PRECISION,
                )  # fmt: skip
                gradient = seed_block(
                    grad, slots, constant, factor, linear, chunk, row, valid, parameters, partial, start,
                    WIDTHS, PLACES, MATRICES, SLOPE, SLOTS,
                )  # fmt: skip
                if LAST == 0:
                    leave_first_layer(
                        gradient, grad_p, edges, tile, chunk, row, valid, rows, first_edge, start,
                        WIDTHS[0], K, ROWS, SLOTS,
                    )  # fmt: skip
                else:
                    store_channels(scratch, gradient, start, LAST, PADDED, PLACES)
            for layer in tl.static_range(LAST - 1, -1, -1):
                tl.debug_barrier()
                row, point, valid = outgoing_edges(points, tile, chunk, rows, K, ROWS, SLOTS)
                add_matrix_gradient(
                    p, q, parameters, scratch, partial, row, point, valid,
                    layer + 1, WIDTHS, PADDED, BLOCKS, PLACES, MATRICES, SLOPE, STEP, PRECISION,
                )  # fmt: skip
                # From here on a layer's gradient takes its place.
                tl.debug_barrier()
                for start in tl.range(0, unknown(PADDED[layer]), BLOCKS[layer], disable_licm=True):
                    gradient = gradient_block(
                        scratch, parameters, start,
                        layer, PADDED, BLOCKS, PLACES, MATRICES, ROWS * SLOTS, STEP, PRECISION,
                    )  # fmt: skip
                    # Loaded again, these take no registers from the product.
                    row, point, valid = outgoing_edges(points, tile, chunk, rows, K, ROWS, SLOTS)
                    linear = linear_channels(
                        p, q, scratch, row, point, valid, start, layer, WIDTHS, PADDED, PLACES, BLOCKS[layer]
                    )
                    gradient = through_activation(
                        gradient, linear, valid[:, None], parameters, partial, start,
                        layer, PLACES, MATRICES, SLOPE,
                    )  # fmt: skip
                    if layer == 0:
                        leave_first_layer(
                            gradient, grad_p, edges, tile, chunk, row, valid, rows, first_edge, start,
                            WIDTHS[0], K, ROWS, SLOTS,
                        )  # fmt: skip
                    else:
                        # What every thread has read by now is written over.
                        tl.debug_barrier()
                        store_channels(scratch, gradient, start, layer, PADDED, PLACES)


@triton.jit(do_not_specialize=["rows", "first_row", "first_edge"])
def subtract_edges_kernel(
    edges, offsets, order, grad_q, rows, first_row, first_edge,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Subtracts from grad_q (rows, WIDTH) what a round's edges send to the point that they lead to.

    The round's part of `offsets` begins at first_row; the first of the edges kept is edge first_edge.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin = tl.load(offsets + first_row + row, mask=row < rows, other=0)
    end = tl.load(offsets + first_row + row + 1, mask=row < rows, other=0)
    total = tl.zeros([ROWS, BLOCK], edges.dtype.element_ty)
    for chunk in tl.range((tl.max(end - begin, 0) + SLOTS - 1) // SLOTS, disable_licm=True):
        place = begin[:, None] + chunk * SLOTS + tl.arange(0, SLOTS)[None, :]
        exists = place < end[:, None]
        edge = tl.load(order + place, mask=exists, other=0) - first_edge
        mask = exists[:, :, None] & (column < WIDTH)[None, None, :]
        total += tl.sum(tl.load(edges + edge[:, :, None] * WIDTH + column, mask=mask, other=0.0), 1)
    target = grad_q + row[:, None] * WIDTH + column[None, :]
    mask = (begin < end)[:, None] & (column < WIDTH)[None, :]
    tl.store(target, tl.load(target, mask=mask, other=0.0) - total, mask=mask)


def edge_layers(
    p: Tensor,
    q: Tensor,
    points: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    shifts: list[Tensor],
    negative_slope: float,
    keep_slots: bool,
) -> tuple[Tensor, Tensor]:
    layers = Layers(p, q, points, weights, scales, shifts, negative_slope)
    output = p.new_zeros(layers.rows, layers.widths[-1])
    slots = p.new_full((layers.rows if keep_slots else 0, layers.widths[-1]), -1, dtype=torch.int32)
    size = layers.scratch_size(max(0, len(weights) - 1))
    programs = min(program_count(layers.tiles), layers.fitting(layers.last_blocks * size))
    scratch = p.new_empty(programs * layers.last_blocks * size)
    launch(
        maximum_kernel, (programs, layers.last_blocks),
        *layers.tensors(), output, slots, scratch, layers.rows, layers.tiles, size,
        SAVE=keep_slots, **layers.options,
    )  # fmt: skip
    return output, slots


def edge_layers_statistics(
    p: Tensor,
    q: Tensor,
    points: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    shifts: list[Tensor],
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    layers = Layers(p, q, points, weights, scales, shifts, negative_slope)
    channels = layers.padded[-1]
    size = layers.scratch_size(max(0, len(weights) - 1))
    slices = slice_count(layers.tiles, layers.rows * channels, 2 * channels)
    slices = min(slices, layers.fitting(layers.last_blocks * size))
    counts = p.new_empty(slices, 1, dtype=torch.float64)
    means, squares = p.new_zeros(2, slices, channels, dtype=torch.float64)
    scratch = p.new_empty(slices * layers.last_blocks * size)
    launch(
        statistics_kernel, (slices, layers.last_blocks),
        *layers.tensors(), counts, means, squares, scratch, layers.rows, layers.tiles, size,
        **layers.options,
    )  # fmt: skip
    count = counts.sum()
    edges = count.clamp(min=1)
    mean = (means * counts).sum(0) / edges
    variance = (squares + counts * (means - mean).square()).sum(0) / edges
    mean, variance = (t[: layers.widths[-1]].to(p.dtype) for t in (mean, variance))
    return mean, variance, count.long()


def edge_layers_backward(
    grad: Tensor | None,
    slots: Tensor | None,
    constant: Tensor | None,
    factor: Tensor | None,
    p: Tensor,
    q: Tensor,
    points: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    shifts: list[Tensor],
    negative_slope: float,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    layers = Layers(p, q, points, weights, scales, shifts, negative_slope, backward=True)
    if slots is None:
        seed = None, None, layers.padded_channels(constant), layers.padded_channels(factor)
    else:
        seed = grad.contiguous(), slots.contiguous(), None, None
    grad_p, grad_q = torch.zeros_like(layers.p), torch.zeros_like(layers.q)
    tile_edges = layers.options["ROWS"] * layers.k
    per_round = max(1, min(layers.tiles, layers.fitting(tile_edges * p.shape[1])))
    scratch_size = layers.scratch_size(len(weights))
    slices = slice_count(min(layers.tiles, per_round), p.numel() + q.numel(), layers.size)
    slices = min(slices, layers.fitting(layers.size), layers.fitting(scratch_size))
    partial = p.new_zeros(slices, layers.size)
    scratch = p.new_empty(slices, scratch_size)
    kept = p.new_empty(per_round * tile_edges, p.shape[1])
    offsets, order = layers.incoming(per_round)
    for number, begin in enumerate(range(0, layers.tiles, per_round)):
        end = min(begin + per_round, layers.tiles)
        # Each goes on with the sums of the round before.
        launch(
            backward_kernel, (min(slices, end - begin),),
            *layers.tensors(), *seed, partial, grad_p, kept, scratch, layers.rows, begin, end, layers.size,
            scratch_size, **layers.options,
        )  # fmt: skip
        launch(
            subtract_edges_kernel, (triton.cdiv(layers.rows, INCOMING["ROWS"]), layers.first_blocks),
            kept, offsets, order, grad_q, layers.rows, number * layers.rows, begin * tile_edges,
            WIDTH=p.shape[1], BLOCK=layers.options["BLOCKS"][0], **INCOMING,
        )  # fmt: skip
    of_weights, of_scales, of_shifts = layers.unpack(partial.sum(0))
    return (
        grad_p,
        grad_q,
        [t.mT.contiguous() for t in of_weights],
        [t.clone() for t in of_scales[: len(scales)]],
        [t.clone() for t in of_shifts[: len(shifts)]],
    )
