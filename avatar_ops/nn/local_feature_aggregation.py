"""RandLA-Net's dilated residual block as a module, with batch statistics exact over the edges."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._library import check_slope, is_size
from ..edge_moments import edge_moments
from ..linear_act import NormedLayer, linear_act, linear_act_layers, linear_norm_folds
from ..local_attention_pool import local_attention_pool
from ..local_attention_pool_block import local_attention_pool_block
from .batch_norm import track, uses_batch_statistics

Fold = tuple[Tensor, Tensor]


class LinearNorm(nn.Module):
    """Linear map and batch normalisation; called, over points. `fold` serves edges that are never formed.

    Where methods take a `fold`, it is that by the running statistics (`running_folds`); None uses those of
    the batch, or makes it where the running statistics count.
    """

    def __init__(self, in_channels: int, out_channels: int, eps: float, momentum: float | None):
        super().__init__()
        self.linear = nn.Linear(in_channels, out_channels)
        self.norm = nn.BatchNorm1d(out_channels, eps=eps, momentum=momentum)

    def forward(self, x: Tensor) -> Tensor:
        if uses_batch_statistics(self.norm):
            y = self.linear(x)
            return self.norm(y.reshape(-1, y.shape[-1])).view(y.shape)
        return F.linear(x, *self.running_fold())

    def activated(self, x: Tensor, negative_slope: float, fold: Fold | None = None) -> Tensor:
        """LeakyReLU of `forward`."""
        if fold is None:
            if uses_batch_statistics(self.norm):
                return F.leaky_relu(self(x), negative_slope, inplace=True)
            fold = self.running_fold()
        return linear_act(x, *fold, negative_slope=negative_slope)

    def activated_with(
        self, x: Tensor, rest: Tensor, places: Tensor, negative_slope: float, fold: Fold | None = None
    ) -> Tensor:
        """`activated` of [x ; rest[places]] over (B, N, .), rest (B, M, .) and places (N,).

        In evaluation the rows of `rest` go through their part of the linear map before they are copied.
        """
        if fold is None:
            if uses_batch_statistics(self.norm):
                return self.activated(torch.cat([x, rest.index_select(1, places)], -1), negative_slope)
            fold = self.running_fold()
        weight, bias, mapped = split_fold(fold, x, rest)
        return linear_act(x, weight, bias, rest=mapped, places=places, negative_slope=negative_slope)

    def normed(self, mean: Tensor, variance: Tensor) -> NormedLayer:
        linear, norm = self.linear, self.norm
        return NormedLayer(linear.weight, linear.bias, norm.weight, norm.bias, mean, variance)

    def fold(self, mean: Tensor, variance: Tensor) -> Fold:
        """Weight and bias that do both at once, given the statistics of what the linear map gives."""
        return self.normed(mean, variance).fold(self.norm.eps)

    def running_fold(self) -> Fold:
        """`fold` by the running statistics."""
        return self.fold(self.norm.running_mean, self.norm.running_var)


def running_folds(layers: Iterable[LinearNorm]) -> dict[LinearNorm, Fold]:
    """`running_fold` of those layers whose running statistics count."""
    steady = [layer for layer in layers if not uses_batch_statistics(layer.norm)]
    return dict(zip(steady, linear_norm_folds(*_running(steady)), strict=True))


def _running(layers: Iterable[LinearNorm]) -> tuple[list[NormedLayer], list[float]]:
    """Layers with their running statistics, and each norm's epsilon."""
    norms = [layer.norm for layer in layers]
    normed = [layer.normed(n.running_mean, n.running_var) for layer, n in zip(layers, norms, strict=True)]
    return normed, [norm.eps for norm in norms]


def split_fold(fold: Fold, x: Tensor, rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a map of [x ; rest]: weight of x, bias, and what `rest` adds."""
    weight, bias = fold
    width = x.shape[-1]
    return weight[:, :width], bias, linear_act(rest, weight[:, width:])


class LocalFeatureAggregation(nn.Module):
    """Two chained steps of local position encoding and attentive pooling, with a shortcut.

    With M = linear map, batch normalisation, LeakyReLU; d = out_channels / 2; the code of edge (i, j)
    e = [p_i ; p_j ; p_i - p_j ; |p_i - p_j|]:

        a = pool(M(features: d/2), M(e: d/2)),    a = M(a: d/2)
        b = pool(a, M(M(e: d/2): d/2)),           b = M(b: d)
        result = LeakyReLU(norm(linear(b)) + norm(linear(features)))

    `pool` is `local_attention_pool` with d x d scores without bias; the first M(e) is shared by both steps.

    In training the edges are normalised by mean and variance over all edges that exist, without -1 exactly
    as BatchNorm2d over (B, C, N, K), and gradients go through these statistics: mean and covariance of a
    layer's input determine them, so no edge is stored. Running statistics are kept as BatchNorm2d keeps them
    (a batch without edges leaves them as they are). In evaluation they are folded into the linear maps.

    State, each `linear` and `norm` below it: reduce (c to d/2), encode.0 (e to d/2), encode.1 (d/2 to d/2),
    attend.0 (d to d/2), attend.1 (d to d), expand (d to 2 d), shortcut (c to 2 d); scores.0 and scores.1
    (d, d). The published network orders the code as [|p_i - p_j| ; p_i - p_j ; p_i ; p_j]: permute the
    columns of encode.0.linear.weight to take its weights over.

    Args:
        in_channels: c.   out_channels: 2 d, a multiple of 4.
        dims: of the points.   negative_slope: of every LeakyReLU, in [0, 1].
        eps, momentum: of every batch normalisation, as in torch.

    Source: Hu et al., RandLA-Net, CVPR 2020, section 3.3 and figure 3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        dims: int = 3,
        negative_slope: float = 0.2,
        eps: float = 1e-6,
        momentum: float | None = 0.01,
    ):
        super().__init__()
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("dims", dims)):
            if not is_size(value):
                raise ValueError(f"{name}: got {value!r}, expected a positive int")
        if out_channels % 4:
            raise ValueError(f"out_channels: got {out_channels}, expected a multiple of 4")
        check_slope(negative_slope)
        self.in_channels, self.out_channels, self.dims = in_channels, out_channels, dims
        self.negative_slope = negative_slope
        width, half = out_channels // 2, out_channels // 4

        def layer(inputs: int, outputs: int) -> LinearNorm:
            return LinearNorm(inputs, outputs, eps, momentum)

        self.reduce = layer(in_channels, half)
        self.encode = nn.ModuleList([layer(3 * dims + 1, half), layer(half, half)])
        self.scores = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))
        self.attend = nn.ModuleList([layer(width, half), layer(width, width)])
        self.expand = layer(width, out_channels)
        self.shortcut = layer(in_channels, out_channels)

    def extra_repr(self) -> str:
        return (
            f"in_channels={self.in_channels}, out_channels={self.out_channels}, dims={self.dims}, "
            f"negative_slope={self.negative_slope}"
        )

    def forward(self, points: Tensor, features: Tensor, neighbors: Tensor) -> Tensor:
        """(B, N, out_channels) from points (B, N, D), features (B, N, c), neighbors (B, N, K), -1 for none.

        Unbatched, without B, too.
        """
        for name, value, width in (("points", points, self.dims), ("features", features, self.in_channels)):
            if value.dim() not in (2, 3) or value.shape[-1] != width:
                raise ValueError(
                    f"{name}: got shape {tuple(value.shape)}, expected (B, N, {width}) or (N, {width})"
                )
        slope, expand, shortcut = self.negative_slope, self.expand, self.shortcut
        last = (self.attend[1], expand, shortcut)
        layers = (self.reduce, *self.encode, self.attend[0], *last)
        if not any(uses_batch_statistics(layer.norm) for layer in layers):
            scores = [score.weight for score in self.scores]
            result = local_attention_pool_block(points, features, neighbors, *_running(layers), scores, slope)
            if result is not None:
                return result
        folds = running_folds(layers)
        weights, biases = [], []
        for layer in self.encode:
            fold = folds.get(layer) or self._encoding(layer, points, neighbors, weights, biases)
            weights, biases = [*weights, fold[0]], [*biases, fold[1]]
        x = self.reduce.activated(features, slope, folds.get(self.reduce))
        for depth, (score, attend) in enumerate(zip(self.scores, self.attend, strict=True), start=1):
            x = local_attention_pool(
                points,
                x.to(points.dtype),
                neighbors,
                weights[:depth],
                biases[:depth],
                score.weight,
                negative_slope=slope,
            )
            if depth == 1:
                x = attend.activated(x, slope, folds.get(attend))
        if not all(layer in folds for layer in last):
            x = self.attend[1].activated(x, slope, folds.get(self.attend[1]))
            return F.leaky_relu(expand(x) + shortcut(features), slope, inplace=True)
        (weight, bias), *sides = (folds[layer] for layer in last)
        weights, biases = zip(*sides, strict=True)
        batched = x.dim() == 3
        x, features = (rows if batched else rows.unsqueeze(0) for rows in (x, features))
        result = linear_act_layers(
            x, [weight, torch.cat(weights, 1)], [bias, biases[0] + biases[1]], [slope, slope], beside=features
        )
        return result if batched else result.squeeze(0)

    def _encoding(
        self,
        layer: LinearNorm,
        points: Tensor,
        neighbors: Tensor,
        weights: list[Tensor],
        biases: list[Tensor],
    ) -> Fold:
        """The folded layer that follows `weights` and `biases` in the position network, by batch statistics."""
        mean, covariance, count = edge_moments(
            points, neighbors, weights, biases, negative_slope=self.negative_slope
        )
        weight = layer.linear.weight.double()
        mean = weight @ mean + layer.linear.bias.double()
        # Rounding may leave a variance of nothing just below zero.
        variance = ((weight @ covariance) * weight).sum(1).clamp(min=0)
        track(layer.norm, mean, variance, count)
        return layer.fold(mean, variance)
