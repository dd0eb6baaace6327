"""knn against public exact searches, index build included."""

import peers_knn
import pytest
import torch

import avatar_ops


def surface(count):
    """Points on a wavy sphere, as scanned surfaces are."""
    direction = torch.nn.functional.normalize(torch.randn(count, 3))
    return direction * (1 + 0.2 * torch.sin(5 * direction[:, :1]))


def clustered(count):
    """Blobs of very different density."""
    centers, spread = 5 * torch.randn(50, 3), 0.3 * torch.rand(50, 1)
    blob = torch.randint(50, (count,))
    return centers[blob] + spread[blob] * torch.randn(count, 3)


# Time against N: every search up to EVERY_PEER points, the fastest up to FASTEST_PEERS, the kernel to the end.
SCALING = (1_000, 4_000, 10_000, 40_000, 100_000, 400_000, 1_000_000, 4_000_000)
EVERY_PEER, FASTEST_PEERS = 400_000, 1_000_000
FASTEST = ("small_gicp", "nanoflann")


@pytest.mark.parametrize("make", [surface, clustered], ids=lambda make: make.__name__)
@pytest.mark.parametrize("count", SCALING)
def test_knn_cloud(compare, make, count):
    points = make(count)
    peers = peers_knn.cloud_peers(points, 16)
    if count > EVERY_PEER:
        peers = {name: peers[name] for name in FASTEST if name in peers and count <= FASTEST_PEERS}
    compare(
        f"knn D=3 K=16 N={count} {make.__name__}",
        ours=lambda: avatar_ops.knn(points, 16),
        peers=peers,
        memory=True,
    )


def test_knn_batch_of_small_clouds(compare):
    points = torch.stack([surface(1024) for _ in range(64)])
    compare(
        "knn D=3 K=20 64 x 1024",
        ours=lambda: avatar_ops.knn(points, 20),
        peers=peers_knn.batch_peers(points, 20),
        memory=True,
    )


@pytest.mark.parametrize("dims", [16, 64, 256])
def test_knn_features(compare, dims):
    points = torch.randn(8192, dims)
    compare(
        f"knn D={dims} K=20 N=8192",
        ours=lambda: avatar_ops.knn(points, 20),
        peers=peers_knn.feature_peers(points, 20),
        memory=True,
    )


def test_knn_kept_index(compare):
    points = surface(100_000)
    index = avatar_ops.PointIndex(points)
    queries = points[::4].contiguous()
    compare(
        "PointIndex.knn D=3 K=16 N=100000 M=25000",
        ours=lambda: index.knn(16, queries=queries),
        peers={"knn": lambda: avatar_ops.knn(points, 16, queries=queries)},
    )


@pytest.mark.parametrize("count", [10_000, 100_000, 1_000_000])
def test_knn_graph(compare, count):
    x, batch = surface(count), torch.arange(count).div(count / 10, rounding_mode="floor").long()
    compare(
        f"knn_graph D=3 K=16 N={count}, 10 clouds",
        ours=lambda: avatar_ops.knn_graph(x, 16, batch),
        peers={"knn": lambda: avatar_ops.knn(x, 16)},
        memory=True,
    )
