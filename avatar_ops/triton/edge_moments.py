"""edge_moments in Triton: kernels, then launchers.

Each program adds up one slice of the edges in float64, tile by tile; the slices are added in a second step.
Deviations from the mean are taken before they are squared, hence two passes. Sums have a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import accumulation_dtype, dot_precision, launch
from ._position import (
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
    slice_count,
    square_block,
    tile_options,
)


@triton.jit
def mean_kernel(
    points, neighbors, code_weight, layer_weight, bias, sums, cloud, k, depth, tiles,
    SLOPE: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums (slices, BLOCK): the position network's output added up."""
    column = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        for chunk in range(tl.cdiv(k, SLOTS)):
            center, neighbor, valid = outgoing_edges(neighbors, tile, chunk, cloud, k, ROWS, SLOTS)
            position = position_network(
                points, center, neighbor, valid, code_weight, layer_weight, bias, depth,
                SLOPE, DIMS, BLOCK, PRECISION,
            )  # fmt: skip
            total += tl.sum(tl.where(valid[:, None], position.to(tl.float64), 0.0), 0)
    tl.store(sums + tl.program_id(0) * BLOCK + column, total)


@triton.jit
def scatter_kernel(
    points, neighbors, code_weight, layer_weight, bias, mean, scatter, cloud, k, depth, tiles,
    SLOPE: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scatter (slices, BLOCK, BLOCK): outer products of the deviations from the mean (BLOCK,) added up."""
    ACC: tl.constexpr = bias.dtype.element_ty
    center_of_all = tl.load(mean + tl.arange(0, BLOCK))
    scatter += tl.program_id(0).to(tl.int64) * BLOCK * BLOCK
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        for chunk in range(tl.cdiv(k, SLOTS)):
            # Numbers added to before may be read by another thread now.
            tl.debug_barrier()
            center, neighbor, valid = outgoing_edges(neighbors, tile, chunk, cloud, k, ROWS, SLOTS)
            position = position_network(
                points, center, neighbor, valid, code_weight, layer_weight, bias, depth,
                SLOPE, DIMS, BLOCK, PRECISION,
            )  # fmt: skip
            deviation = (position.to(tl.float64) - center_of_all[None, :]).to(ACC)
            deviation = tl.where(valid[:, None], deviation, 0.0)
            product = tl.dot(tl.trans(deviation), deviation, input_precision=PRECISION, out_dtype=ACC)
            add_to(square_block(scatter, 0, 0, BLOCK, BLOCK), product.to(tl.float64))


@triton.jit
def output_gradient(position, valid, mean, constant, slope, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """What mean and covariance send to each edge's output: constant + slope (output - mean)."""
    ACC: tl.constexpr = position.dtype
    column = tl.arange(0, BLOCK)
    deviation = (position.to(tl.float64) - tl.load(mean + column)[None, :]).to(ACC)
    deviation = tl.where(valid[:, None], deviation, 0.0)
    weight = tl.load(square_block(slope, 0, 0, BLOCK, BLOCK))
    gradient = tl.dot(deviation, weight, input_precision=PRECISION, out_dtype=ACC)
    return tl.where(valid[:, None], gradient + tl.load(constant + column)[None, :], 0.0)


@triton.jit
def moments_backward_centers_kernel(
    points, neighbors, code_weight, layer_weight, bias, mean, constant, slope, partial, grad_points,
    cloud, k, depth, tiles, size,
    POINTS: tl.constexpr, SLOPE: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For one slice of the rows: partial (slices, size) of the layers, grad_points (rows, DIMS) of centres."""
    partial += tl.program_id(0).to(tl.int64) * size
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        for chunk in range(tl.cdiv(k, SLOTS)):
            # Numbers added to before may be read by another thread now.
            tl.debug_barrier()
            center, neighbor, valid = outgoing_edges(neighbors, tile, chunk, cloud, k, ROWS, SLOTS)
            position = position_network(
                points, center, neighbor, valid, code_weight, layer_weight, bias, depth,
                SLOPE, DIMS, BLOCK, PRECISION,
            )  # fmt: skip
            gradient = output_gradient(position, valid, mean, constant, slope, BLOCK, PRECISION)
            gradient = position_network_backward(
                gradient, position, points, center, neighbor, valid, code_weight, layer_weight, bias,
                partial, depth, True, SLOPE, DIMS, BLOCK, PRECISION,
            )  # fmt: skip
            if POINTS:
                add_points_gradient(
                    gradient, points, center, neighbor, valid, code_weight, grad_points, tile, cloud,
                    True, DIMS, BLOCK, ROWS, SLOTS,
                )  # fmt: skip


@triton.jit
def moments_backward_neighbors_kernel(
    points, offsets, centers, code_weight, layer_weight, bias, mean, constant, slope, grad_points,
    cloud, depth,
    SLOPE: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What flows back to the coordinates of a tile of points as neighbours."""
    tile = tl.program_id(0)
    for chunk in range(incoming_chunks(offsets, tile, cloud, ROWS, SLOTS)):
        # Numbers added to before may be read by another thread now.
        tl.debug_barrier()
        center, neighbor, valid = incoming_edges(offsets, centers, tile, chunk, cloud, ROWS, SLOTS)
        position = position_network(
            points, center, neighbor, valid, code_weight, layer_weight, bias, depth,
            SLOPE, DIMS, BLOCK, PRECISION,
        )  # fmt: skip
        gradient = output_gradient(position, valid, mean, constant, slope, BLOCK, PRECISION)
        gradient = position_network_backward(
            gradient, position, points, center, neighbor, valid, code_weight, layer_weight, bias,
            grad_points, depth, False, SLOPE, DIMS, BLOCK, PRECISION,
        )  # fmt: skip
        add_points_gradient(
            gradient, points, center, neighbor, valid, code_weight, grad_points, tile, cloud,
            False, DIMS, BLOCK, ROWS, SLOTS,
        )  # fmt: skip


class Edges:
    """Inputs of forward and backward, packed for the kernels."""

    def __init__(self, points, neighbors, weights, biases, slope):
        batch, self.cloud, dims = points.shape
        self.rows, self.k = batch * self.cloud, neighbors.shape[2]
        dtype = accumulation_dtype(points.dtype)
        if not weights:
            # One linear layer that gives the code itself: multiply-adds with 0 and 1 are exact.
            columns = 3 * dims + 1
            weights = [torch.eye(columns, device=points.device, dtype=dtype)]
            biases, slope = [weights[0].new_zeros(columns)], 1.0
        block = block_of("edge_moments", [w.shape[0] for w in weights])
        self.points, self.neighbors = points.contiguous(), neighbors.contiguous()
        self.layers = pack_layers(weights, biases, block, dtype)
        self.channels = self.layers.widths[-1]
        self.block = block
        self.options = {
            **tile_options(self.k, block, dtype),
            "SLOPE": slope,
            "DIMS": dims,
            "PRECISION": dot_precision(points.dtype),
        }
        self.tiles = batch * triton.cdiv(self.cloud, self.options["ROWS"]) if self.k else 0

    def slices(self, numbers: int) -> int:
        return slice_count(self.tiles, self.rows * self.block, numbers)

    def network(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.layers.code_weight, self.layers.layer_weight, self.layers.bias

    def padded(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """A vector or matrix over the channels, padded to the block."""
        target = tensor.new_zeros([self.block] * tensor.dim(), dtype=dtype)
        target[tuple(slice(0, size) for size in tensor.shape)] = tensor
        return target


def edge_moments(
    points: Tensor, neighbors: Tensor, weights: list[Tensor], biases: list[Tensor], negative_slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    edges = Edges(points, neighbors, weights, biases, negative_slope)
    block, channels = edges.block, edges.channels
    count = (neighbors >= 0).sum().double()
    slices = edges.slices(block)
    sums = points.new_zeros(slices, block, dtype=torch.float64)
    sizes = edges.cloud, edges.k, edges.layers.depth, edges.tiles
    inputs = edges.points, edges.neighbors, *edges.network()
    launch(mean_kernel, (slices,), *inputs, sums, *sizes, **edges.options)
    mean = sums.sum(0) / count.clamp(min=1)
    slices = edges.slices(block * block)
    scatter = points.new_zeros(slices, block, block, dtype=torch.float64)
    launch(scatter_kernel, (slices,), *inputs, mean, scatter, *sizes, **edges.options)
    covariance = scatter.sum(0)[:channels, :channels] / count.clamp(min=1)
    return mean[:channels].clone(), covariance.contiguous(), count


def edge_moments_backward(
    grad_mean: Tensor,
    grad_covariance: Tensor,
    points: Tensor,
    neighbors: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    mean: Tensor,
    count: Tensor,
    negative_slope: float,
    points_gradient: bool,
) -> tuple[Tensor, list[Tensor]]:
    edges = Edges(points, neighbors, weights, biases, negative_slope)
    layers, dtype = edges.layers, edges.layers.bias.dtype
    edge_count = count.clamp(min=1)
    constant = edges.padded(grad_mean / edge_count, dtype)
    slope = edges.padded((grad_covariance + grad_covariance.mT) / edge_count, dtype)
    moments = edges.padded(mean, torch.float64), constant, slope
    slices = edges.slices(layers.size)
    partial = layers.bias.new_zeros(slices, layers.size)
    by_center, by_neighbor = (layers.bias.new_zeros(points.shape) for _ in range(2))
    launch(
        moments_backward_centers_kernel, (slices,),
        edges.points, edges.neighbors, *edges.network(), *moments, partial, by_center,
        edges.cloud, edges.k, layers.depth, edges.tiles, layers.size,
        POINTS=points_gradient, **edges.options,
    )  # fmt: skip
    if points_gradient and slices:
        launch(
            moments_backward_neighbors_kernel, (edges.tiles,),
            edges.points, *incoming(edges.neighbors), *edges.network(), *moments, by_neighbor,
            edges.cloud, layers.depth,
            **edges.options,
        )  # fmt: skip
    gradients = [t.to(points.dtype) for t in layers.gradients(partial.sum(0))] if weights else []
    grad_points = by_center + by_neighbor if points_gradient else by_center.new_empty(0, *points.shape[1:])
    return grad_points.to(points.dtype), gradients
