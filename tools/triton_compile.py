"""Triton kernels compiled for GPUs that are not at hand: what a launcher would start, and what ptxas makes of it.

started = []
JITFunction.run = recorder(started)      launches are recorded instead of run
...                                      call launchers, on tensors of the CPU or without data
compile_launch(started[0], 90)           -> Compiled
describe(started[0], (80, 90, 100), {})  -> the same as plain numbers, for a report
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton
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
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# wgmma (HGMMA), tcgen05 (UTCHMMA ...) and mma.sync (HMMA, DMMA), as SASS calls them.
MATRIX_INSTRUCTION = re.compile(r"\b(HGMMA|UTC\w*MMA|HMMA|DMMA)\b")
LOCAL_ACCESS = re.compile(r"\b(?:LDL|STL)\b")
WIDE_ACCESS = re.compile(r"\b(?:LDG|STG|LDS|STS|LD|ST|LDGSTS)\.(?:\w+\.)*128\b|\bUBLKCP\b|\bUTMA\w*")


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
    stack_bytes: int  # a thread's local memory
    local_accesses: int
    wide_accesses: int  # of 128 bits, to global or shared memory
    matrix_instructions: Counter
    threads: int
    sass: str = field(repr=False)


def recorder(started: list[Launch]) -> Callable:
    """What to put in the place of JITFunction.run: notes a launch in `started` and does nothing."""

    def run(self, *arguments, grid, warmup, **options):
        started.append(Launch(self, grid, arguments, options))

    return run


def specialize(launch: Launch) -> tuple[ASTSource, dict]:
    """The source that triton would compile for a launch, with pointers aligned as torch aligns them."""
    parameters = launch.kernel.params
    names = [p.name for p in parameters]
    constants = {p.name: launch.options[p.name] for p in parameters if p.is_constexpr}
    signature = dict.fromkeys(names, "constexpr")
    attributes = {}
    for place, (parameter, value) in enumerate(zip(parameters, launch.arguments, strict=False)):
        name, aligned = parameter.name, False
        if isinstance(value, torch.Tensor):
            signature[name], aligned = "*" + TYPES[value.dtype], True
        elif value is None or (value == 1 and isinstance(value, int) and not parameter.do_not_specialize):
            constants[name] = value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            aligned = value % 16 == 0 and not parameter.do_not_specialize
        if aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    options = {name: value for name, value in launch.options.items() if name not in names}
    return ASTSource(launch.kernel, signature, constants, attributes), options


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compiles a launch's kernel for a compute capability (80, 90, 100)."""
    source, options = specialize(launch)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.check_output(
                [TOOLS / "cuobjdump", option, file.name], text=True, stderr=subprocess.DEVNULL
            )
            for option in ("-res-usage", "-sass")
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return Compiled(
        registers=int(registers),
        shared_bytes=compiled.metadata.shared,
        stack_bytes=int(stack),
        local_accesses=len(LOCAL_ACCESS.findall(code)),
        wide_accesses=len(WIDE_ACCESS.findall(code)),
        matrix_instructions=Counter(MATRIX_INSTRUCTION.findall(code)),
        threads=32 * compiled.metadata.num_warps,
        sass=code,
    )


def same_code(launch: Launch) -> tuple:
    """Equal for launches that triton compiles to the same code."""
    source, options = specialize(launch)
    constants = sorted((str(name), str(value)) for name, value in source.constants.items())
    return (
        launch.kernel.fn.__module__,
        launch.name,
        tuple(source.signature.items()),
        tuple(constants),
        tuple(sorted(source.attrs)),
        tuple(sorted((name, str(value)) for name, value in options.items())),
    )


def describe(launch: Launch, capabilities: tuple[int, ...], compiled: dict) -> dict:
    """A launch and what it takes on each architecture; `compiled` keeps what was compiled before."""
    usage = {}
    for capability in capabilities:
        key = (capability, *same_code(launch))
        if key not in compiled:
            compiled[key] = compile_launch(launch, capability)
        kernel = compiled[key]
        usage[str(capability)] = {
            "registers": kernel.registers,
            "shared_bytes": kernel.shared_bytes,
            "stack_bytes": kernel.stack_bytes,
            "local_accesses": kernel.local_accesses,
            "wide_accesses": kernel.wide_accesses,
            "matrix_instructions": kernel.matrix_instructions.total(),
        }
    grid = [int(size) for size in launch.grid]
    return {
        "language": "Triton",
        "kernel": launch.name,
        "grid": grid + [1] * (3 - len(grid)),
        "block": [kernel.threads, 1, 1],
        "dynamic_bytes": 0,
        "constants": {p.name: str(launch.options[p.name]) for p in launch.kernel.params if p.is_constexpr},
        "usage": usage,
    }
