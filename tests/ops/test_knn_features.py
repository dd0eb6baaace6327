"""knn in feature space, where products of coordinates tell little about distances."""

import pytest
import torch
from test_knn import INF, assert_same

from avatar_ops import knn, reference

# Tells --op whose tests these are.
OP = "knn"


def features_of(kind, count, dims):
    """Clouds in feature space whose distances are exact."""
    generator = torch.Generator().manual_seed(count + dims)

    def integers(*shape, most=3):
        return torch.randint(-most, most + 1, shape, generator=generator).float()

    points = integers(count, dims)
    if kind == "offset":
        # |p|^2 and q.p have no digit in common with the distances.
        points = 1e4 + points / 128
    elif kind == "far clusters":
        # Nor after centring.
        points = points / 128
        points[::2] += 1e4
    elif kind == "duplicates":
        points = points[torch.randint(0, 12, (count,), generator=generator)]
    elif kind == "empty features":
        points[torch.rand(count, generator=generator) < 0.7] = 0
    elif kind == "outliers":
        points[::9] *= 2.0**70
    elif kind == "bad points":
        points[::11, 0] = float("nan")
        points[1::13, -1] = INF
    elif kind == "line":
        points[:, 1:] = 0
        points[:, 0] = torch.arange(count)
    return points


FEATURES = [
    "block",
    "offset",
    "far clusters",
    "duplicates",
    "empty features",
    "outliers",
    "bad points",
    "line",
]


@pytest.mark.parametrize("kind", FEATURES)
@pytest.mark.parametrize(
    ("count", "dims", "k"),
    [
        (1600, 12, 8),
        (400, 64, 1),
        (300, 129, 20),
        (300, 130, 24),
        (620, 100, 25),
        (512, 128, 32),
        (530, 130, 50),
    ],
)
def test_features_equal_brute_force_where_products_tell_little(kind, count, dims, k):
    points = features_of(kind, count, dims)
    for arguments in ({"queries": points[::7] + 1}, {"queries": points[3::9]}):
        assert_same(knn(points, k, **arguments), reference.knn(points, k, **arguments))


@pytest.mark.parametrize("kind", FEATURES)
def test_features_equal_brute_force_among_themselves(kind):
    points = features_of(kind, 300, 129)
    for exclude_self in (False, True):
        assert_same(
            knn(points, 20, exclude_self=exclude_self), reference.knn(points, 20, exclude_self=exclude_self)
        )


@pytest.mark.parametrize(("count", "k"), [(300, 20), (530, 30), (530, 40)])
@pytest.mark.parametrize("among_duplicates", [1, 3, 50])
def test_features_of_some_queries_among_duplicates_equal_brute_force(count, k, among_duplicates):
    points = features_of("block", count, 130)
    points[5:105] = points[0]
    queries = points[105:275] + 1
    queries[:among_duplicates] = points[0]
    assert_same(knn(points, k, queries=queries), reference.knn(points, k, queries=queries))


def test_features_of_ragged_clouds_equal_brute_force():
    points = torch.stack(
        [features_of(kind, 300, 133) for kind in ("block", "duplicates", "outliers", "block")]
    )
    for lengths in ([300, 150, 299, 0], [1, 300, 31, 20]):
        arguments = {"k": 20, "lengths": torch.tensor(lengths)}
        assert_same(knn(points, **arguments), reference.knn(points, **arguments))
        arguments["query_lengths"] = torch.tensor([5, 300, 0, 64])
        assert_same(knn(points, **arguments), reference.knn(points, **arguments))


@pytest.mark.parametrize("kind", ["normal", "clusters"])
@pytest.mark.parametrize("k", [20, 40])
def test_distances_of_features_do_not_depend_on_the_other_points(kind, k):
    points = torch.randn(600, 100)
    if kind == "clusters":
        points = points * 1e-3 + 50 * torch.randn(4, 100)[torch.arange(600) % 4]
    distances, indices = knn(points, k)
    for query in (0, 123, 599):
        alone = knn(points[indices[query]], k, queries=points[query : query + 1])
        assert torch.equal(alone.distances[0], distances[query])
