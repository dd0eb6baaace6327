import functools
import sys
from pathlib import Path

import pytest
import torch

import avatar_ops
from avatar_ops import _native

sys.path.insert(0, str(Path(__file__).parent))

import common


@pytest.fixture
def compare(benchmark):
    """common.compare on this test's benchmark."""
    return functools.partial(common.compare, benchmark)


@pytest.fixture(autouse=True)
def _fresh():
    """Random numbers and compiled peers of each case are its own: torch compiles a function a few times only."""
    torch.manual_seed(0)
    torch._dynamo.reset()


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.update(
        torch=torch.__version__,
        avatar_ops=avatar_ops.__version__,
        isa=_native.isa(),
        threads=torch.get_num_threads(),
        copy_gigabytes_per_second=common.copy_bandwidth() / 1e9,
        matmul_gigaflops=common.matmul_rate() / 1e9,
    )
