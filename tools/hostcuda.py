"""Runs CUDA kernels on a machine without a GPU: compiled for the host, in the op tests of a fresh process.

    python tools/hostcuda.py --op knn                           build, then run what tests knn
    python tools/hostcuda.py --op knn --seed 3                  with another order of threads and blocks
    python tools/hostcuda.py --op knn --variant sanitize        with AddressSanitizer, UndefinedBehaviorSanitizer
    python tools/hostcuda.py --op knn --variant race            looking for data races
    python tools/hostcuda.py --op knn -- -k ragged -x           what follows -- goes to pytest

Without --op it runs every op that has a csrc/<op>/<op>_cuda.cu.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "hostcuda"
# Variant -> options of CMake.
VARIANTS = {
    "plain": {"AVATAR_OPS_HOSTCUDA": "ON"},
    "sanitize": {"AVATAR_OPS_HOSTCUDA": "ON", "AVATAR_OPS_SANITIZE": "ON"},
    "race": {"AVATAR_OPS_HOSTCUDA": "RACE"},
    "coverage": {"AVATAR_OPS_HOSTCUDA": "COVERAGE"},
    "ucontext": {"AVATAR_OPS_HOSTCUDA": "UCONTEXT"},
}
# What these leave out is torch's own compilers around the op, which change nothing in a kernel, and statistics of
# samples, which are compared with the reference bit for bit.
PYTEST_SELECTION = "not inductor and not export and not draws_every_pair and not is_independent"


def cuda_sources() -> dict[str, Path]:
    """Op -> its CUDA source."""
    return {path.stem.removesuffix("_cuda"): path for path in sorted((ROOT / "csrc").glob("*/*_cuda.cu"))}


def kernel_files() -> list[Path]:
    """The sources and headers that kernels may stand in."""
    files = [*(ROOT / "csrc").glob("*/*.cu"), *(ROOT / "csrc").glob("*/*.cuh")]
    return sorted(file for file in files if file.parent.name != "hostcuda")


def build(variant: str, target: str = "avatar_ops_hostcuda") -> Path:
    """Builds a target of csrc/hostcuda/CMakeLists.txt where it is out of date; returns the build folder."""
    folder = BUILD / variant
    folder.mkdir(parents=True, exist_ok=True)
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "Python_EXECUTABLE": sys.executable,
        "AVATAR_OPS_CUDA": "OFF",
        **VARIANTS[variant],
    }
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            ["-G", "Ninja", "-S", ROOT, "-B", folder, *(f"-D{k}={v}" for k, v in options.items())],
            ["--build", folder, "--target", target],
        ):
            done = subprocess.run(
                ["cmake", *command], env={**os.environ, "PATH": path}, capture_output=True, text=True
            )
            if done.returncode:
                raise RuntimeError(f"cmake {' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return folder


def library(variant: str) -> Path:
    """The built library of a variant."""
    return build(variant) / "csrc" / "hostcuda" / "libavatar_ops_hostcuda.so"


def sanitizer_environment() -> dict[str, str]:
    """What a Python process needs to load libraries that were built with the sanitizers."""
    compiler = os.environ.get("CXX", "c++")

    def runtime(name: str) -> str:
        return subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()

    return {
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:protect_shadow_gap=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def run_op_tests(
    variant: str, seed: int, ops: list[str], arguments: list[str] = (), log: Path | None = None, **options
) -> subprocess.CompletedProcess:
    """The op tests on the kernels of a variant, in a process of their own; `log` collects launches."""
    built = library(variant)
    environment = {**os.environ, "AVATAR_HOSTCUDA_SEED": str(seed)}
    if variant == "sanitize":
        environment.update(sanitizer_environment())
    if log is not None:
        environment["AVATAR_HOSTCUDA_LOG"] = str(log)
    # What a sanitizer says before it ends the process is not to be captured.
    command = [sys.executable, "-m", "pytest", "tests/ops", "tests/hostcuda/orders.py", "--capture=sys"]
    command += ["--isa", "baseline"]
    command += ["--hostcuda", str(built), *(f"--op={op}" for op in ops), "-k", PYTEST_SELECTION, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, **options)


def kernels_of(source: Path) -> list[str]:
    """Names of the __global__ functions that a source defines."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", source.read_text(), flags=re.DOTALL)
    text = re.sub(r"__launch_bounds__\((?:[^()]|\([^()]*\))*\)", "", text)
    names = re.findall(r"__global__[^();{}]*?(\w+)\s*\(", text)
    if len(names) != text.count("__global__"):
        raise ValueError(f"{source}: expected a name and parameters after each __global__, got {names}")
    return names


def symbols(built: Path) -> dict[int, str]:
    """Address within a library -> demangled symbol."""
    names = {}
    for line in subprocess.check_output(["nm", "-C", built], text=True).splitlines():
        address, _, symbol = line.partition(" ")
        if address.strip():
            names[int(address, 16)] = symbol[2:]
    return names


def launched_kernels(built: Path, log: Path) -> set[str]:
    """Names of the functions whose addresses a log of launches holds."""
    names = symbols(built)
    addresses = {int(line, 16) for line in log.read_text().split()}
    return {re.sub(r"<.*|\(.*", "", plain_name(names[address])) for address in addresses}


def plain_name(symbol: str) -> str:
    """`void avatar::(anonymous namespace)::kernel<float>(float*)` -> `kernel<float>(float*)`."""
    return re.sub(r"^(?:void )?(?:(?:\w+|\(anonymous namespace\))::)*", "", symbol)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--op", action="append", choices=list(cuda_sources()), help="op to test (repeatable)")
    parser.add_argument("--variant", choices=list(VARIANTS), default="plain")
    parser.add_argument("--seed", type=int, default=0, help="order of threads and blocks; 0 is ascending")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    arguments = parser.parse_args()
    ops = arguments.op or list(cuda_sources())
    raise SystemExit(run_op_tests(arguments.variant, arguments.seed, ops, arguments.pytest).returncode)


if __name__ == "__main__":
    main()
