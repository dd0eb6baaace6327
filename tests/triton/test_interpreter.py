"""The op tests on Triton kernels, on a machine without a GPU: in triton's interpreter, in a fresh process."""

import functools
import importlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="comes with torch's CUDA builds")

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "avatar_ops" / "triton").glob("*.py"))
OPS = [path.stem for path in SOURCES if not path.stem.startswith("_")]
# Left out: torch's compilers around the op, and tests of the CPU kernels' use of memory.
SELECTION = "not compile and not export and not forms_no_tensor_over_edges and not in_rounds"
# Every case runs in float64, where gradients are compared with the reference's. These kernels differ in other dtypes
# by a conversion only, and in these tests by what their launchers do before.
ATTENTION = (
    "not gradcheck and not ((float32 or float16 or bfloat16) and not (two-layers or far-from-origin))"
    " and not ((noncontiguous or modifies_nothing) and not two-layers)"
    # On the CPU, torch's products per point may depend on it.
    " and not same_bits_for_any_thread_count"
    # How the CPU's kernels share products among near points.
    " and not test_tiles_"
)
# Images large enough for the form that the CPU has of its own say nothing about these kernels.
CONVOLUTION = "not plain-tiles and not winograd and not plain-40"
# What else a module's kernels run, and the op that has them where that is inside another.
RELATED = {"edge_mlp": ["edge_mlp_statistics"]}
INNER = {"edge_mlp": "edge_layers"}
SELECTIONS = {
    "local_attention_pool": ATTENTION,
    "edge_moments": ATTENTION,
    "modulated_conv2d": CONVOLUTION,
}


def source_of(op: str) -> Path:
    return ROOT / "avatar_ops" / "triton" / f"{op}.py"


def kernels_of(path: Path) -> set[str]:
    """Names of the kernels in a module: what is launched, and what is named so; device functions are not."""
    text = path.read_text()
    named = re.findall(r"^@triton\.jit.*\ndef (\w+_kernel)\(", text, re.MULTILINE)
    return {*named, *re.findall(r"^ +launch\(\s*(\w+)", text, re.MULTILINE)}


@functools.cache
def run_op_tests(op: str) -> tuple[subprocess.CompletedProcess, set[str]]:
    """The op's tests in the interpreter, and the kernels that they started."""
    selection = " and ".join(filter(None, (SELECTION, SELECTIONS.get(op))))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "kernels")
        log.touch()
        command = [sys.executable, "-m", "pytest", "tests/ops", "--isa", "baseline", f"--triton={log}"]
        command += [f"--op={name}" for name in (op, *RELATED.get(op, []))]
        done = subprocess.run([*command, "-k", selection], cwd=ROOT, capture_output=True, text=True)
        return done, {name.rpartition(".")[2] for name in log.read_text().split()}


@pytest.mark.parametrize("op", OPS)
def test_op_tests_pass_in_the_interpreter(op):
    done, _ = run_op_tests(op)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.mark.parametrize("path", [path for path in SOURCES if kernels_of(path)], ids=lambda path: path.stem)
def test_op_tests_start_every_kernel_of_a_file(path):
    ops = [op for op in OPS if op == path.stem or f"from .{path.stem} import" in source_of(op).read_text()]
    started = set().union(*(run_op_tests(op)[1] for op in ops))
    assert kernels_of(path) <= started, f"never started: {sorted(kernels_of(path) - started)}"


@pytest.mark.parametrize("op", OPS)
def test_every_file_of_an_op_has_kernels(op):
    assert kernels_of(source_of(op))


def test_importing_avatar_ops_imports_no_triton_kernel():
    """A stand-in that fails on import takes triton's place."""
    program = (
        "import sys; sys.modules['triton'] = None; import avatar_ops;"
        "assert not any(name.startswith('avatar_ops.triton.') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env={**os.environ}, check=True)


@pytest.mark.parametrize("op", OPS)
def test_kernels_run_where_there_is_a_gpu(op):
    """Every module of avatar_ops/triton is registered under its name, or that of the op that does its work."""
    from avatar_ops._library import TRITON_KERNELS

    name = INNER.get(op, op)
    assert name in TRITON_KERNELS
    assert hasattr(importlib.import_module(f"avatar_ops.triton.{op}"), name)
