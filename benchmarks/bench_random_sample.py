"""random_sample against shuffling all points and keeping the first."""

import pytest
import torch

import avatar_ops


@pytest.mark.parametrize(
    ("points", "samples"), [(400_000, 100_000), (1_000_000, 10_000), (65_536, 16_384), (4096, 1024)]
)
def test_random_sample(compare, points, samples):
    compare(
        f"random_sample {samples} of {points}",
        ours=lambda: avatar_ops.random_sample(points, samples, seed=1),
        peers={"torch.randperm": lambda: torch.randperm(points)[:samples]},
        memory=True,
    )
