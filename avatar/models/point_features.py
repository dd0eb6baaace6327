"""Networks that read a point cloud: RandLA-Net and EdgeConv layers, side by side.

Sources: Hu et al., RandLA-Net, CVPR 2020; Wang et al., Dynamic Graph CNN, TOG 2019.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import avatar_ops
from avatar.config import PointFeaturesConfig
from avatar.errors import AvatarError
from avatar.models.mlp import linear_macs
from avatar.random import keyed_generator
from avatar_ops.edge_max import edge_max_values
from avatar_ops.linear_act import linear_act_layers
from avatar_ops.nearest_sampled import nearest_sampled, sampled_places
from avatar_ops.nn import EdgeConv, LocalFeatureAggregation
from avatar_ops.nn.local_feature_aggregation import LinearNorm, running_folds, split_fold

NEGATIVE_SLOPE = 0.2
NORM_EPS = 1e-6
INPUT_WIDTH = 8
HEAD_WIDTHS = (64, 32)


@dataclass
class Pyramid:
    """Levels of a cloud and the graphs on them, fixed as long as points neither come nor go.

    Level 0 has all N points, so ordered that near ones are near in memory, level l + 1 a sample of level l;
    indices count within a level; -1 is a missing neighbour.
    """

    order: Tensor  # (N,) int64: the point of the cloud that each of level 0 is
    samples: list[Tensor]  # (N_{l+1},) int64 per transition: the points of level l that stay
    neighbors: list[Tensor]  # (N_l, K) int64 per level but the last, the point itself included
    nearest: list[Tensor]  # (N_l,) int64 per transition: the nearest point of level l + 1
    graph: Tensor  # (N_g, K_g) int64: neighbours for the EdgeConv layers, the point itself included

    @property
    def num_points(self) -> int:
        return len(self.order)

    def arrange(self, rows: Tensor) -> Tensor:
        """Rows (B, N, C) of the cloud in the order of level 0; AvatarError for another N."""
        if rows.shape[1] != self.num_points:
            raise AvatarError(f"pyramid: got one of {self.num_points} points, wants {rows.shape[1]}")
        if len(rows) == 1:  # Twice as fast in two dimensions.
            return rows[0].index_select(0, self.order).unsqueeze(0)
        return rows.index_select(1, self.order)

    def restore(self, rows: Tensor) -> Tensor:
        """Rows (B, N, C) of level 0 in the order of the cloud."""
        numbers = torch.arange(len(self.order), device=self.order.device)
        return rows.index_select(1, torch.empty_like(numbers).scatter_(0, self.order, numbers))

    def to(self, device: torch.device | str) -> "Pyramid":
        return Pyramid.from_tensors({name: tensor.to(device) for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by names such as "samples.0", to be written to a checkpoint."""
        named = {"order": self.order, "graph": self.graph}
        for name in ("samples", "neighbors", "nearest"):
            named |= {f"{name}.{level}": tensor for level, tensor in enumerate(getattr(self, name))}
        return named

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor]) -> "Pyramid":
        """What `tensors` gave, other names aside."""

        def series(name: str) -> list[Tensor]:
            names = itertools.takewhile(
                tensors.__contains__, (f"{name}.{level}" for level in itertools.count())
            )
            return [tensors[each] for each in names]

        return Pyramid(
            tensors["order"], series("samples"), series("neighbors"), series("nearest"), tensors["graph"]
        )


def level_sizes(num_points: int, ratios: Sequence[int]) -> list[int]:
    """Points of every level: divided by the ratio each time, but two stay where there are two.

    Batch normalisation in training needs more than one row.
    """
    sizes = [num_points]
    for ratio in ratios:
        sizes.append(max(sizes[-1] // ratio, min(sizes[-1], 2)))
    return sizes


@torch.no_grad()
def build_pyramid(points: Tensor, config: PointFeaturesConfig, seed: int) -> Pyramid:
    """The levels and graphs of a cloud; the same points, options and seed give the same again.

    Args:
        points: (N, 3), finite, N at least 1; the canonical points.
        config: numbers of neighbours, ratios, and the level of the EdgeConv layers.
        seed: draws the samples.

    Raises:
        AvatarError: points of another shape or not finite; a level that does not exist.
    """
    if points.dim() != 2 or points.shape[1] != 3 or len(points) == 0:
        raise AvatarError(f"points: got shape {tuple(points.shape)}, wants (N, 3) with N at least 1")
    # Either is NaN where a point is.
    if not torch.stack(points.aminmax()).isfinite().all():
        raise AvatarError("points: got some that are not finite, wants finite coordinates")
    levels = len(config.randla_widths)
    if not 0 <= config.gcn_level <= levels:
        raise AvatarError(f"gcn_level: got {config.gcn_level}, wants a level from 0 to {levels}")

    index, order = avatar_ops.PointIndex.arranged(points.detach())
    current = index.points
    pyramid = Pyramid(order, [], [], [], torch.empty(0, config.gcn_neighbors, dtype=torch.int64))
    sizes = level_sizes(len(points), config.randla_ratios())
    for level, size in enumerate(sizes):
        if level > 0:
            key = keyed_generator(seed, "pyramid", level).initial_seed()
            sample = avatar_ops.random_sample(len(current), size, seed=key, device=points.device)
            sample, places = sampled_places(sample, len(current))
            pyramid.samples.append(sample)
            finer, current = current, current.index_select(0, sample)
            index = avatar_ops.PointIndex(current)
            nearest = nearest_sampled(pyramid.neighbors[-1], places)
            # Lists of neighbours are ordered as a search would answer; it is left those without one.
            rest = (nearest < 0).nonzero().squeeze(1)
            found = index.knn(1, queries=finer.index_select(0, rest)).indices
            nearest.index_copy_(0, rest, found[:, 0])
            pyramid.nearest.append(nearest)
        if level < levels:
            pyramid.neighbors.append(index.knn(config.randla_neighbors).indices)
        if level == config.gcn_level:
            pyramid.graph = index.knn(config.gcn_neighbors).indices
    return pyramid


class RandLANet(nn.Module):
    """RandLA-Net: features of a point from neighbourhoods that grow level by level, and back.

    Going down, a level's dilated residual block is followed by the maximum over each remaining point's K
    neighbours; going up, features are copied from the nearest remaining point and joined with those of the
    way down. With M = linear map, batch normalisation, LeakyReLU 0.2 and d the widths, for four levels:

        M(in: 8), blocks to 2 d_0 ... 2 d_3, M(2 d_3: 2 d_3),
        M(2 d_3 + 2 d_2: 2 d_2), M(2 d_2 + 2 d_1: 2 d_1), M(2 d_1 + 2 d_0: 2 d_0), M(2 d_0 + 2 d_0: 2 d_0),
        with classes: M(2 d_0: 64), M(64: 32), dropout, linear(32: classes)

    Args:
        in_channels: of the features; coordinates count only if they are among them.
        widths: d of every level, even; four for SemanticKITTI, a fifth of 512 for S3DIS and Semantic3D.
        classes: of the head, or None for the features themselves.
        ratio: points of a level over points of the next, one number or one per level.
        momentum: of every batch normalisation, as in torch.
        dropout: share of the head's features.

    Source: Hu et al., RandLA-Net, CVPR 2020, section 3 and figure 7, and its published code.
    """

    def __init__(
        self,
        in_channels: int = 6,
        *,
        widths: Sequence[int] = (16, 64, 128, 256),
        classes: int | None = None,
        ratio: int | Sequence[int] = 4,
        momentum: float = 0.01,
        dropout: float = 0.5,
    ):
        super().__init__()
        self.ratios = (ratio,) * len(widths) if isinstance(ratio, int) else tuple(ratio)
        if len(self.ratios) != len(widths):
            raise AvatarError(
                f"ratio: got {len(self.ratios)} numbers, wants one for each of {len(widths)} levels"
            )
        outputs = [2 * width for width in widths]

        def layer(inputs: int, outputs: int) -> LinearNorm:
            return LinearNorm(inputs, outputs, NORM_EPS, momentum)

        self.input = layer(in_channels, INPUT_WIDTH)
        self.encoder = nn.ModuleList(
            LocalFeatureAggregation(*pair, negative_slope=NEGATIVE_SLOPE, eps=NORM_EPS, momentum=momentum)
            for pair in itertools.pairwise((INPUT_WIDTH, *outputs))
        )
        self.middle = layer(outputs[-1], outputs[-1])
        # The finest two levels both have the first block's width: before and after the first sampling.
        skips = [outputs[0], *outputs[:-1]][::-1]
        self.decoder = nn.ModuleList(
            layer(below + skip, skip) for below, skip in itertools.pairwise((outputs[-1], *skips))
        )
        self.head = None
        self.out_channels = outputs[0]
        if classes is not None:
            sizes = (outputs[0], *HEAD_WIDTHS)
            self.head = nn.ModuleList(layer(*pair) for pair in itertools.pairwise(sizes))
            self.dropout = nn.Dropout(dropout)
            self.classifier = nn.Linear(sizes[-1], classes)
            self.out_channels = classes

    def forward(self, points: Tensor, features: Tensor, pyramid: Pyramid) -> Tensor:
        """Features or class scores of every point.

        Args:
            points: (B, N, 3).   features: (B, N, in_channels).
            pyramid: of N points, for as many levels and with the same ratios; it serves all B clouds.

        Returns:
            (B, N, 2 * widths[0]), or (B, N, classes).

        Raises:
            AvatarError: a pyramid of another number of points or levels.
        """
        if len(pyramid.samples) != len(self.encoder):
            raise AvatarError(f"pyramid: got {len(pyramid.samples)} levels, wants {len(self.encoder)}")
        arranged = pyramid.arrange(points)
        features = arranged if features is points else pyramid.arrange(features)
        points = arranged
        head = self.head or []
        folds = running_folds((self.input, self.middle, *self.decoder, *head))
        x = self.input.activated(features, NEGATIVE_SLOPE, folds.get(self.input))
        skips = []
        for block, neighbors, sample in zip(self.encoder, pyramid.neighbors, pyramid.samples, strict=True):
            neighbors = _for_batch(neighbors, x)
            x = block(points, x, neighbors)
            if not skips:
                skips.append(x)
            x = edge_max_values(x, neighbors, sample)
            points = points.index_select(1, sample)
            skips.append(x)
        x = self.middle.activated(skips.pop(), NEGATIVE_SLOPE, folds.get(self.middle))
        *decoder, last = zip(self.decoder, reversed(pyramid.nearest), reversed(skips), strict=True)
        for layer, nearest, skip in decoder:
            x = layer.activated_with(skip, x, nearest, NEGATIVE_SLOPE, folds.get(layer))
        layer, nearest, skip = last
        layers = [layer, *head]
        if self.head is None or self.training or not all(each in folds for each in layers):
            x = layer.activated_with(skip, x, nearest, NEGATIVE_SLOPE, folds.get(layer))
            for each in head:
                x = each.activated(x, NEGATIVE_SLOPE, folds.get(each))
            return pyramid.restore(x if self.head is None else self.classifier(self.dropout(x)))
        *first, mapped = split_fold(folds[layer], skip, x)
        folded = [first, *(folds[each] for each in head)]
        weights, biases = zip(*folded, (self.classifier.weight, self.classifier.bias), strict=True)
        slopes = [NEGATIVE_SLOPE] * len(folded) + [1]
        return linear_act_layers(
            skip, weights, biases, slopes, rest=mapped, places=nearest, targets=pyramid.order
        )

    def macs(self, num_points: int, num_neighbors: int = 16) -> dict[str, int]:
        """Multiply-accumulates of the linear layers for one cloud, by part.

        Position codes and scores count once per edge, everything else once per point of its level.
        """
        sizes = level_sizes(num_points, self.ratios)
        counts = {"input": num_points * linear_macs(self.input)}
        for level, block in enumerate(self.encoder):
            per_edge = linear_macs(block.encode) + linear_macs(block.scores)
            per_point = linear_macs(block) - per_edge
            counts[f"encoder.{level}"] = sizes[level] * (num_neighbors * per_edge + per_point)
        counts["middle"] = sizes[-1] * linear_macs(self.middle)
        for step, layer in enumerate(self.decoder):
            counts[f"decoder.{step}"] = sizes[-2 - step] * linear_macs(layer)
        if self.head is not None:
            counts["head"] = num_points * (linear_macs(self.head) + linear_macs(self.classifier))
        return counts


class PointGcn(nn.Module):
    """A stack of EdgeConv layers on one graph; all their outputs side by side.

    Args:
        in_channels: of the features.
        widths: of the EdgeConv layers.
        output: width of a linear map, batch normalisation and LeakyReLU 0.2 over them all, or None.

    Source: Wang et al., Dynamic Graph CNN, TOG 2019; the graph is given instead of found anew per layer.
    """

    def __init__(self, in_channels: int, widths: Sequence[int], output: int | None = None):
        super().__init__()
        self.layers = nn.ModuleList(
            EdgeConv(*pair, negative_slope=NEGATIVE_SLOPE)
            for pair in itertools.pairwise((in_channels, *widths))
        )
        self.output = None
        self.out_channels = sum(widths)
        if output is not None:
            norm = nn.BatchNorm1d(output)
            self.output = LinearNorm(self.out_channels, output, norm.eps, norm.momentum)
            self.out_channels = output

    def forward(self, features: Tensor, graph: Tensor) -> Tensor:
        """(B, N, out_channels) of features (B, N, in_channels) and a graph (N, K) for all B clouds."""
        graph = _for_batch(graph, features)
        outputs = []
        for layer in self.layers:
            features = layer(features, graph)
            outputs.append(features)
        joined = torch.cat(outputs, -1)
        return joined if self.output is None else self.output.activated(joined, NEGATIVE_SLOPE)

    def macs(self, num_points: int, num_neighbors: int = 20) -> int:
        """Multiply-accumulates of the linear layers for one cloud, EdgeConv once per edge as published."""
        per_point = 0 if self.output is None else linear_macs(self.output)
        return num_points * (num_neighbors * linear_macs(self.layers) + per_point)


class PointFeatures(nn.Module):
    """RandLA-Net's features of every point beside those of an EdgeConv stack at its level of the pyramid.

    Args:
        config: sizes; the pyramids given to `forward` are to be built with the same.
        in_channels: of coordinates and colours together.
    """

    def __init__(self, config: PointFeaturesConfig, in_channels: int = 6):
        super().__init__()
        self.config = config
        self.randla = RandLANet(
            in_channels,
            widths=config.randla_widths,
            ratio=config.randla_ratios(),
            momentum=config.norm_momentum,
        )
        self.gcn = PointGcn(in_channels, config.gcn_widths, config.gcn_output)

    @property
    def out_channels(self) -> int:
        return self.randla.out_channels + self.gcn.out_channels

    def forward(self, posed: Tensor, colors: Tensor, pyramid: Pyramid) -> Tensor:
        """Features (B, N, out_channels) of points posed (B, N, 3) with colors (B, N, 3)."""
        features = torch.cat([posed, colors], -1)
        fine = self.randla(posed, features, pyramid)
        features = pyramid.arrange(features)
        for sample in pyramid.samples[: self.config.gcn_level]:
            features = features.index_select(1, sample)
        coarse = self.gcn(features, pyramid.graph)
        for nearest in reversed(pyramid.nearest[: self.config.gcn_level]):
            coarse = coarse.index_select(1, nearest)
        return torch.cat([fine, pyramid.restore(coarse)], -1)

    def macs(self, num_points: int) -> dict[str, int]:
        """Multiply-accumulates of the linear layers for one cloud: see RandLANet and PointGcn."""
        config = self.config
        size = level_sizes(num_points, config.randla_ratios())[config.gcn_level]
        return {
            "randla": sum(self.randla.macs(num_points, config.randla_neighbors).values()),
            "gcn": self.gcn.macs(size, config.gcn_neighbors),
        }


def _for_batch(neighbors: Tensor, like: Tensor) -> Tensor:
    return neighbors.expand(len(like), -1, -1)
