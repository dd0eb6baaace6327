"""Coverage of the device code in csrc by the op tests, on the build of csrc/hostcuda for gcov.

    python tools/cuda_coverage.py [--op knn] [--fail-under 95]

Device code is what stands in functions marked __global__ or __device__. A line counts as reached if any
instantiation of its template reaches it. Prints lines per file, and the numbers of those never reached.
"""

from __future__ import annotations

import argparse
import bisect
import json
import re
import subprocess
import sys
from pathlib import Path

import hostcuda


def blanked(text: str) -> str:
    """The same length and lines without comments and string literals."""
    pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"'
    return re.sub(pattern, lambda m: re.sub(r"[^\n]", " ", m.group()), text, flags=re.DOTALL)


def body_end(text: str, begin: int) -> int:
    """Where the brace that opens at `begin` closes."""
    depth = 0
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return position
    raise ValueError("unbalanced braces")


def device_lines(source: Path) -> set[int]:
    """Numbers of the lines in bodies of __global__ and __device__ functions."""
    text = re.sub(
        r"^[ \t]*#(?:\\\n|[^\n])*",
        lambda m: re.sub(r"[^\n]", " ", m.group()),
        blanked(source.read_text()),
        flags=re.M,
    )
    starts = [m.start() for m in re.finditer("\n", text)]
    lines = set()
    for mark in re.finditer(r"__(?:global|device)__", text):
        opening = re.compile(r"[{;]").search(text, mark.end())
        if opening and opening.group() == "{":
            first, last = opening.start(), body_end(text, opening.start())
            lines.update(range(bisect.bisect_left(starts, first) + 1, bisect.bisect_left(starts, last) + 2))
    return lines


def executed_lines(build: Path) -> dict[Path, dict[int, int]]:
    """Source -> line -> how often it ran, over all instantiations."""
    counts: dict[Path, dict[int, int]] = {}
    for data in build.rglob("*.gcda"):
        report = subprocess.run(
            ["gcov", "--json-format", "--stdout", data], cwd=build, capture_output=True, text=True, check=True
        )
        for file in json.loads(report.stdout)["files"]:
            lines = counts.setdefault(Path(build, file["file"]).resolve(), {})
            for line in file["lines"]:
                number = line["line_number"]
                lines[number] = lines.get(number, 0) + line["count"]
    return counts


def ranges(numbers: list[int]) -> str:
    """`3-5, 9` for 3, 4, 5, 9."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    ops = list(hostcuda.cuda_sources())
    parser.add_argument("--op", action="append", choices=ops, help="op to measure (repeatable)")
    parser.add_argument("--fail-under", type=float, default=0, help="percentage that every file has to reach")
    arguments = parser.parse_args()
    build = hostcuda.build("coverage")
    for stale in build.rglob("*.gcda"):
        stale.unlink()
    done = hostcuda.run_op_tests("coverage", 1, arguments.op or ops)
    if done.returncode:
        raise SystemExit("the op tests failed")
    counts = executed_lines(build)
    low = []
    print(f"{'file':<56} {'lines':>6} {'reached':>8}")
    folders = {hostcuda.cuda_sources()[op].parent for op in arguments.op or ops}
    for source in hostcuda.kernel_files():
        if arguments.op and source.parent not in folders:
            continue
        known = counts.get(source, {})
        lines = sorted(device_lines(source) & set(known))
        missed = [number for number in lines if not known[number]]
        share = 100 * (1 - len(missed) / len(lines)) if lines else 100.0
        name = source.relative_to(hostcuda.ROOT)
        print(f"{name!s:<56} {len(lines):>6} {share:>7.1f}%" + (f"  not: {ranges(missed)}" if missed else ""))
        if share < arguments.fail_under:
            low.append(str(name))
    if low:
        sys.exit(f"below {arguments.fail_under:g}%: {', '.join(low)}")


if __name__ == "__main__":
    main()
