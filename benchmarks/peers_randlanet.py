"""RandLA-Net as PyTorch users write it, edge by edge, with the weights of `avatar.models.point_features.RandLANet`
and with neighbours from public searches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# (points, queries, k) -> (queries, k) indices of the nearest points.
Search = Callable[[Tensor, Tensor, int], Tensor]


def _indices(array, k: int) -> Tensor:
    return torch.from_numpy(array.astype("int64")).view(-1, k)


def _scipy(points: Tensor, queries: Tensor, k: int) -> Tensor:
    from scipy.spatial import cKDTree

    _, indices = cKDTree(points.numpy()).query(queries.numpy(), k, workers=torch.get_num_threads())
    return _indices(indices, k)


def _pykdtree(points: Tensor, queries: Tensor, k: int) -> Tensor:
    from pykdtree.kdtree import KDTree

    return _indices(KDTree(points.numpy()).query(queries.numpy(), k)[1], k)


def _small_gicp(points: Tensor, queries: Tensor, k: int) -> Tensor:
    from small_gicp import KdTree

    threads = torch.get_num_threads()
    tree = KdTree(points.double().numpy(), num_threads=threads)
    indices, _ = tree.batch_knn_search(queries.double().numpy(), k, num_threads=threads)
    return _indices(indices, k)


def searches() -> dict[str, Search]:
    """Name -> search, of the packages that are installed."""
    known = {
        "small_gicp": ("small_gicp", _small_gicp),
        "pykdtree": ("pykdtree", _pykdtree),
        "scipy cKDTree": ("scipy", _scipy),
    }
    return {name: search for name, (package, search) in known.items() if find_spec(package) is not None}


class LinearNorm(nn.Module):
    """Linear map and batch normalisation over the last axis."""

    def __init__(self, layer):
        super().__init__()
        self.linear, self.norm = layer.linear, layer.norm

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return self.norm(y.flatten(0, -2)).view_as(y)


def activate(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)


class Block(nn.Module):
    """The dilated residual block of one cloud."""

    def __init__(self, block):
        super().__init__()
        for name in ("reduce", "expand", "shortcut"):
            setattr(self, name, LinearNorm(getattr(block, name)))
        self.encode = nn.ModuleList(LinearNorm(layer) for layer in block.encode)
        self.attend = nn.ModuleList(LinearNorm(layer) for layer in block.attend)
        self.scores = block.scores

    def forward(self, points: Tensor, features: Tensor, neighbors: Tensor) -> Tensor:
        neighbor = points[neighbors]
        center = points.unsqueeze(1).expand_as(neighbor)
        difference = center - neighbor
        position = torch.cat([center, neighbor, difference, difference.norm(dim=-1, keepdim=True)], -1)
        x = activate(self.reduce(features))
        for encode, score, attend in zip(self.encode, self.scores, self.attend, strict=True):
            position = activate(encode(position))
            hidden = torch.cat([x[neighbors], position], -1)
            x = activate(attend((score(hidden).softmax(1) * hidden).sum(1)))
        return activate(self.expand(x) + self.shortcut(features))


class RandLANet(nn.Module):
    """The whole network for one cloud, in evaluation, sharing its weights with `network`.

    Args:
        network: an avatar.models.point_features.RandLANet with classes.
    """

    def __init__(self, network):
        super().__init__()
        self.input, self.middle = LinearNorm(network.input), LinearNorm(network.middle)
        self.blocks = nn.ModuleList(Block(block) for block in network.encoder)
        self.decoder = nn.ModuleList(LinearNorm(layer) for layer in network.decoder)
        self.head = nn.ModuleList(LinearNorm(layer) for layer in network.head)
        self.dropout, self.classifier = network.dropout, network.classifier
        self.eval()

    def forward(
        self,
        points: Tensor,
        features: Tensor,
        samples: Sequence[Tensor],
        neighbors: Sequence[Tensor],
        nearest: Sequence[Tensor],
    ) -> Tensor:
        """Class scores (N, classes) of points (N, 3) with features; graphs as in `graphs`."""
        x = activate(self.input(features))
        skips = []
        for block, edges, sample in zip(self.blocks, neighbors, samples, strict=True):
            x = block(points, x, edges)
            if not skips:
                skips.append(x)
            x = x[edges[sample]].amax(1)
            points = points[sample]
            skips.append(x)
        x = activate(self.middle(skips.pop()))
        for layer, near, skip in zip(self.decoder, reversed(nearest), reversed(skips), strict=True):
            x = activate(layer(torch.cat([skip, x[near]], -1)))
        for layer in self.head:
            x = activate(layer(x))
        return self.classifier(self.dropout(x))


def graphs(points: Tensor, samples: Sequence[Tensor], k: int, search: Search) -> tuple[list, list]:
    """Neighbours of every level but the last, and the nearest point of the next level."""
    neighbors, nearest = [], []
    for sample in samples:
        neighbors.append(search(points, points, k))
        coarser = points[sample]
        nearest.append(search(coarser, points, 1).squeeze(1))
        points = coarser
    return neighbors, nearest


def draw(num_points: int, ratios: Sequence[int]) -> list[Tensor]:
    """Samples of every level, by a shuffle of it."""
    samples = []
    for ratio in ratios:
        samples.append(torch.randperm(num_points)[: num_points // ratio].sort().values)
        num_points = len(samples[-1])
    return samples
