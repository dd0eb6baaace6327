"""Samples in ascending order, and the nearest point of one by lists of neighbours: schemas, functions, fakes."""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import check_device, check_index, check_rank, check_shape, define

define("nearest_sampled(Tensor neighbors, Tensor places) -> Tensor")
define("sampled_places(Tensor sample, SymInt count) -> (Tensor ascending, Tensor places)")


def sampled_places(sample: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """A sample in ascending order, and where it holds each point.

    Args:
        sample: (M,) int64 (or int32) in [0, count), each at most once.
        count: points that the sample is of.

    Returns:
        ascending: (M,) int64.   places: (count,) int64, -1 for points that are not in the sample.

    Raises:
        TypeError: a dtype.   ValueError: a shape, a point twice (CPU).   IndexError: one out of range (CPU).
    """
    check_index("sample", sample)
    check_shape("sample", sample, (None,), "(M,)")
    return torch.ops.avatar_ops.sampled_places(sample.long(), count)


def nearest_sampled(neighbors: Tensor, places: Tensor) -> Tensor:
    """The first neighbour of each row that a sample holds, without a search.

    Args:
        neighbors: (M, K) int64 (or int32) in [0, N), the nearest first; -1 for none.
        places: (N,) int64 (or int32): where the sample holds a point, or -1.

    Returns:
        (M,) int64: the place in the sample, -1 where it holds no neighbour of the row.

    Raises:
        TypeError: a dtype.   ValueError: a shape or device.   IndexError: a neighbour outside [-1, N) that
        comes before the first in the sample (CPU).

    Reference: reference.nearest_sampled.
    """
    check_index("neighbors", neighbors)
    check_rank("neighbors", neighbors, (2,), "(M, K)")
    check_index("places", places)
    check_shape("places", places, (None,), "(N,)")
    check_device("places", places, neighbors)
    return torch.ops.avatar_ops.nearest_sampled(neighbors.long(), places.long())


@torch.library.register_fake("avatar_ops::nearest_sampled")
def _(neighbors, places):
    return neighbors.new_empty(neighbors.shape[0])


def _nearest_sampled_cuda(neighbors, places):
    # A last slot for neighbours and rows that have none.
    held = torch.cat([places, places.new_full((1,), -1)])[neighbors]
    held = torch.cat([held, held.new_full((len(held), 1), -1)], 1)
    first = (held >= 0).int().argmax(1, keepdim=True)
    return held.gather(1, first).squeeze(1).clamp(min=-1)


torch.library.impl("avatar_ops::nearest_sampled", "CUDA", _nearest_sampled_cuda)


@torch.library.register_fake("avatar_ops::sampled_places")
def _(sample, count):
    return torch.empty_like(sample), sample.new_empty(count)


def _sampled_places_cuda(sample, count):
    ascending = sample.sort().values
    places = torch.full((count,), -1, dtype=sample.dtype, device=sample.device)
    return ascending, places.index_copy_(0, ascending, torch.arange(len(sample), device=sample.device))


torch.library.impl("avatar_ops::sampled_places", "CUDA", _sampled_places_cuda)
