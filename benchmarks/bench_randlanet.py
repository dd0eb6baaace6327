"""RandLA-Net with its search, and its dilated residual block in training, against plain PyTorch."""

import os
import subprocess
import sys

import peers_randlanet
import pytest
import torch
from bench_knn import surface
from bench_local_attention_pool import scan

from avatar.config import PointFeaturesConfig
from avatar.models.point_features import RandLANet, build_pyramid
from avatar_ops import knn
from avatar_ops.nn import LocalFeatureAggregation

# The graph of the EdgeConv layers, which are not measured, is that of the few points of the last level.
CONFIG = PointFeaturesConfig(gcn_level=4)


def stock(classes=19) -> RandLANet:
    return RandLANet(3, classes=classes).eval()


def check_peers(network, peer):
    """The same scores for a small cloud, up to the rounding of float32."""
    points = surface(3000)
    pyramid = build_pyramid(points, CONFIG, 0)
    expected = network(points.unsqueeze(0), points.unsqueeze(0), pyramid)[0, pyramid.order]
    points = points[pyramid.order]
    for search in peers_randlanet.searches().values():
        edges = peers_randlanet.graphs(points, pyramid.samples, CONFIG.randla_neighbors, search)
        actual = peer(points, points, pyramid.samples, *edges)
        assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("count", [65_536, 400_000])
def test_randlanet_inference(compare, count):
    network = stock()
    peer = peers_randlanet.RandLANet(network)
    check_peers(network, peer)
    points = surface(count)
    cloud = points.unsqueeze(0)

    def by_peer(forward, search):
        samples = peers_randlanet.draw(count, CONFIG.randla_ratios())
        edges = peers_randlanet.graphs(points, samples, CONFIG.randla_neighbors, search)
        return forward(points, points, samples, *edges)

    searches = peers_randlanet.searches()
    forwards = {"PyTorch": peer, "torch.compile": torch.compile(peer)}
    if count > 100_000:
        # The slower ones would take minutes.
        del forwards["PyTorch"]
        searches = dict(list(searches.items())[:1])
    compare(
        f"RandLANet N={count}",
        ours=lambda: network(cloud, cloud, build_pyramid(points, CONFIG, 0)),
        peers={
            f"{name}, {near}": lambda forward=forward, search=search: by_peer(forward, search)
            for name, forward in forwards.items()
            for near, search in searches.items()
        },
        memory=count < 100_000,
    )


@pytest.mark.parametrize(("count", "inputs", "outputs"), [(65_536, 8, 32), (16_384, 32, 128)])
def test_block_training(compare, count, inputs, outputs):
    """Batch statistics over all edges, forward and backward."""
    block = LocalFeatureAggregation(inputs, outputs)
    literal = peers_randlanet.Block(block)
    points, features = scan(count), torch.randn(count, inputs)
    neighbors = knn(points, 16).indices
    leaves = list(block.parameters())

    def step(function):
        return torch.autograd.grad(function(points, features, neighbors).square().mean(), leaves)

    def rows(function):
        return function(points[:600], features[:600], neighbors[:600].clamp(max=599))

    torch.testing.assert_close(rows(block), rows(literal), rtol=1e-3, atol=1e-3)
    compiled = torch.compile(literal)
    compare(
        f"LocalFeatureAggregation training N={count} {inputs} to {outputs}",
        ours=lambda: step(block),
        peers={
            "literal PyTorch": lambda: step(literal),
            "torch.compile": lambda: step(compiled),
        },
        memory=True,
    )


MILLION = """
import resource, torch
from bench_randlanet import CONFIG, stock, surface
from avatar.models.point_features import build_pyramid
torch.manual_seed(0)
with torch.no_grad():
    network, points = stock(), surface(1_000_000)
    small = surface(1000)
    network(small[None], small[None], build_pyramid(small, CONFIG, 0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    network(points[None], points[None], build_pyramid(points, CONFIG, 0))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_randlanet_of_a_million_points(benchmark):
    """Peak memory beyond what the process held before, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", MILLION]
    peak = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)
    assert peak < 4e9
    benchmark.extra_info.update(name="RandLANet N=1000000", peak_extra_bytes={"ours": peak})
    network, points = stock(), surface(1_000_000)
    cloud = points.unsqueeze(0)
    with torch.no_grad():
        benchmark.pedantic(lambda: network(cloud, cloud, build_pyramid(points, CONFIG, 0)), rounds=1)
