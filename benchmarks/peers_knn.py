"""Public exact nearest-neighbour searches as calls that build what they need and return (distances, indices)."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

Search = Callable[[], tuple]


def _threads() -> int:
    return torch.get_num_threads()


def _scipy(points: np.ndarray, k: int):
    from scipy.spatial import cKDTree

    return cKDTree(points).query(points, k, workers=_threads())


def _pykdtree(points: np.ndarray, k: int):
    from pykdtree.kdtree import KDTree

    return KDTree(points).query(points, k)


def _nanoflann(points: np.ndarray, k: int):
    from pynanoflann import KDTree

    tree = KDTree(n_neighbors=k, metric="l2")
    tree.fit(points)
    return tree.kneighbors(points, n_jobs=_threads())


def _small_gicp(points: np.ndarray, k: int):
    from small_gicp import KdTree

    wide = points.astype(np.float64)
    indices, distances = KdTree(wide, num_threads=_threads()).batch_knn_search(
        wide, k, num_threads=_threads()
    )
    return distances, indices


def _torch_cluster(points: Tensor, k: int):
    from torch_cluster import knn

    pairs = knn(points, points, k)
    return None, pairs[1].view(-1, k)


def _faiss(points: np.ndarray, k: int):
    import faiss

    faiss.omp_set_num_threads(_threads())
    index = faiss.IndexFlatL2(points.shape[1])
    index.add(points)
    return index.search(points, k)


def _cdist_topk(points: Tensor, k: int):
    return torch.cdist(points, points).topk(k, largest=False)


def _available(peers: dict[str, tuple[str, Search]]) -> dict[str, Search]:
    """Peers whose package is installed."""
    missing = sorted({package for package, _ in peers.values() if find_spec(package) is None})
    if missing:
        print(f"left out, not installed: {', '.join(missing)}")
    return {name: call for name, (package, call) in peers.items() if package not in missing}


def cloud_peers(points: Tensor, k: int) -> dict[str, Search]:
    """Searches for the k nearest of each point of one cloud (N, 3)."""
    array = points.numpy()
    return _available(
        {
            "scipy cKDTree": ("scipy", lambda: _scipy(array, k)),
            "pykdtree": ("pykdtree", lambda: _pykdtree(array, k)),
            "nanoflann": ("pynanoflann", lambda: _nanoflann(array, k)),
            "small_gicp": ("small_gicp", lambda: _small_gicp(array, k)),
            "torch_cluster": ("torch_cluster", lambda: _torch_cluster(points, k)),
        }
    )


def batch_peers(points: Tensor, k: int) -> dict[str, Search]:
    """The same for every cloud of a batch (B, N, 3), one after the other."""
    clouds = [cloud_peers(cloud, k) for cloud in points]
    return {name: lambda name=name: [cloud[name]() for cloud in clouds] for name in clouds[0]}


def feature_peers(points: Tensor, k: int) -> dict[str, Search]:
    """Searches for the k nearest of each point in feature space (N, D)."""
    array = points.numpy()
    return _available(
        {
            "faiss IndexFlatL2": ("faiss", lambda: _faiss(array, k)),
            "cdist + topk": ("torch", lambda: _cdist_topk(points, k)),
        }
    )
