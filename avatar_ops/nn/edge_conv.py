"""EdgeConv as a module, with batch statistics exact over the edges."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .._library import check_slope, is_size
from ..edge_conv import (
    apply_edge_conv,
    check_edge_inputs,
    edge_conv,
    edge_conv_norm,
)
from ..edge_mlp import edge_mlp, edge_mlp_statistics
from .batch_norm import track, uses_batch_statistics


class EdgeConv(nn.Module):
    """output_i = max_j MLP([x_i ; x_i - x_j]), where every layer is linear, normalisation, LeakyReLU.

    With norm="batch" a layer has no bias. In training it is normalised by mean and variance over all edges
    that exist, exactly as BatchNorm2d over (B, C, N, K) where no neighbour is -1, and gradients go through
    these statistics; running statistics are kept as BatchNorm2d keeps them (a batch without edges leaves
    them as they are). In evaluation the running ones are folded into the linear map. A norm left in
    evaluation mode, as for fine-tuning, uses its running statistics. No edge outlives a tile: memory is
    O(N * (C + O)).

    State: linears.L.weight (O, 2C) for [x_i ; x_i - x_j], then (O, previous O); linears.L.bias (O,) with
    norm=None; norms.L.{weight, bias, running_mean, running_var} (O,) and norms.L.num_batches_tracked with
    norm="batch". momentum and eps are those of norms[L].

    Args:
        in_channels: C.
        out_channels: O, or the widths of all layers of an MLP per edge.
        norm: "batch" or None.
        negative_slope: of the LeakyReLU, in [0, 1].

    Source: Wang et al., Dynamic Graph CNN, TOG 2019; Ioffe and Szegedy, Batch Normalization, ICML 2015.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | Sequence[int],
        *,
        norm: str | None = "batch",
        negative_slope: float = 0.2,
    ):
        super().__init__()
        widths = list(out_channels) if isinstance(out_channels, list | tuple) else [out_channels]
        if not widths or not all(is_size(width) for width in widths):
            raise ValueError(f"out_channels: got {out_channels!r}, expected a positive int or a list of them")
        if not is_size(in_channels):
            raise ValueError(f"in_channels: got {in_channels!r}, expected a positive int")
        if norm not in ("batch", None):
            raise ValueError(f"norm: got {norm!r}, expected 'batch' or None")
        self.in_channels = in_channels
        self.out_channels = widths[-1]
        self.negative_slope = check_slope(negative_slope)
        inputs = [2 * in_channels, *widths[:-1]]
        self.linears = nn.ModuleList(
            nn.Linear(fan_in, width, bias=norm is None) for fan_in, width in zip(inputs, widths, strict=True)
        )
        # These hold parameters and running statistics; edges never pass through them.
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths) if norm == "batch" else None

    def extra_repr(self) -> str:
        return f"in_channels={self.in_channels}, negative_slope={self.negative_slope}"

    def forward(self, x: Tensor, neighbors: Tensor) -> Tensor:
        """(B, N, O) or (N, O) from x (B, N, C) or (N, C) and neighbors (B, N, K) or (N, K), -1 for none."""
        if x.dim() not in (2, 3) or x.shape[-1] != self.in_channels:
            raise ValueError(
                f"x: got shape {tuple(x.shape)}, expected (B, N, C) or (N, C) with C = {self.in_channels}"
            )
        return self._single(x, neighbors) if len(self.linears) == 1 else self._deep(x, neighbors)

    def _single(self, x: Tensor, neighbors: Tensor) -> Tensor:
        linear, slope = self.linears[0], self.negative_slope
        if self.norms is None:
            return edge_conv(x, neighbors, linear.weight, linear.bias, negative_slope=slope)
        norm = self.norms[0]
        if uses_batch_statistics(norm):
            output, statistics = edge_conv_norm(
                x, neighbors, linear.weight, norm.weight, norm.bias, eps=norm.eps, negative_slope=slope
            )
            track(norm, *statistics)
            return output
        scale, shift = fold(norm, norm.running_mean, norm.running_var)
        neighbors = check_edge_inputs(x, neighbors, linear.weight)
        return apply_edge_conv(x, neighbors, linear.weight, None, scale, shift, slope)

    def _deep(self, x: Tensor, neighbors: Tensor) -> Tensor:
        slope, weights = self.negative_slope, [linear.weight for linear in self.linears]
        scales, shifts = [], []
        for depth, linear in enumerate(self.linears):
            if self.norms is None:
                scale, shift = torch.ones_like(linear.bias), linear.bias
            elif uses_batch_statistics(norm := self.norms[depth]):
                statistics = edge_mlp_statistics(
                    x, neighbors, weights[: depth + 1], scales, shifts, negative_slope=slope
                )
                track(norm, *statistics)
                scale, shift = fold(norm, statistics.mean, statistics.variance)
            else:
                scale, shift = fold(norm, norm.running_mean, norm.running_var)
            scales.append(scale)
            shifts.append(shift)
        return edge_mlp(x, neighbors, weights, scales, shifts, negative_slope=slope)


def fold(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift that do what the normalisation does with these statistics, at least float32."""
    wide = torch.promote_types(norm.weight.dtype, torch.float32)
    scale = norm.weight.to(wide) * (variance.to(wide) + norm.eps).rsqrt()
    return scale, norm.bias.to(wide) - mean.to(wide) * scale
