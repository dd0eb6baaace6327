"""What compilers and launches say about every GPU kernel, without a GPU.

    python tools/kernel_report.py                    print the tables
    python tools/kernel_report.py --out docs/kernels   and write docs/kernels.json and docs/kernels.md

For each call of benchmarks/calls.py: the bytes it has to move, its operations, and the time that the rates of
a GPU's data sheet allow at best (the roofline); then its launches, and for each architecture the registers,
shared memory and local memory of the kernel and how many of a multiprocessor's warps they leave room for.
CUDA kernels come from avatar_ops/libavatar_ops_cuda.so and launch in the host build of csrc/hostcuda, which
records a launch instead of running it; Triton kernels are compiled for what their launchers ask for.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import hostcuda

ROOT = hostcuda.ROOT
sys.path.insert(0, str(ROOT / "benchmarks"))
from rooflines import GPUS  # noqa: E402

LIBRARY = ROOT / "avatar_ops" / "libavatar_ops_cuda.so"
CAPABILITIES = (80, 90, 100)


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on one architecture, and the instructions that tell how it works."""

    registers: int
    shared_bytes: int  # without what the launch asks for
    stack_bytes: int  # a thread's local memory: arrays that are not in registers, and spilled registers
    local_accesses: int
    wide_accesses: int  # of 128 bits, to global or shared memory
    matrix_instructions: int


LOCAL_ACCESS = re.compile(r"\b(?:LDL|STL)\b")
WIDE_ACCESS = re.compile(r"\b(?:LDG|STG|LDS|STS|LD|ST|LDGSTS)\.(?:\w+\.)*128\b|\bUBLKCP\b|\bUTMA\w*")
MATRIX_INSTRUCTION = re.compile(r"\b(?:HGMMA|UTC\w*MMA|HMMA|DMMA|IMMA)\b")


def cuobjdump() -> Path:
    """Comes with triton, which torch's CUDA builds depend on."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def demangled(symbols: list[str]) -> list[str]:
    text = subprocess.run(
        ["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True
    ).stdout
    return [plain_name(line) for line in text.splitlines()]


def plain_name(symbol: str) -> str:
    """The name and template arguments of a kernel without namespaces, parameters and casts of numbers."""
    depth = 0
    for end, character in enumerate(symbol):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0 and not symbol.startswith("(anonymous namespace)", end):
            symbol = symbol[:end]
            break
    symbol = re.sub(r"^void ", "", symbol)
    symbol = re.sub(r"\((?:int|long|unsigned int|bool)\)", "", symbol)
    return re.sub(r"(?:\w+|\(anonymous namespace\))::", "", symbol)


def library_usage(library: Path = LIBRARY) -> dict[int, dict[str, Usage]]:
    """Architecture -> kernel -> usage, of a library that nvcc built."""
    text = subprocess.check_output([cuobjdump(), "-res-usage", library], text=True)
    code = code_counts(library)
    usages: dict[int, dict[str, Usage]] = {}
    capability, rows = 0, []
    for line in text.splitlines():
        if match := re.search(r"^arch = sm_(\d+)", line):
            capability = int(match[1])
        elif match := re.search(r"Function (\S+):", line):
            symbol = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            rows.append((capability, symbol, *map(int, match.groups())))
    names = demangled([row[1] for row in rows])
    for (capability, symbol, registers, stack, shared, _), name in zip(rows, names, strict=True):
        counts = code[capability, symbol]
        # From sm_90 on, the kilobyte that the system takes of each block is counted in where there is any.
        shared -= 1024 if capability >= 90 and shared >= 1024 else 0
        usages.setdefault(capability, {})[name] = Usage(registers, shared, stack, *counts)
    return usages


def code_counts(library: Path) -> dict[tuple[int, str], tuple[int, int, int]]:
    """(architecture, symbol) -> local accesses, 128-bit accesses, matrix instructions."""
    counts: dict[tuple[int, str], list[int]] = {}
    capability, current = 0, [0, 0, 0]
    with subprocess.Popen([cuobjdump(), "-sass", library], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if match := re.search(r"^arch = sm_(\d+)|^\tcode for sm_(\d+)", line):
                capability = int(match[1] or match[2])
            elif match := re.search(r"Function : (\S+)", line):
                current = counts.setdefault((capability, match[1]), [0, 0, 0])
            else:
                for place, pattern in enumerate((LOCAL_ACCESS, WIDE_ACCESS, MATRIX_INSTRUCTION)):
                    current[place] += bool(pattern.search(line))
    if process.returncode:
        raise RuntimeError(f"cuobjdump -sass {library}: exit status {process.returncode}")
    return {key: tuple(value) for key, value in counts.items()}


def occupancy(usage: Usage, threads: int, dynamic_bytes: int, capability: int) -> float:
    """The share of a multiprocessor's warps that may be resident (CUDA C++ Programming Guide, section 16.2)."""
    shared_per_multiprocessor, most_warps, most_blocks = {
        80: (164 << 10, 64, 32),
        90: (228 << 10, 64, 32),
        100: (228 << 10, 64, 32),
    }[capability]
    warps = -(-threads // 32)
    per_warp = -(-usage.registers * 32 // 256) * 256
    by_registers = 65536 // per_warp // 4 * 4 // warps
    # Each block also has 1 KiB of the system's own; in units of 128 bytes.
    shared = -(-(usage.shared_bytes + dynamic_bytes + 1024) // 128) * 128
    blocks = min(most_blocks, most_warps // warps, by_registers, shared_per_multiprocessor // shared)
    return blocks * warps / most_warps


def record_launches(library: Path) -> list[dict]:
    """The calls of calls.py with their launches; CUDA's are by address in the host library.

    Run in a process of its own, whose ops are for good those of the host library and Triton's.
    """
    import calls
    import torch
    import triton_compile
    from triton.runtime.jit import JITFunction

    import avatar_ops
    from avatar_ops._library import TRITON_KERNELS
    from avatar_ops.triton import modulated_conv2d

    # Tiles depend on how many multiprocessors are to be kept busy: here those of an H100.
    modulated_conv2d.processors = lambda device: 132
    torch.ops.load_library(library)
    for name, launcher in TRITON_KERNELS.items():
        torch.library.impl(f"avatar_ops::{name}", "CPU", launcher)
    log = Path(os.environ["AVATAR_HOSTCUDA_DRY_RUN"])
    started: list[triton_compile.Launch] = []
    JITFunction.run = triton_compile.recorder(started)
    compiled: dict = {}
    records = []
    for call in calls.calls():
        prepared = call.prepare(avatar_ops)
        log.write_text("")
        started.clear()
        call.run(prepared)
        launches = []
        for line in log.read_text().splitlines():
            address, *numbers = line.split()
            *geometry, shared = map(int, numbers)
            launches.append(
                {"address": address, "grid": geometry[:3], "block": geometry[3:], "dynamic_bytes": shared}
            )
        for launch in started:
            launches.append(triton_compile.describe(launch, CAPABILITIES, compiled))
        fields = {name: value for name, value in vars(call).items() if name not in ("prepare", "run")}
        records.append({**fields, "launches": launches})
    return records


def report() -> dict:
    """Everything, as it is kept in docs/kernels.json."""
    built = hostcuda.library("plain")
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "AVATAR_HOSTCUDA_DRY_RUN": str(Path(folder, "launches")),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")]),
        }
        output = Path(folder, "calls.json")
        subprocess.run(
            [sys.executable, __file__, "--record", built, output], env=environment, cwd=ROOT, check=True
        )
        calls = json.loads(output.read_text())
    usage = library_usage()
    names = hostcuda.symbols(built)
    for call in calls:
        needs = call["bytes"], call["flops"], call["rate"]
        call["roofline"] = {
            gpu.name: dict(zip(("seconds", "bound"), gpu.seconds(*needs), strict=True)) for gpu in GPUS
        }
        for launch in call["launches"]:
            if "address" not in launch:
                continue
            launch["kernel"] = plain_name(names[int(launch.pop("address"), 16)])
            launch["language"] = "CUDA"
    return {
        "nvcc": nvcc_version(),
        "gpus": [asdict(gpu) for gpu in GPUS],
        "calls": calls,
        "cuda_kernels": {
            str(capability): {name: asdict(kernel) for name, kernel in sorted(kernels.items())}
            for capability, kernels in usage.items()
        },
    }


def nvcc_version() -> str:
    text = subprocess.check_output(["nvcc", "--version"], text=True)
    return re.search(r"V([\d.]+)", text)[1]


def kernel_usage(data: dict, launch: dict, capability: int) -> Usage:
    kernels = launch["usage"] if launch["language"] == "Triton" else None
    if kernels is None:
        return Usage(**data["cuda_kernels"][str(capability)][launch["kernel"]])
    return Usage(**kernels[str(capability)])


def tables(data: dict) -> str:
    """The calls with their rooflines, and their kernels on each architecture, as Markdown."""
    lines = ["| call | moves | gathers | operations | " + " | ".join(f"{g.name} us" for g in GPUS) + " |"]
    lines.append("|---|---:|---:|---:|" + "---:|" * len(GPUS))
    for call in data["calls"]:
        times = " | ".join(roofline_cell(call["roofline"][gpu.name]) for gpu in GPUS)
        lines.append(
            f"| {call['op']}: {call['name']} | {call['bytes'] / 1e6:.1f} MB | "
            f"{call['gathered_bytes'] / 1e6:.0f} MB | {call['flops'] / 1e9:.1f} G | {times} |"
        )
    head = "| op | kernel | launch | " + " | ".join(
        f"sm_{c} registers | shared | occupancy" for c in CAPABILITIES
    )
    lines += [
        "",
        head + " | 128-bit | matrix |",
        "|---|---|---|" + "---:|---:|---:|" * len(CAPABILITIES) + "---:|---:|",
    ]
    seen = set()
    for call in data["calls"]:
        for launch in call["launches"]:
            grid, block = (" x ".join(map(str, trimmed(launch[part]))) for part in ("grid", "block"))
            cells = []
            for capability in CAPABILITIES:
                usage = kernel_usage(data, launch, capability)
                threads = launch["block"][0] * launch["block"][1] * launch["block"][2]
                share = occupancy(usage, threads, launch["dynamic_bytes"], capability)
                shared = usage.shared_bytes + launch["dynamic_bytes"]
                cells.append(f"{usage.registers} | {shared} | {share:.0%}")
            row = (
                f"| {call['op']} | {launch['kernel']} | {grid} of {block} | {' | '.join(cells)} | "
                f"{usage.wide_accesses} | {usage.matrix_instructions} |"
            )
            if row not in seen:
                lines.append(row)
            seen.add(row)
    return "\n".join(lines)


def roofline_cell(roofline: dict) -> str:
    """Microseconds, with a star where operations bound them and not memory."""
    return f"{roofline['seconds'] * 1e6:.1f}" + ("" if roofline["bound"] == "memory" else " *")


def trimmed(sizes: list[int]) -> list[int]:
    while len(sizes) > 1 and sizes[-1] == 1:
        sizes = sizes[:-1]
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write this with .json and .md added")
    parser.add_argument("--record", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.record:
        library, output = arguments.record
        output.write_text(json.dumps(record_launches(library)))
        return
    data = report()
    text = tables(data)
    print(text)
    if arguments.out:
        arguments.out.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text(text + "\n")


if __name__ == "__main__":
    main()
