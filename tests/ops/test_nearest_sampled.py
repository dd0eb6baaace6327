"""What is special to nearest_sampled: it answers as a search among the sample would."""

import pytest
import torch

import avatar_ops
from avatar_ops.nearest_sampled import nearest_sampled, sampled_places


@pytest.mark.parametrize("k", [4, 16])
def test_nearest_sampled_is_the_nearest_by_search(k, isa):
    points = torch.rand(3000, 3, generator=torch.Generator().manual_seed(0))
    # Equal points, whose order is that of their indices.
    points[1000:1200] = points[:200]
    sample = avatar_ops.random_sample(3000, 750, seed=5).sort().values
    places = torch.full((3000,), -1)
    places[sample] = torch.arange(750)
    nearest = nearest_sampled(avatar_ops.knn(points, k).indices, places)
    expected = avatar_ops.knn(points[sample], 1, queries=points).indices[:, 0]
    found = nearest >= 0
    assert torch.equal(nearest[found], expected[found])
    assert found.double().mean() > 1 - 1.5 * 0.75**k


def test_nearest_sampled_reads_no_further_than_it_has_to():
    neighbors = torch.tensor([[0, 1, 99]])
    assert nearest_sampled(neighbors, torch.tensor([-1, 0])).item() == 0
    with pytest.raises(IndexError, match=r"neighbors\[0, 2\] = 99"):
        nearest_sampled(neighbors, torch.tensor([-1, -1]))


@pytest.mark.parametrize(("size", "count"), [(0, 0), (0, 3), (1, 1), (7, 40), (40, 40), (1000, 4001)])
def test_sampled_places_sort_a_sample_and_tell_where_points_are(size, count):
    sample = torch.randperm(count)[:size]
    for dtype in (torch.int64, torch.int32):
        ascending, places = sampled_places(sample.to(dtype), count)
        assert torch.equal(ascending, sample.sort().values)
        assert places.shape == (count,)
        assert torch.equal(places[ascending], torch.arange(size))
        assert (places < 0).sum() == count - size


def test_sampled_places_pass_opcheck_and_reject():
    torch.library.opcheck(torch.ops.avatar_ops.sampled_places.default, (torch.tensor([4, 0, 2]), 6))
    with pytest.raises(IndexError, match=r"sample\[1\] = 6; expected an index in \[0, 6\)"):
        sampled_places(torch.tensor([0, 6]), 6)
    with pytest.raises(ValueError, match="sample: got a point twice"):
        sampled_places(torch.tensor([3, 3]), 6)
    with pytest.raises(ValueError, match="sample: got shape"):
        sampled_places(torch.zeros(1, 1, dtype=torch.int64), 6)
    with pytest.raises(TypeError, match="sample"):
        sampled_places(torch.zeros(1), 6)
