"""Memory that the CPU kernels keep: results stay whole, and it goes back when asked for."""

import os
import subprocess
import sys

import pytest
import torch

import avatar_ops
from avatar_ops.linear_act import linear_act

KEPT = """
import resource, torch, avatar_ops
from avatar_ops.linear_act import linear_act
def held():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
x, weight = torch.ones(1, 400_000, 16), torch.ones(32, 16)
linear_act(x[:, :10], weight)
before = held()
linear_act(x, weight)
linear_act(torch.cat([x] * 4, 1), weight)
kept = held() - before
avatar_ops.release_memory()
print(kept, held() - before)
"""


def test_results_are_their_own_memory():
    x, weight = torch.randn(1, 40_000, 8), torch.randn(32, 8)
    first = linear_act(x, weight)
    expected = first.clone()
    second = linear_act(-x, weight)
    assert torch.equal(first, expected)
    assert torch.equal(second, -expected)
    # What takes the place of a result that is gone does not show through a view of another.
    view = second[:, 7:]
    del first, second
    linear_act(x, weight)
    assert torch.equal(view, -expected[:, 7:])


def test_results_are_ordinary_tensors():
    y = linear_act(torch.randn(1, 40_000, 8), torch.randn(32, 8))
    assert y.is_contiguous()
    assert y.data_ptr() % 64 == 0
    assert torch.equal(torch.from_numpy(y.numpy()), y)
    assert torch.equal(y.add_(1) - 1 + 1, y)
    shared = y.clone()
    assert torch.equal(y.share_memory_(), shared)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
def test_what_is_kept_is_bounded_and_goes_back_when_asked_for():
    output = subprocess.run(
        [sys.executable, "-c", KEPT],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ).stdout
    kept, left = map(int, output.split())
    assert kept <= 160 * 2**20
    assert left <= 20 * 2**20


def test_memory_may_be_released_while_results_live():
    y = linear_act(torch.ones(1, 40_000, 8), torch.ones(32, 8))
    avatar_ops.release_memory()
    assert (y == 8).all()
