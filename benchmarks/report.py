"""Prints the JSON that pytest-benchmark wrote as a table: each case against its best peer.

python benchmarks/report.py build/bench.json
python benchmarks/report.py build/bench.json --merge benchmarks/results   and keep the figures there, in a file
                                                                          for each instruction set
"""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path


def best_peer(ratios: dict[str, float]) -> tuple[float, str] | None:
    """The peer that comes closest: how many times as long it takes, and its name; None without peers."""
    return min(((ratio, name) for name, ratio in ratios.items()), default=None)


def leanest_peer(peaks: dict[str, int | None]) -> tuple[float, str] | None:
    """The leanest peer's peak extra memory over ours, and its name; None where it was not measured."""
    own = peaks.get("ours")
    sides = ((peak, name) for name, peak in peaks.items() if name != "ours" and peak is not None)
    peak, name = min(sides, default=(None, ""))
    return None if own is None or peak is None else (peak / max(own, 1 << 16), name)


def times(found: tuple[float, str] | None, digits: int) -> str:
    return f"{found[0]:.{digits}f}x {found[1]}" if found else "-"


def read_cases(report: dict) -> dict[str, dict]:
    """Case name -> file, threads, seconds, ratios and memory, with what machine and versions they come from."""
    machine = report["machine_info"]
    kept = ("isa", "torch", "copy_gigabytes_per_second", "matmul_gigaflops")
    origin = {
        "processor": machine["cpu"].get("brand_raw", machine["processor"]),
        **{name: machine[name] for name in kept},
    }
    cases = {}
    for benchmark in report["benchmarks"]:
        info = dict(benchmark["extra_info"])
        if "ratios" in info:
            file = benchmark["fullname"].split("::")[0]
            cases[info.pop("name")] = {
                "file": Path(file).stem.removeprefix("bench_"),
                **info,
                "origin": origin,
            }
    return cases


def table(cases: dict[str, dict]) -> str:
    """Best peer over ours with one thread and with all, as Markdown."""
    all_threads = max(case["threads"] for case in cases.values())
    rows = [("case", "1 thread", f"{all_threads} threads", "memory", "ms (1 thread)")]
    for name, case in cases.items():
        rows.append(
            (
                name,
                times(best_peer(case["ratios"]["1"]), 2),
                times(best_peer(case["ratios"][str(case["threads"])]), 2),
                times(leanest_peer(case.get("peak_extra_bytes", {})), 1),
                f"{case['seconds']['1'] * 1e3:.2f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def natural(name: str) -> list:
    """A key that sorts numbers within names by their value."""
    return [(part.isdigit(), int(part) if part.isdigit() else part) for part in re.split(r"(\d+)", name)]


def merge(cases: dict[str, dict], folder: Path) -> None:
    """Replaces these cases among those of their instruction set's file, which appears whole or not at all."""
    isa = next(iter(cases.values()))["origin"]["isa"]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{isa}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    temporary = path.with_suffix(".tmp")
    merged = {**known, **cases}
    ordered = {name: merged[name] for name in sorted(merged, key=natural)}
    temporary.write_text(json.dumps(ordered, indent=1) + "\n")
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path, help="JSON of pytest-benchmark")
    parser.add_argument("--merge", type=Path, metavar="FOLDER", help="keep the figures in this folder")
    arguments = parser.parse_args()
    cases = read_cases(json.loads(arguments.report.read_text()))
    if not cases:
        raise SystemExit(f"{arguments.report}: no case with ratios")
    origin = next(iter(cases.values()))["origin"]
    print(f"{origin['processor']}, {origin['isa']}, torch {origin['torch']}")
    copy, product = origin["copy_gigabytes_per_second"], origin["matmul_gigaflops"]
    print(f"copy {copy:.1f} GB/s, float32 matrix product {product:.0f} GFLOP/s\n")
    print(table(cases))
    print("\nBest peer over ours, medians of paired rounds: above 1, ours is faster or leaner.")
    if arguments.merge:
        merge(cases, arguments.merge)


if __name__ == "__main__":
    main()
