"""Prints the JSON that pytest-benchmark wrote as a table: each case against its best peer."""

from __future__ import annotations

import json
import sys


def best_peer(ratios: dict[str, float]) -> str:
    """`3.2x scipy cKDTree`: the peer that comes closest, and how many times as long it takes."""
    if not ratios:
        return "-"
    name = min(ratios, key=ratios.get)
    return f"{ratios[name]:.2f}x {name}"


def memory_ratio(peaks: dict[str, int | None]) -> str:
    """The leanest peer's peak extra memory over ours."""
    peers = {name: peak for name, peak in peaks.items() if name != "ours" and peak is not None}
    if peaks.get("ours") is None or not peers:
        return "-"
    name = min(peers, key=peers.get)
    return f"{peers[name] / max(peaks['ours'], 1 << 16):.1f}x {name}"


def main(path: str) -> None:
    with open(path) as file:
        report = json.load(file)
    machine = report["machine_info"]
    processor = machine["cpu"].get("brand_raw", machine["processor"])
    copy, product = machine["copy_gigabytes_per_second"], machine["matmul_gigaflops"]
    print(f"{processor}, {machine['isa']}, torch {machine['torch']}")
    print(f"copy {copy:.1f} GB/s, float32 matrix product {product:.0f} GFLOP/s\n")
    rows = [("case", "1 thread", f"{machine['threads']} threads", "memory", "ms (1 thread)")]
    for benchmark in report["benchmarks"]:
        info = benchmark["extra_info"]
        if "ratios" not in info:
            continue
        rows.append(
            (
                info["name"],
                best_peer(info["ratios"]["1"]),
                best_peer(info["ratios"][str(info["threads"])]),
                memory_ratio(info.get("peak_extra_bytes", {})),
                f"{info['seconds']['1'] * 1e3:.2f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for number, row in enumerate(rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    print("\nBest peer over ours, medians of paired rounds: above 1, ours is faster or leaner.")


if __name__ == "__main__":
    main(sys.argv[1])
