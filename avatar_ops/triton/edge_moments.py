"""edge_moments in Triton: kernels, then launchers.

Each program adds up one slice of the edges, tile by tile; the slices are added in float64 in a second step.
Deviations from the mean are taken before they are squared, hence two passes. Sums have a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import accumulation_dtype, dot_precision, launch
from ._position import (
    add_edges_to_points,
    block_of,
    block_pointers,
    incoming,
    multiply_add,
    new_scratch,
    outgoing_edges,
    pack_layers,
    position_network,
    position_network_backward,
    send_to_points,
    slice_count,
    tile_options,
    weight_gradient_options,
)


@triton.jit(do_not_specialize=["cloud", "tiles"])
def mean_kernel(
    points, neighbors, code_weight, layer_weight, bias, sums, scratch, cloud, tiles, scratch_size,
    SLOPE: tl.constexpr, DEPTH: tl.constexpr, DIMS: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """sums (slices, BLOCK) float64: the position network's output added up."""
    column = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    scratch += tl.program_id(0).to(tl.int64) * scratch_size
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), disable_licm=True):
        for chunk in tl.range(tl.cdiv(K, SLOTS), disable_licm=True):
            center, neighbor, valid = outgoing_edges(neighbors, tile, chunk, cloud, K, ROWS, SLOTS)
            position = position_network(
                points, center, neighbor, valid, code_weight, layer_weight, bias, scratch, DEPTH,
                SLOPE, DIMS, BLOCK, STEP, PRECISION,
            )  # fmt: skip
            total += tl.sum(tl.where(valid[:, None], position, 0.0), 0).to(tl.float64)
    tl.store(sums + tl.program_id(0) * BLOCK + column, total)


@triton.jit
def deviations(position, valid, mean, BLOCK: tl.constexpr):
    """The outputs' deviations from `mean` (2, BLOCK), a sum of two numbers of their dtype; 0 where no edge is."""
    column = tl.arange(0, BLOCK)
    deviation = position - tl.load(mean + column)[None, :] - tl.load(mean + BLOCK + column)[None, :]
    return tl.where(valid[:, None], deviation, 0.0)


@triton.jit(do_not_specialize=["cloud", "tiles"])
def scatter_kernel(
    points, neighbors, code_weight, layer_weight, bias, mean, scatter, scratch, cloud, tiles, scratch_size,
    SLOPE: tl.constexpr, DEPTH: tl.constexpr, DIMS: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """scatter (slices, BLOCK, BLOCK): outer products of the deviations from the mean added up."""
    ACC: tl.constexpr = bias.dtype.element_ty
    total = tl.zeros([BLOCK, BLOCK], ACC)
    scratch += tl.program_id(0).to(tl.int64) * scratch_size
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), disable_licm=True):
        for chunk in tl.range(tl.cdiv(K, SLOTS), disable_licm=True):
            center, neighbor, valid = outgoing_edges(neighbors, tile, chunk, cloud, K, ROWS, SLOTS)
            position = position_network(
                points, center, neighbor, valid, code_weight, layer_weight, bias, scratch, DEPTH,
                SLOPE, DIMS, BLOCK, STEP, PRECISION,
            )  # fmt: skip
            deviation = deviations(position, valid, mean, BLOCK)
            total = tl.dot(tl.trans(deviation), deviation, total, input_precision=PRECISION, out_dtype=ACC)
    scatter += tl.program_id(0).to(tl.int64) * BLOCK * BLOCK
    tl.store(block_pointers(scatter, 0, 0, BLOCK, 1, BLOCK, BLOCK), total)


@triton.jit(do_not_specialize=["cloud", "tiles"])
def moments_backward_kernel(
    points, neighbors, code_weight, layer_weight, bias, mean, constant, slope, partial, grad_points, grad_edges,
    scratch, cloud, tiles, size, scratch_size,
    POINTS: tl.constexpr, SLOPE: tl.constexpr, DEPTH: tl.constexpr, DIMS: tl.constexpr, CODE: tl.constexpr,
    K: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """For one slice of the rows: partial (slices, size) of the layers and, with POINTS, the coordinates'.

    Mean and covariance send constant + slope (output - mean) to each edge's output.
    """
    ACC: tl.constexpr = bias.dtype.element_ty
    column = tl.arange(0, BLOCK)
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
            deviation = deviations(position, valid, mean, BLOCK)
            gradient = tl.zeros(position.shape, ACC) + tl.load(constant + column)[None, :]
            gradient = multiply_add(gradient, deviation, scratch, slope, 0, 0, BLOCK, 1, STEP, PRECISION)
            gradient = tl.where(valid[:, None], gradient, 0.0)
            gradient = position_network_backward(
                gradient, position, points, center, neighbor, valid, code_weight, layer_weight, bias, scratch,
                partial, SLOPE, DEPTH, DIMS, CODE, BLOCK, STEP, PRECISION,
            )  # fmt: skip
            if POINTS:
                send_to_points(
                    gradient, points, center, neighbor, valid, code_weight, grad_points, grad_edges, tile,
                    chunk, cloud, K, DIMS, BLOCK, ROWS, SLOTS,
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
            "DEPTH": self.layers.depth,
            "DIMS": dims,
            "PRECISION": dot_precision(points.dtype),
        }
        self.batch = batch
        self.tiles = self.tiles_of(self.options)

    def tiles_of(self, options: dict[str, int]) -> int:
        return self.batch * triton.cdiv(self.cloud, options["ROWS"]) if self.k else 0

    def slices(self, tiles: int, numbers: int) -> int:
        return slice_count(tiles, self.rows * self.block, numbers)

    def network(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.layers.code_weight, self.layers.layer_weight, self.layers.bias

    def padded(self, tensor: Tensor) -> Tensor:
        """A vector or matrix over the channels, padded to the block."""
        target = tensor.new_zeros([self.block] * tensor.dim())
        target[tuple(slice(0, size) for size in tensor.shape)] = tensor
        return target

    def split_mean(self, mean: Tensor) -> Tensor:
        """(2, block): the padded mean, float64, as a sum of two numbers of the sums' dtype."""
        high = mean.to(self.layers.bias.dtype)
        return torch.stack([high, (mean - high).to(high.dtype)])


def edge_moments(
    points: Tensor, neighbors: Tensor, weights: list[Tensor], biases: list[Tensor], negative_slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    edges = Edges(points, neighbors, weights, biases, negative_slope)
    block, channels = edges.block, edges.channels
    count = (neighbors >= 0).sum().double()
    slices = edges.slices(edges.tiles, block)
    sums = points.new_zeros(slices, block, dtype=torch.float64)
    inputs = edges.points, edges.neighbors, *edges.network()
    scratch = new_scratch(edges.layers.bias, slices, edges.options)
    sizes = edges.cloud, edges.tiles, scratch.shape[1]
    launch(mean_kernel, (slices,), *inputs, sums, scratch, *sizes, **edges.options)
    mean = sums.sum(0) / count.clamp(min=1)
    slices = edges.slices(edges.tiles, block * block)
    scatter = edges.layers.bias.new_empty(slices, block, block)
    scratch = new_scratch(scatter, slices, edges.options)
    launch(
        scatter_kernel, (slices,),
        *inputs, edges.split_mean(mean), scatter, scratch, *sizes, **edges.options,
    )  # fmt: skip
    covariance = scatter.sum(0, dtype=torch.float64)[:channels, :channels] / count.clamp(min=1)
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
    layers, like = edges.layers, edges.layers.bias
    edge_count = count.clamp(min=1)
    constant = edges.padded(grad_mean / edge_count).to(like.dtype)
    slope = edges.padded((grad_covariance + grad_covariance.mT) / edge_count).to(like.dtype)
    grad_points = like.new_zeros(points.shape[0] if points_gradient else 0, *points.shape[1:])
    grad_edges = like.new_empty(*grad_points.shape[:2], edges.k, points.shape[2])
    options = edges.options | weight_gradient_options(edges.k, edges.block, layers)
    tiles = edges.tiles_of(options)
    slices = edges.slices(tiles, layers.size)
    partial = like.new_zeros(slices, layers.size)
    scratch = new_scratch(like, slices, options)
    launch(
        moments_backward_kernel, (slices,),
        edges.points, edges.neighbors, *edges.network(), edges.split_mean(edges.padded(mean)), constant, slope,
        partial, grad_points, grad_edges, scratch, edges.cloud, tiles, layers.size, scratch.shape[1],
        POINTS=points_gradient, **options,
    )  # fmt: skip
    if points_gradient and slices:
        add_edges_to_points(grad_edges, incoming(edges.neighbors), grad_points)
    gradients = [t.to(points.dtype) for t in layers.gradients(partial.sum(0))] if weights else []
    return grad_points.to(points.dtype), gradients
