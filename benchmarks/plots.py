"""Draws what report.py kept: ratio bars for each op, and time and memory of knn against the number of points.

python benchmarks/plots.py benchmarks/results benchmarks/plots
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from pathlib import Path

import matplotlib
from report import best_peer

matplotlib.use("agg")
from matplotlib import pyplot

# Which files of benchmarks/ share a figure.
FIGURES = {
    "knn": ["knn"],
    "edges": ["edge_conv", "edge_max", "edge_mlp"],
    "attention": ["local_attention_pool", "randlanet", "random_sample", "edge_moments"],
    "convolution": ["modulated_conv2d", "upfirdn2d", "bias_act"],
    "generator": ["generator"],
    "points": ["rasterize_points", "composite_points"],
}
SCALING = re.compile(r"knn D=3 K=16 N=(\d+) surface")
COLORS = ("#1f77b4", "#ff7f0e")


def save(figure, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight")
    pyplot.close(figure)
    os.replace(temporary, path)


def draw_ratios(cases: dict[str, dict], path: Path) -> None:
    """A pair of bars for each case: the best peer's time over ours with one thread and with all."""
    names = [name for name, case in cases.items() if case["ratios"].get("1")]
    figure, axes = pyplot.subplots(figsize=(10, 1.2 + 0.5 * len(names)))
    largest = 1.0
    for row, name in enumerate(names):
        case = cases[name]
        for side, threads in enumerate(sorted({1, case["threads"]})):
            ratio, peer = best_peer(case["ratios"][str(threads)])
            largest = max(largest, ratio)
            label = f"{threads} thread{'s' * (threads > 1)}" if row == 0 else None
            y = row - 0.2 + 0.4 * side
            axes.barh(y, ratio, height=0.38, color=COLORS[side], label=label)
            axes.text(ratio * 1.03, y, f"{ratio:.1f}  {peer}", va="center", fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(0.5, largest * 4)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("time of the best peer / ours")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=8)
    save(figure, path)


def draw_scaling(cases: dict[str, dict], path: Path) -> None:
    """Time and peak extra memory of one search against N, every peer and the slope of N log N."""
    counts = {name: int(found[1]) for name in cases if (found := SCALING.fullmatch(name))}
    if len(counts) < 2:
        return
    times, peaks = {}, {}
    for name, count in sorted(counts.items(), key=lambda item: item[1]):
        case = cases[name]
        own = case["seconds"]["1"]
        times.setdefault("avatar_ops", []).append((count, own))
        for side, ratio in case["ratios"]["1"].items():
            times.setdefault(side, []).append((count, ratio * own))
        for side, peak in case.get("peak_extra_bytes", {}).items():
            if peak:
                peaks.setdefault("avatar_ops" if side == "ours" else side, []).append((count, peak / 2**20))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.8))
    for axes, sides, unit in ((left, times, "seconds, one thread"), (right, peaks, "peak extra memory, MiB")):
        for side, points in sides.items():
            width = 2.5 if side == "avatar_ops" else 1.2
            axes.loglog(*zip(*points, strict=True), marker="o", markersize=3, linewidth=width, label=side)
        axes.set_xlabel("points N (D = 3, K = 16, surface, index build included)")
        axes.set_ylabel(unit)
        axes.grid(True, which="major", alpha=0.3)
    last_count, last_seconds = times["avatar_ops"][-1]
    slope = [
        (count, last_seconds * count * math.log(count) / (last_count * math.log(last_count)))
        for count, _ in times["avatar_ops"]
    ]
    left.loglog(*zip(*slope, strict=True), "k--", linewidth=0.8, label="N log N")
    left.legend(fontsize=8)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="folder that report.py --merge wrote to")
    parser.add_argument(
        "out", type=Path, help="folder for the PNG files, one within for each instruction set"
    )
    arguments = parser.parse_args()
    for results in sorted(arguments.results.glob("*.json")):
        cases = json.loads(results.read_text())
        out = arguments.out / results.stem
        out.mkdir(parents=True, exist_ok=True)
        for figure, files in FIGURES.items():
            shown = {name: case for name, case in cases.items() if case["file"] in files}
            if any(case["ratios"].get("1") for case in shown.values()):
                draw_ratios(shown, out / f"{figure}.png")
        draw_scaling(cases, out / "knn_scaling.png")


if __name__ == "__main__":
    main()
