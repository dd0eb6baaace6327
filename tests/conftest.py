import os
import tempfile

import pytest
import torch

from avatar_ops import _native

# Inductor's cache does not know when an op's schema changes, so each run has one of its own.
_inductor_cache = tempfile.TemporaryDirectory(prefix="inductor-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _inductor_cache.name


def pytest_addoption(parser):
    parser.addoption(
        "--isa", action="append", help="run the op tests on this instruction set only (repeatable)"
    )
    parser.addoption("--large", action="store_true", help="also run the tests that need 18 GB of memory")


def pytest_ignore_collect(collection_path, config):
    return True if collection_path.name == "test_large.py" and not config.getoption("large") else None


def pytest_generate_tests(metafunc):
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize(
            "isa", metafunc.config.getoption("isa") or _native.available_isas(), indirect=True
        )


@pytest.fixture
def isa(request):
    """Each instruction set in turn."""
    before = _native.isa()
    _native.set_isa(request.param)
    yield request.param
    _native.set_isa(before)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
