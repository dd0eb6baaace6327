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
    parser.addoption(
        "--hostcuda",
        metavar="LIBRARY",
        help="run the op tests on CUDA kernels that were compiled for the host",
    )
    parser.addoption(
        "--hostcuda-variant",
        action="append",
        help="plain (default), sanitize, race or ucontext: builds of csrc/hostcuda to test (repeatable)",
    )
    parser.addoption("--op", action="append", help="of the op tests, run those of this op only (repeatable)")
    parser.addoption("--large", action="store_true", help="also run the tests that need 18 GB of memory")


def pytest_configure(config):
    # In this process the library takes the place of the CPU kernels, for good.
    if library := config.getoption("hostcuda"):
        torch.ops.load_library(library)


def pytest_collection_modifyitems(config, items):
    ops = config.getoption("op")
    if not ops:
        return

    def is_of(item):
        case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
        return case.op in ops if case else item.path.stem.removeprefix("test_") in ops

    config.hook.pytest_deselected(items=[item for item in items if not is_of(item)])
    items[:] = [item for item in items if is_of(item)]


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
