"""Puts what tools/gpu_check.sh left in a folder together: gpu.json and gpu.md.

python tools/gpu_table.py build/gpu
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def collect(folder: Path) -> dict:
    steps = [line.split("\t") for line in (folder / "steps.tsv").read_text().splitlines()]
    timings = folder / "benchmarks.json"
    benchmarks = json.loads(timings.read_text())["benchmarks"] if timings.exists() else []
    return {
        "steps": [{"step": name, "status": status, "seconds": int(time)} for name, status, time in steps],
        "calls": [benchmark["extra_info"] for benchmark in benchmarks],
    }


def table(report: dict) -> str:
    lines = ["| step | status | s |", "|---|---|---:|"]
    lines += [f"| {row['step']} | {row['status']} | {row['seconds']} |" for row in report["steps"]]
    if report["calls"]:
        lines += [
            "",
            f"{report['calls'][0]['device']}; how many times as long as ours the others take.",
            "",
            "| call | ms | of the roofline | others | left out |",
            "|---|---:|---:|---|---|",
        ]
    for call in report["calls"]:
        share = call["roofline_fraction"]
        others = ", ".join(f"{name} {ratio:.2f}" for name, ratio in call["ratios"].items())
        left_out = ", ".join(f"{name} ({why})" for name, why in call["left_out"].items())
        lines.append(
            f"| {call['call']} | {call['milliseconds']:.3f} | {'-' if share is None else f'{share:.0%}'} | "
            f"{others or '-'} | {left_out or '-'} |"
        )
    return "\n".join(lines) + "\n"


def main(folder: Path) -> None:
    report = collect(folder)
    (folder / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "gpu.md").write_text(table(report))
    print(f"{folder / 'gpu.md'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
