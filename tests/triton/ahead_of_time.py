"""Compiling Triton kernels for GPUs that are not at hand: what a launcher would start, and what ptxas says."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
}
# Bytes of shared memory that a block may have, by compute capability.
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# wgmma (HGMMA), tcgen05 (UTCHMMA ...) and mma.sync (HMMA, DMMA), as SASS calls them.
MATRIX_INSTRUCTION = re.compile(r"\b(HGMMA|UTC\w*MMA|HMMA|DMMA)\b")


@dataclass(frozen=True)
class Launch:
    """A kernel with the arguments and options of one launch."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: tuple
    options: dict

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


@dataclass(frozen=True)
class Compiled:
    registers: int
    shared_bytes: int
    local_accesses: int
    matrix_instructions: frozenset[str]


def launches(call) -> list[Launch]:
    """What `call` would launch. Tensors that it makes have no data."""
    started = []

    def run(self, *arguments, grid, warmup, **options):
        started.append(Launch(self, grid, arguments, options))

    with pytest.MonkeyPatch.context() as patch, FakeTensorMode():
        patch.setattr(JITFunction, "run", run)
        call()
    return started


def specialize(launch: Launch) -> tuple[ASTSource, dict]:
    """The source that triton would compile for a launch, with pointers aligned as torch aligns them."""
    names = launch.kernel.arg_names
    constants = {p.name: launch.options[p.name] for p in launch.kernel.params if p.is_constexpr}
    signature = dict.fromkeys(names, "constexpr")
    attributes = {}
    for place, (name, value) in enumerate(zip(names, launch.arguments, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            aligned = True
        elif value is None or value == 1:
            constants[name] = value
            continue
        elif isinstance(value, float):
            signature[name], aligned = "fp32", False
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            aligned = value % 16 == 0
        if aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    options = {name: value for name, value in launch.options.items() if name not in names}
    return ASTSource(launch.kernel, signature, constants, attributes), options


def compile_for(launch: Launch, capability: int) -> Compiled:
    """Compiles a launch's kernel for a compute capability (80, 90, 100)."""
    source, options = specialize(launch)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.check_output([TOOLS / "cuobjdump", option, file.name], text=True)
            for option in ("-res-usage", "-sass")
        )
    return Compiled(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        shared_bytes=compiled.metadata.shared,
        local_accesses=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        matrix_instructions=frozenset(MATRIX_INSTRUCTION.findall(code)),
    )
