"""The op tests on Triton kernels, on a machine without a GPU: in triton's interpreter, in a fresh process."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="comes with torch's CUDA builds")

ROOT = Path(__file__).resolve().parents[2]
MODULES = {path.stem: path for path in sorted((ROOT / "avatar_ops" / "triton").glob("[!_]*.py"))}
# What these leave out is torch's own compilers around the op, and tests of the CPU kernels' use of memory.
SELECTION = "not inductor and not export and not forms_no_tensor_over_edges and not in_rounds"


def kernels_of(path: Path) -> set[str]:
    """Names of the kernels in a module, which end in _kernel; what they call does not."""
    return set(re.findall(r"^@triton\.jit.*\ndef (\w+_kernel)\(", path.read_text(), re.MULTILINE))


@pytest.mark.parametrize("op", MODULES)
def test_op_tests_pass_in_the_interpreter_and_start_every_kernel(op, tmp_path):
    log = tmp_path / "kernels"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/ops",
        "--isa",
        "baseline",
        f"--triton={log}",
        f"--op={op}",
    ]
    done = subprocess.run([*command, "-k", SELECTION], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    started = {name.rpartition(".")[2] for name in log.read_text().split()}
    kernels = kernels_of(MODULES[op])
    assert kernels
    assert kernels <= started, f"never started: {sorted(kernels - started)}"


def test_importing_avatar_ops_imports_no_triton_kernel():
    """A stand-in that fails on import takes triton's place."""
    program = (
        "import sys; sys.modules['triton'] = None; import avatar_ops;"
        "assert not any(name.startswith('avatar_ops.triton.') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env={**os.environ}, check=True)


@pytest.mark.parametrize("op", MODULES)
def test_kernels_run_where_there_is_a_gpu(op):
    """Every module of avatar_ops/triton is registered under its name."""
    from avatar_ops._library import TRITON_KERNELS

    assert op in TRITON_KERNELS
    assert importlib.util.find_spec(f"avatar_ops.triton.{op}") is not None
