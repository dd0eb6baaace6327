"""local_attention_pool in Triton: kernels, then launchers.

Scores are linear in [f_j ; r], so the part of the features is a product per point, made by torch and gathered;
the part of the position network's output r is made per edge, on matrix units. The C + P channels are padded to
blocks: some of features, then one of r. Each program works on a tile of edges (_position.py) and recomputes what
it needs of them on chip, so that no channels over edges are written. The backward pass visits the edges twice: by
their centre, for the weights and coordinates, and by their neighbour, for the neighbour's features. Sums have a
fixed order: there are no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import accumulation_dtype, dot_precision, launch, power_of_two
from ._position import (
    WIDEST_BLOCK,
    add_edges_to_points,
    add_product_to,
    block_of,
    incoming,
    incoming_chunks,
    incoming_edges,
    multiply_add,
    new_scratch,
    outgoing_edges,
    pack_layers,
    position_network,
    position_network_backward,
    program_count,
    rows_of,
    send_to_points,
    slice_count,
    tile_options,
    weight_gradient_options,
)


@triton.jit
def block_columns(block, blocks, channels, width, BLOCK: tl.constexpr):
    """Where the columns of a block lie among the C + P channels, and which of them do."""
    place = tl.arange(0, BLOCK)
    is_position = block == blocks - 1
    column = tl.where(is_position, channels, block * BLOCK) + place
    return column, column < tl.where(is_position, width, channels)


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
    feature_scores, neighbor, valid, position, scratch, position_scores, block, blocks, channels, width,
    BLOCK: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(edges, BLOCK): one block of the scores; position_scores (BLOCK, blocks BLOCK) is [in, out]."""
    column, inside = block_columns(block, blocks, channels, width, BLOCK)
    mask = valid[:, None] & inside[None, :]
    scores = tl.load(feature_scores + neighbor[:, None] * width + column[None, :], mask=mask, other=0.0)
    return multiply_add(
        scores, position, scratch, position_scores, 0, block * BLOCK, blocks * BLOCK, 1, STEP, PRECISION
    )


@triton.jit
def edge_gradients(
    grad, pooled, statistics, features, feature_scores, center, neighbor, valid, position, scratch, position_scores,
    block, blocks, channels, width, BLOCK: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(edges, BLOCK) each: of one block, the gradients of what is weighed and of the scores."""
    ACC: tl.constexpr = position.dtype
    scores = score_block(
        feature_scores, neighbor, valid, position, scratch, position_scores, block, blocks, channels, width,
        BLOCK, STEP, PRECISION,
    )  # fmt: skip
    column, inside = block_columns(block, blocks, channels, width, BLOCK)
    mask = valid[:, None] & inside[None, :]
    place = center[:, None] * width + column[None, :]
    exponent = scores - tl.load(statistics + place, mask=mask, other=0.0)
    # Scores of another order of summation may exceed the forward pass's, by much where they are huge.
    attention = tl.exp(tl.where(exponent > 0, 0.0, exponent))
    weighted = attention * tl.load(grad + place, mask=mask, other=0.0).to(ACC)
    hidden = hidden_block(features, neighbor, valid, position, block, blocks, channels, BLOCK)
    by_score = weighted * (hidden - tl.load(pooled + place, mask=mask, other=0.0).to(ACC))
    return tl.where(mask, weighted, 0.0), tl.where(mask, by_score, 0.0)


@triton.jit(do_not_specialize=["cloud", "tiles"])
def pool_kernel(
    points, features, neighbors, code_weight, layer_weight, bias, feature_scores, position_scores, pooled,
    statistics, scratch, cloud, channels, width, blocks, tiles, scratch_size,
    SAVE: tl.constexpr, SLOPE: tl.constexpr, DEPTH: tl.constexpr, DIMS: tl.constexpr, K: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of the result's channels, for one tile of rows."""
    ACC: tl.constexpr = bias.dtype.element_ty
    block = tl.program_id(1)
    scratch += (block * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * scratch_size
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), disable_licm=True):
        most = tl.full([ROWS, BLOCK], float("-inf"), ACC)
        total = tl.zeros([ROWS, BLOCK], ACC)
        weighted = tl.zeros([ROWS, BLOCK], ACC)
        some = tl.zeros([ROWS], tl.int32)
        for chunk in tl.range(tl.cdiv(K, SLOTS), disable_licm=True):
            center, neighbor, valid = outgoing_edges(neighbors, tile, chunk, cloud, K, ROWS, SLOTS)
            position = position_network(
                points, center, neighbor, valid, code_weight, layer_weight, bias, scratch, DEPTH,
                SLOPE, DIMS, BLOCK, STEP, PRECISION,
            )  # fmt: skip
            scores = score_block(
                feature_scores, neighbor, valid, position, scratch, position_scores, block, blocks, channels, width,
                BLOCK, STEP, PRECISION,
            )  # fmt: skip
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
        column, inside = block_columns(block, blocks, channels, width, BLOCK)
        place = row[:, None] * width + column[None, :]
        mask = exists[:, None] & inside[None, :]
        some = some[:, None] > 0
        tl.store(pooled + place, tl.where(some, weighted / total, 0.0), mask=mask)
        if SAVE:
            tl.store(statistics + place, tl.where(some, most + tl.log(total), 0.0), mask=mask)


@triton.jit(do_not_specialize=["cloud", "tiles"])
def pool_backward_centers_kernel(
    points, features, neighbors, code_weight, layer_weight, bias, feature_scores, position_scores, grad,
    pooled, statistics, partial, grad_points, grad_edges, scratch, cloud, channels, width, blocks, tiles, size,
    scratch_size,
    POINTS: tl.constexpr, SLOPE: tl.constexpr, DEPTH: tl.constexpr, DIMS: tl.constexpr, CODE: tl.constexpr,
    K: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """For one slice of the rows: the gradients of the weights on r and, with POINTS, of the coordinates.

    partial (slices, size): of position_scores, then of the position network.
    """
    ACC: tl.constexpr = bias.dtype.element_ty
    partial += tl.program_id(0).to(tl.int64) * size
    scratch += tl.program_id(0).to(tl.int64) * scratch_size
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), disable_licm=True):
        for chunk in tl.range(tl.cdiv(K, SLOTS), disable_licm=True):
            # Numbers added to before may be read by another thread now.
            tl.debug_barrier()
            center, neighbor, valid = outgoing_edges(neighbors, tile, chunk, cloud, K, ROWS, SLOTS)
            position = position_network(
                points, center, neighbor, valid, code_weight, layer_weight, bias, scratch, DEPTH,
                SLOPE, DIMS, BLOCK, STEP, PRECISION,
            )  # fmt: skip
            gradient = tl.zeros(position.shape, ACC)
            for block in tl.range(blocks, disable_licm=True):
                tl.debug_barrier()
                center, neighbor, valid = outgoing_edges(neighbors, tile, chunk, cloud, K, ROWS, SLOTS)
                weighted, by_score = edge_gradients(
                    grad, pooled, statistics, features, feature_scores, center, neighbor, valid, position,
                    scratch, position_scores, block, blocks, channels, width, BLOCK, STEP, PRECISION,
                )  # fmt: skip
                gradient += tl.where(block == blocks - 1, weighted, 0.0)
                start, stride = block * BLOCK, blocks * BLOCK
                add_product_to(partial, position, by_score, scratch, 0, start, stride, STEP, PRECISION)
                # The matrix transposed: rows of that are columns of this.
                gradient = multiply_add(
                    gradient, by_score, scratch, position_scores, start, 0, 1, stride, STEP, PRECISION
                )
            tl.debug_barrier()
            center, neighbor, valid = outgoing_edges(neighbors, tile, chunk, cloud, K, ROWS, SLOTS)
            gradient = position_network_backward(
                gradient, position, points, center, neighbor, valid, code_weight, layer_weight, bias, scratch,
                partial + BLOCK * blocks * BLOCK, SLOPE, DEPTH, DIMS, CODE, BLOCK, STEP, PRECISION,
            )  # fmt: skip
            if POINTS:
                tl.debug_barrier()
                center, neighbor, valid = outgoing_edges(neighbors, tile, chunk, cloud, K, ROWS, SLOTS)
                send_to_points(
                    gradient, points, center, neighbor, valid, code_weight, grad_points, grad_edges, tile,
                    chunk, cloud, K, DIMS, BLOCK, ROWS, SLOTS,
                )  # fmt: skip


@triton.jit(do_not_specialize=["cloud", "tiles"])
def pool_backward_neighbors_kernel(
    points, features, offsets, order, code_weight, layer_weight, bias, feature_scores, position_scores, grad,
    pooled, statistics, grad_features, grad_scores, scratch, cloud, channels, width, blocks, tiles,
    scratch_size,
    SLOPE: tl.constexpr, DEPTH: tl.constexpr, DIMS: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What flows back to one block of a tile of points as neighbours.

    grad_features (rows, channels), but for what comes by way of the scores; grad_scores (rows, width) is that
    of feature_scores.
    """
    ACC: tl.constexpr = bias.dtype.element_ty
    block = tl.program_id(1)
    scratch += (block * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * scratch_size
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), disable_licm=True):
        by_feature = tl.zeros([ROWS, BLOCK], ACC)
        by_scores = tl.zeros([ROWS, BLOCK], ACC)
        for chunk in tl.range(incoming_chunks(offsets, tile, cloud, ROWS, SLOTS), disable_licm=True):
            center, neighbor, valid = incoming_edges(offsets, order, tile, chunk, cloud, K, ROWS, SLOTS)
            position = position_network(
                points, center, neighbor, valid, code_weight, layer_weight, bias, scratch, DEPTH,
                SLOPE, DIMS, BLOCK, STEP, PRECISION,
            )  # fmt: skip
            weighted, by_score = edge_gradients(
                grad, pooled, statistics, features, feature_scores, center, neighbor, valid, position,
                scratch, position_scores, block, blocks, channels, width, BLOCK, STEP, PRECISION,
            )  # fmt: skip
            by_feature += tl.sum(tl.reshape(weighted, ROWS, SLOTS, BLOCK), 1)
            by_scores += tl.sum(tl.reshape(by_score, ROWS, SLOTS, BLOCK), 1)
        row, exists, _ = rows_of(tile, tl.arange(0, ROWS), cloud, ROWS)
        column, inside = block_columns(block, blocks, channels, width, BLOCK)
        mask = exists[:, None] & inside[None, :]
        tl.store(grad_scores + row[:, None] * width + column[None, :], by_scores, mask=mask)
        mask &= block < blocks - 1
        tl.store(grad_features + row[:, None] * channels + column[None, :], by_feature, mask=mask)


class Pool:
    """Inputs of forward and backward, packed for the kernels."""

    def __init__(self, points, features, neighbors, weights, biases, score_weight, slope):
        batch, self.cloud, dims = points.shape
        self.rows, self.k = batch * self.cloud, neighbors.shape[2]
        self.channels, self.width = features.shape[2], score_weight.shape[0]
        dtype = accumulation_dtype(points.dtype)
        block = block_of("local_attention_pool", [w.shape[0] for w in weights])
        block = max(block, min(power_of_two(self.channels), WIDEST_BLOCK))
        self.blocks = triton.cdiv(self.channels, block) + 1
        self.points, self.features = points.contiguous(), features.contiguous()
        self.neighbors = neighbors.contiguous()
        self.layers = pack_layers(weights, biases, block, dtype)
        # [in, out], of the features and of the position network's output.
        weight = score_weight.to(dtype).mT
        self.feature_weight = weight[: self.channels]
        self.feature_scores = self.feature_rows(dtype) @ self.feature_weight
        self.position_scores = self.padded(weight[self.channels :], block)
        self.options = {
            **tile_options(self.k, block, dtype),
            "SLOPE": slope,
            "DEPTH": self.layers.depth,
            "DIMS": dims,
            "PRECISION": dot_precision(points.dtype),
        }
        self.tiles = batch * triton.cdiv(self.cloud, self.options["ROWS"])

    def feature_rows(self, dtype: torch.dtype) -> Tensor:
        return self.features.view(self.rows, self.channels).to(dtype)

    def padded(self, matrix: Tensor, block: int) -> Tensor:
        """(block, blocks * block) from weights (P, C + P) of what all channels take from r."""
        target = matrix.new_zeros(block, self.blocks * block)
        position = (self.blocks - 1) * block
        target[: matrix.shape[0], : self.channels] = matrix[:, : self.channels]
        target[: matrix.shape[0], position : position + matrix.shape[0]] = matrix[:, self.channels :]
        return target

    def unpadded(self, matrix: Tensor) -> Tensor:
        """The inverse of padded."""
        outputs = self.width - self.channels
        position = matrix.shape[1] - matrix.shape[0]
        matrix = matrix[:outputs]
        return torch.cat([matrix[:, : self.channels], matrix[:, position : position + outputs]], 1)

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
    programs = program_count(pool.tiles)
    scratch = new_scratch(pool.layers.bias, programs * pool.blocks, pool.options)
    launch(
        pool_kernel, (programs, pool.blocks),
        pool.points, pool.features, pool.neighbors, *pool.network(), pool.feature_scores,
        pool.position_scores, pooled, statistics, scratch, pool.cloud, pool.channels, pool.width, pool.blocks,
        pool.tiles, scratch.shape[1],
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
    layers, like, block = pool.layers, pool.layers.bias, pool.options["BLOCK"]
    of_scores = block * pool.blocks * block
    size = of_scores + layers.size
    grad_points = like.new_zeros(points.shape[0] if points_gradient else 0, *points.shape[1:])
    grad_edges = like.new_empty(*grad_points.shape[:2], pool.k, points.shape[2])
    grad_features = like.new_zeros(pool.rows, pool.channels)
    grad_scores = like.new_zeros(pool.rows, pool.width)
    scores = pool.feature_scores, pool.position_scores
    saved = grad.contiguous(), pooled.contiguous(), statistics.contiguous()
    sizes = pool.cloud, pool.channels, pool.width, pool.blocks
    options = pool.options | weight_gradient_options(pool.k, block, layers)
    tiles = triton.cdiv(pool.cloud, options["ROWS"]) * points.shape[0] if pool.k else 0
    slices = slice_count(tiles, pool.rows * pool.width, size)
    partial = like.new_zeros(slices, size)
    scratch = new_scratch(like, slices, options)
    launch(
        pool_backward_centers_kernel, (slices,),
        pool.points, pool.features, pool.neighbors, *pool.network(), *scores, *saved, partial, grad_points,
        grad_edges, scratch, *sizes, tiles, size, scratch.shape[1],
        POINTS=points_gradient, **options,
    )  # fmt: skip
    if slices:
        edges = incoming(pool.neighbors)
        programs = program_count(pool.tiles)
        scratch = new_scratch(like, programs * pool.blocks, pool.options)
        launch(
            pool_backward_neighbors_kernel, (programs, pool.blocks),
            pool.points, pool.features, *edges, *pool.network(), *scores, *saved, grad_features, grad_scores,
            scratch, *sizes, pool.tiles, scratch.shape[1], **pool.options,
        )  # fmt: skip
        if points_gradient:
            add_edges_to_points(grad_edges, edges, grad_points)
        # Nothing may come of a point that is nobody's neighbour, even if it is NaN.
        used = (edges[0][1:] > edges[0][:-1]).unsqueeze(1)
        of_features = torch.where(used, pool.feature_rows(like.dtype), 0).mT @ grad_scores
    else:
        of_features = like.new_zeros(pool.channels, pool.width)
    grad_features = torch.addmm(grad_features, grad_scores, pool.feature_weight.mT)
    of_position, network = partial.sum(0).split([of_scores, layers.size])
    of_position = pool.unpadded(of_position.view(block, -1))
    return (
        grad_points.to(points.dtype),
        grad_features.to(features.dtype).view(features.shape),
        torch.cat([of_features, of_position]).mT.to(score_weight.dtype).contiguous(),
        [t.to(points.dtype) for t in layers.gradients(network)],
    )
