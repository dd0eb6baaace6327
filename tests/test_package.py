"""Importing, introspection and the choice of instruction set, each in a fresh process."""

import os
import subprocess
import sys

import pytest
import torch

from avatar_ops import _native


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_import_compiles_nothing_and_leaves_cuda_alone():
    code = """
import sys, avatar_ops, torch
print(torch.cuda.is_initialized(), "torch.utils.cpp_extension" in sys.modules)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "False"]


def test_import_survives_a_fork_of_a_used_process():
    code = """
import os, torch, avatar_ops
avatar_ops.edge_max(torch.randn(50, 4), torch.randint(50, (50, 3)))
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    avatar_ops.edge_max(torch.randn(50, 4), torch.randint(50, (50, 3)))
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert python(code).stdout.strip() == "7"


@pytest.mark.parametrize("name", _native.available_isas())
def test_environment_selects_the_instruction_set(name):
    done = python("import avatar_ops; print(avatar_ops._native.isa())", AVATAR_OPS_ISA=name)
    assert done.stdout.strip() == name


def test_unknown_instruction_set_is_a_clear_error():
    done = python("import avatar_ops", AVATAR_OPS_ISA="sse9")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("ValueError: AVATAR_OPS_ISA: ")
    assert "'sse9'" in done.stderr
    assert "baseline" in done.stderr


def test_report_names_build_devices_and_the_kernel_of_every_op():
    done = subprocess.run([sys.executable, "-m", "avatar_ops"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in (
        "avatar_ops",
        "torch",
        "instruction set",
        "CUDA kernels",
        "devices",
        f"C++ ({_native.isa()})",
    ):
        assert word in done.stdout
    ops = {line.split()[0] for line in done.stdout.splitlines() if "C++ (" in line or "torch ops" in line}
    assert "edge_max" in ops


def test_cuda_kernels_are_registered_exactly_where_they_were_built():
    code = """
import torch, avatar_ops
print(torch._C._dispatch_has_kernel_for_dispatch_key("avatar_ops::bias_act", "CUDA"))
"""
    built = bool(_native.cuda_architectures) and torch.version.cuda is not None
    assert python(code, CUDA_VISIBLE_DEVICES="").stdout.strip() == str(built)
