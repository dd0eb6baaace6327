"""nearest_sampled against searches in the sample, given the neighbours that RandLA-Net has anyway."""

import pytest
import torch
from bench_knn import surface
from peers_randlanet import searches

from avatar_ops import knn, random_sample
from avatar_ops.nearest_sampled import nearest_sampled


@pytest.mark.parametrize("count", [65_536, 400_000])
def test_nearest_sampled(compare, count):
    points = surface(count)
    neighbors = knn(points, 16).indices
    sample = random_sample(count, count // 4, seed=0).sort().values
    places = torch.full((count,), -1)
    places[sample] = torch.arange(len(sample))

    def ours():
        nearest = nearest_sampled(neighbors, places)
        rest = (nearest < 0).nonzero().squeeze(1)
        nearest[rest] = knn(points[sample], 1, queries=points[rest]).indices[:, 0]
        return nearest

    peers = {
        name: lambda search=search: search(points[sample], points, 1).squeeze(1)
        for name, search in searches().items()
    }
    distances = (points - points[sample][ours()]).square().sum(1)
    assert torch.allclose(distances, knn(points[sample], 1, queries=points).distances[:, 0])
    compare(f"nearest_sampled N={count}", ours=ours, peers=peers)
