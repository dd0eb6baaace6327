import os
import tempfile
from pathlib import Path

import pytest
import torch

from avatar_ops import _native
from avatar_ops._library import TRITON_KERNELS
from avatar_ops.knn import arrange_by_build

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
    parser.addoption(
        "--triton",
        metavar="LOG",
        help="run the op tests on Triton kernels in triton's interpreter, naming in LOG those that ran",
    )
    parser.addoption("--op", action="append", help="of the op tests, run those of this op only (repeatable)")
    parser.addoption(
        "--every-triton-shape",
        action="store_true",
        help="compile Triton kernels for every shape and architecture",
    )
    parser.addoption("--device", default="cpu", help="run the contract of the ops on this device")
    parser.addoption("--large", action="store_true", help="also run the tests that need 18 GB of memory")


def pytest_configure(config):
    # In this process the library takes the place of the CPU kernels, for good.
    if library := config.getoption("hostcuda"):
        torch.ops.load_library(library)
        # Its searches take indices of its own kind only.
        torch.library.impl("avatar_ops::knn_arrange", "CPU", arrange_by_build)
    if log := config.getoption("triton"):
        interpret_triton_kernels(Path(log))


def interpret_triton_kernels(log: Path):
    """Puts Triton launchers in the place of CPU kernels, for good, and logs the kernels that they start."""
    # Read when triton is imported, and again where a kernel is decorated.
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime import interpreter

    started = set()
    call = interpreter.GridExecutor.__call__

    def logged_call(self, *args, **kwargs):
        name = f"{self.fn.__module__}.{self.fn.__name__}"
        if name not in started:
            started.add(name)
            with log.open("a") as file:
                file.write(name + "\n")
        return call(self, *args, **kwargs)

    # Every call of a device function would look through triton.language again, for most of the time.
    prepared = set()

    def device_call(self, *args, **kwargs):
        if id(self.fn.__globals__) not in prepared:
            prepared.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    # The interpreter holds bfloat16 as integers, and would multiply those.
    create_dot = interpreter.InterpreterBuilder.create_dot

    def create_dot_of_floats(self, a, b, *args):
        wide = [self.cast_impl(t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b)]
        return create_dot(self, *wide, *args)

    interpreter.GridExecutor.__call__ = logged_call
    interpreter.InterpretedFunction.__call__ = device_call
    # As `launch` asks for on a GPU.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(
        debug=True, sanitize_overflow=False
    )
    interpreter.InterpreterBuilder.create_dot = create_dot_of_floats
    # The interpreter takes its time by the operation, however many numbers it is on.
    from avatar_ops.triton import _edge_layers, _position, edge_mlp, modulated_conv2d

    modulated_conv2d.FILTERED_PIXELS = 256
    for table in (_position.EDGES, _position.WEIGHT_GRADIENT_EDGES, _edge_layers.EDGES):
        for edges in table.values():
            edges.update(dict.fromkeys(edges, 1024))
    edge_mlp.INCOMING["ROWS"] = 256
    # So that the backward pass has several rounds.
    _edge_layers.LEAST_WORKSPACE = 0
    # So that a slice, and a program, has several tiles of what tests are made of.
    _position.LEAST_SLICES = _position.MOST_PROGRAMS = 2
    for name, launcher in TRITON_KERNELS.items():

        def run(*args, name=name, launcher=launcher):
            try:
                return launcher(*args)
            except interpreter.InterpreterError as error:
                # Where a device assertion traps on a GPU, the contract on the CPU wants the first bad place.
                if "neighbors: an index" not in str(error):
                    raise
                raise first_bad_neighbor(name, args) from error

        torch.library.impl(f"avatar_ops::{name}", "CPU", run)


def first_bad_neighbor(op: str, args) -> IndexError:
    neighbors = next(t for t in args if isinstance(t, torch.Tensor) and t.dtype == torch.int64)
    bad = ((neighbors < -1) | (neighbors >= args[0].shape[1])).nonzero()[0].tolist()
    return IndexError(f"{op}: neighbors{bad} = {neighbors[tuple(bad)]}")


def pytest_collection_modifyitems(config, items):
    ops = config.getoption("op")
    if not ops:
        return

    def is_of(item):
        case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
        return (
            case.op in ops
            if case
            else getattr(item.module, "OP", item.path.stem.removeprefix("test_")) in ops
        )

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


@pytest.fixture
def scaled(pytestconfig):
    """scaled(count, fewer) is `count`, or `fewer` where kernels for GPUs run on the host, thread by thread."""
    on_host = pytestconfig.getoption("hostcuda") or pytestconfig.getoption("triton")
    return lambda count, fewer: fewer if on_host else count


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
