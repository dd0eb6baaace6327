"""local_attention_pool in Triton: kernels, then launchers.

The C + P channels are padded to blocks: some of features, then one of the position network's output. Each
program works on a tile of edges (_position.py) and recomputes what it needs of them on chip, so that nothing
over edges is written. The backward pass visits the edges twice: by their centre, for the weights and the
centre's gradient, and by their neighbour, for the neighbour's. Sums have a fixed order: there are no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import accumulation_dtype, dot_precision, launch, power_of_two
from ._position import (
    WIDEST_BLOCK,
    add_points_gradient,
    add_to,
    block_of,
    incoming,
    incoming_chunks,
    incoming_edges,
    outgoing_edges,
    pack_layers,
    position_network,
    position_network_backward,
    rows_of,
    slice_count,
    square_block,
    tile_options,
)


@triton.jit
def hidden_block(features, neighbor, valid, position, block, blocks, channels, BLOCK: tl.constexpr):
    """(edges, BLOCK): one block of [f_j ; r]; 0 where there is no edge."""
    column = block * BLOCK + tl.arange(0, BLOCK)
    mask = valid[:, None] & (column < channels)[None, :]
    feature = tl.load(features + neighbor[:, None] * channels + column[None, :], mask=mask, other=0.0)
    value = tl.where(block == blocks - 1, position, feature.to(position.dtype))
    return tl.where(valid[:, None], value, 0.0)


@triton.jit
def score_block(
    features, neighbor, valid, position, score_weight, block, blocks, channels,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(edges, BLOCK): one block of the scores; score_weight (blocks BLOCK, blocks BLOCK) is [in, out]."""
    scores = tl.zeros(position.shape, position.dtype)
    for inner in range(blocks):
        hidden = hidden_block(features, neighbor, valid, position, inner, blocks, channels, BLOCK)
        weight = tl.load(square_block(score_weight, inner, block, blocks * BLOCK, BLOCK))
        scores = tl.dot(hidden, weight, scores, input_precision=PRECISION, out_dtype=position.dtype)
    return scores


@triton.jit
def result_columns(block, blocks, channels, width, BLOCK: tl.constexpr):
    """Where the columns of a block lie among the C + P of the result, and which of them do."""
    place = tl.arange(0, BLOCK)
    is_position = block == blocks - 1
    column = tl.where(is_position, channels, block * BLOCK) + place
    return column, column < tl.where(is_position, width, channels)


@triton.jit
def edge_gradients(
    grad, pooled, statistics, features, center, neighbor, valid, position, score_weight, block, blocks,
    channels, width, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(edges, BLOCK) each: of one block, the gradients of what is weighed and of the scores."""
    ACC: tl.constexpr = position.dtype
    hidden = hidden_block(features, neighbor, valid, position, block, blocks, channels, BLOCK)
    scores = score_block(
        features, neighbor, valid, position, score_weight, block, blocks, channels, BLOCK, PRECISION
    )
    column, inside = result_columns(block, blocks, channels, width, BLOCK)
    mask = valid[:, None] & inside[None, :]
    place = center.to(tl.int64)[:, None] * width + column[None, :]
    exponent = scores - tl.load(statistics + place, mask=mask, other=0.0)
    # Scores of another order of summation may exceed the forward pass's, by much where they are huge.
    attention = tl.exp(tl.where(exponent > 0, 0.0, exponent))
    weighted = attention * tl.load(grad + place, mask=mask, other=0.0).to(ACC)
    by_score = weighted * (hidden - tl.load(pooled + place, mask=mask, other=0.0).to(ACC))
    return tl.where(mask, weighted, 0.0), tl.where(mask, by_score, 0.0)


@triton.jit
def pool_kernel(
    points, features, neighbors, code_weight, layer_weight, bias, score_weight, pooled, statistics,
    cloud, k, channels, width, blocks, depth,
    SAVE: tl.constexpr, SLOPE: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of the result's channels, for one tile of rows."""
    ACC: tl.constexpr = bias.dtype.element_ty
    tile, block = tl.program_id(0), tl.program_id(1)
    most = tl.full([ROWS, BLOCK], float("-inf"), ACC)
    total = tl.zeros([ROWS, BLOCK], ACC)
    weighted = tl.zeros([ROWS, BLOCK], ACC)
    some = tl.zeros([ROWS], tl.int32)
    for chunk in range(tl.cdiv(k, SLOTS)):
        center, neighbor, valid = outgoing_edges(neighbors, tile, chunk, cloud, k, ROWS, SLOTS)
        position = position_network(
            points, center, neighbor, valid, code_weight, layer_weight, bias, depth,
            SLOPE, DIMS, BLOCK, PRECISION,
        )  # fmt: skip
        scores = score_block(
            features, neighbor, valid, position, score_weight, block, blocks, channels, BLOCK, PRECISION
        )
        hidden = hidden_block(features, neighbor, valid, position, block, blocks, channels, BLOCK)
        scores = tl.reshape(tl.where(valid[:, None], scores, float("-inf")), ROWS, SLOTS, BLOCK)
        largest = tl.maximum(most, tl.max(scores, 1))
        # Where all scores so far are -inf there is nothing to subtract.
        base = tl.where(largest == float("-inf"), 0.0, largest)
        attention = tl.exp(scores - base[:, None, :])
        scale = tl.exp(most - base)
        total = total * scale + tl.sum(attention, 1)
        weighted = weighted * scale + tl.sum(attention * tl.reshape(hidden, ROWS, SLOTS, BLOCK), 1)
        most = largest
        some = tl.maximum(some, tl.max(tl.reshape(valid.to(tl.int32), ROWS, SLOTS), 1))
    row, exists, _ = rows_of(tile, tl.arange(0, ROWS), cloud, ROWS)
    column, inside = result_columns(block, blocks, channels, width, BLOCK)
    place = row[:, None] * width + column[None, :]
    mask = exists[:, None] & inside[None, :]
    some = some[:, None] > 0
    tl.store(pooled + place, tl.where(some, weighted / total, 0.0), mask=mask)
    if SAVE:
        tl.store(statistics + place, tl.where(some, most + tl.log(total), 0.0), mask=mask)


@triton.jit
def pool_backward_centers_kernel(
    points, features, neighbors, code_weight, layer_weight, bias, score_weight, grad, pooled, statistics,
    partial, grad_points, rows, cloud, k, channels, width, blocks, depth, tiles, size,
    POINTS: tl.constexpr, SLOPE: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of the scores, for one slice of the rows: all gradients that need no neighbour's sum.

    partial (slices, blocks, size): those of score_weight's rows in the block, [out, in], then of the position
    network. grad_points (blocks, rows, DIMS). What this block of scores contributes to either.
    """
    ACC: tl.constexpr = bias.dtype.element_ty
    block = tl.program_id(1)
    partial += (tl.program_id(0).to(tl.int64) * blocks + block) * size
    grad_points += block.to(tl.int64) * rows * DIMS
    of_network = partial + BLOCK * blocks * BLOCK
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        for chunk in range(tl.cdiv(k, SLOTS)):
            # Numbers added to before may be read by another thread now.
            tl.debug_barrier()
            center, neighbor, valid = outgoing_edges(neighbors, tile, chunk, cloud, k, ROWS, SLOTS)
            position = position_network(
                points, center, neighbor, valid, code_weight, layer_weight, bias, depth,
                SLOPE, DIMS, BLOCK, PRECISION,
            )  # fmt: skip
            weighted, by_score = edge_gradients(
                grad, pooled, statistics, features, center, neighbor, valid, position, score_weight, block,
                blocks, channels, width, BLOCK, PRECISION,
            )  # fmt: skip
            for inner in range(blocks):
                hidden = hidden_block(features, neighbor, valid, position, inner, blocks, channels, BLOCK)
                product = tl.dot(tl.trans(by_score), hidden, input_precision=PRECISION, out_dtype=ACC)
                add_to(square_block(partial, 0, inner, blocks * BLOCK, BLOCK), product)
            weight = tl.load(square_block(score_weight, blocks - 1, block, blocks * BLOCK, BLOCK))
            gradient = tl.dot(by_score, tl.trans(weight), input_precision=PRECISION, out_dtype=ACC)
            gradient += tl.where(block == blocks - 1, weighted, 0.0)
            gradient = position_network_backward(
                gradient, position, points, center, neighbor, valid, code_weight, layer_weight, bias,
                of_network, depth, True, SLOPE, DIMS, BLOCK, PRECISION,
            )  # fmt: skip
            if POINTS:
                add_points_gradient(
                    gradient, points, center, neighbor, valid, code_weight, grad_points, tile, cloud,
                    True, DIMS, BLOCK, ROWS, SLOTS,
                )  # fmt: skip


@triton.jit
def pool_backward_neighbors_kernel(
    points, features, offsets, centers, code_weight, layer_weight, bias, score_weight, grad, pooled, statistics,
    grad_features, grad_points, cloud, channels, width, blocks, depth,
    POINTS: tl.constexpr, SLOPE: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What flows back to a tile of points as neighbours: a block of features or, with POINTS, coordinates."""
    ACC: tl.constexpr = bias.dtype.element_ty
    tile = tl.program_id(0)
    target = blocks - 1 if POINTS else tl.program_id(1)
    total = tl.zeros([ROWS, BLOCK], ACC)
    for chunk in range(incoming_chunks(offsets, tile, cloud, ROWS, SLOTS)):
        center, neighbor, valid = incoming_edges(offsets, centers, tile, chunk, cloud, ROWS, SLOTS)
        position = position_network(
            points, center, neighbor, valid, code_weight, layer_weight, bias, depth,
            SLOPE, DIMS, BLOCK, PRECISION,
        )  # fmt: skip
        gradient = tl.zeros(position.shape, ACC)
        for block in range(blocks):
            weighted, by_score = edge_gradients(
                grad, pooled, statistics, features, center, neighbor, valid, position, score_weight, block,
                blocks, channels, width, BLOCK, PRECISION,
            )  # fmt: skip
            weight = tl.load(square_block(score_weight, target, block, blocks * BLOCK, BLOCK))
            gradient = tl.dot(by_score, tl.trans(weight), gradient, input_precision=PRECISION, out_dtype=ACC)
            gradient += tl.where(block == target, weighted, 0.0)
        if POINTS:
            # Coordinates added to before may be read by another thread now.
            tl.debug_barrier()
            gradient = position_network_backward(
                gradient, position, points, center, neighbor, valid, code_weight, layer_weight, bias,
                grad_points, depth, False, SLOPE, DIMS, BLOCK, PRECISION,
            )  # fmt: skip
            add_points_gradient(
                gradient, points, center, neighbor, valid, code_weight, grad_points, tile, cloud,
                False, DIMS, BLOCK, ROWS, SLOTS,
            )  # fmt: skip
        else:
            total += tl.sum(tl.reshape(gradient, ROWS, SLOTS, BLOCK), 1)
    if not POINTS:
        row, exists, _ = rows_of(tile, tl.arange(0, ROWS), cloud, ROWS)
        column = target * BLOCK + tl.arange(0, BLOCK)
        mask = exists[:, None] & (column < channels)[None, :]
        tl.store(grad_features + row[:, None] * channels + column[None, :], total, mask=mask)


class Pool:
    """Inputs of forward and backward, packed for the kernels."""

    def __init__(self, points, features, neighbors, weights, biases, score_weight, slope):
        batch, self.cloud, dims = points.shape
        self.rows, self.k = batch * self.cloud, neighbors.shape[2]
        self.channels, self.width = features.shape[2], score_weight.shape[0]
        dtype = accumulation_dtype(points.dtype)
        block = block_of("local_attention_pool", [w.shape[0] for w in weights])
        block = max(block, min(power_of_two(self.channels), WIDEST_BLOCK))
        self.blocks = (self.channels + block - 1) // block + 1
        self.points, self.features = points.contiguous(), features.contiguous()
        self.neighbors = neighbors.contiguous()
        self.layers = pack_layers(weights, biases, block, dtype)
        self.score_weight = self.padded(score_weight.mT, block, dtype)
        self.options = {
            **tile_options(self.k, block, dtype),
            "SLOPE": slope,
            "DIMS": dims,
            "PRECISION": dot_precision(points.dtype),
        }
        self.tiles = batch * triton.cdiv(self.cloud, self.options["ROWS"])

    def padded(self, matrix: Tensor, block: int, dtype: torch.dtype) -> Tensor:
        """A matrix over the channels, padded to blocks."""
        size, channels = self.blocks * block, self.channels
        position, end = size - block, size - block + self.width - channels
        target = matrix.new_zeros(size, size, dtype=dtype)
        target[:channels, :channels] = matrix[:channels, :channels]
        target[:channels, position:end] = matrix[:channels, channels:]
        target[position:end, :channels] = matrix[channels:, :channels]
        target[position:end, position:end] = matrix[channels:, channels:]
        return target

    def unpadded(self, matrix: Tensor) -> Tensor:
        """The inverse of padded."""
        position = matrix.shape[0] - self.options["BLOCK"]
        parts = (slice(0, self.channels), slice(position, position + self.width - self.channels))
        return torch.cat([torch.cat([matrix[rows, columns] for columns in parts], 1) for rows in parts])

    def network(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.layers.code_weight, self.layers.layer_weight, self.layers.bias


def local_attention_pool(
    points: Tensor,
    features: Tensor,
    neighbors: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    score_weight: Tensor,
    negative_slope: float,
    save_statistics: bool,
) -> tuple[Tensor, Tensor]:
    pool = Pool(points, features, neighbors, weights, biases, score_weight, negative_slope)
    batch, cloud = points.shape[:2]
    pooled = points.new_zeros(batch, cloud, pool.width)
    statistics = pool.layers.bias.new_zeros(batch, cloud, pool.width if save_statistics else 0)
    if pool.k == 0:
        return pooled, statistics
    launch(
        pool_kernel, (pool.tiles, pool.blocks),
        pool.points, pool.features, pool.neighbors, *pool.network(), pool.score_weight, pooled, statistics,
        pool.cloud, pool.k, pool.channels, pool.width, pool.blocks, pool.layers.depth,
        SAVE=save_statistics, **pool.options,
    )  # fmt: skip
    return pooled, statistics


def local_attention_pool_backward(
    grad: Tensor,
    points: Tensor,
    features: Tensor,
    neighbors: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    score_weight: Tensor,
    pooled: Tensor,
    statistics: Tensor,
    negative_slope: float,
    points_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    pool = Pool(points, features, neighbors, weights, biases, score_weight, negative_slope)
    layers, block = pool.layers, pool.options["BLOCK"]
    of_scores = block * pool.blocks * block
    numbers = pool.blocks * (of_scores + layers.size)
    slices = slice_count(pool.tiles if pool.k else 0, pool.rows * pool.width, numbers)
    partial = layers.bias.new_zeros(slices, pool.blocks, of_scores + layers.size)
    by_center = layers.bias.new_zeros(pool.blocks if points_gradient else 0, *points.shape)
    by_neighbor = layers.bias.new_zeros(points.shape)
    grad_features = torch.zeros_like(features, memory_format=torch.contiguous_format)
    saved = grad.contiguous(), pooled.contiguous(), statistics.contiguous()
    sizes = pool.channels, pool.width, pool.blocks, layers.depth
    launch(
        pool_backward_centers_kernel, (slices, pool.blocks),
        pool.points, pool.features, pool.neighbors, *pool.network(), pool.score_weight, *saved, partial,
        by_center, pool.rows, pool.cloud, pool.k, *sizes, pool.tiles, partial.shape[2],
        POINTS=points_gradient, **pool.options,
    )  # fmt: skip
    if slices:
        edges = incoming(pool.neighbors)
        for of_points, parts in ((False, pool.blocks - 1), (True, int(points_gradient))):
            launch(
                pool_backward_neighbors_kernel, (pool.tiles, parts),
                pool.points, pool.features, *edges, *pool.network(), pool.score_weight, *saved, grad_features,
                by_neighbor, pool.cloud, *sizes,
                POINTS=of_points, **pool.options,
            )  # fmt: skip
    by_slices = partial.sum(0)
    scores, network = by_slices.split([of_scores, layers.size], 1)
    size = pool.blocks * block
    grad_score = pool.unpadded(scores.reshape(size, size)).to(score_weight.dtype)
    grad_layers = [t.to(points.dtype) for t in layers.gradients(network.sum(0))]
    grad_points = (
        by_center.sum(0) + by_neighbor if points_gradient else by_neighbor.new_empty(0, *points.shape[1:])
    )
    return grad_points.to(points.dtype), grad_features, grad_score, grad_layers
