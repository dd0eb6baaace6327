"""Paired timing: two sides alternate in one process, and the median of the rounds' ratios counts.

Shared and noisy machines drift, so a ratio of two separate timings says little; that within a round does.
"""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

from avatar_ops import release_memory

Call = Callable[[], object]

# A round runs each side for at least this long; fast calls are repeated within it.
ROUND_SECONDS = 0.05
# One case ends after this long even when rounds are left, so that a slow peer does not hold up the table.
CASE_SECONDS = float(os.environ.get("AVATAR_BENCH_SECONDS", "8"))
ROUNDS = int(os.environ.get("AVATAR_BENCH_ROUNDS", "9"))
MIN_ROUNDS = 3
# A peer that takes so many times as long as the fastest one decides nothing: one round tells its ratio.
SLOW = 3


def timed(call: Call, repeats: int) -> float:
    """Seconds per call, in a row of calls: caches and memory are as the side's own calls leave them."""
    if repeats == 1:
        call()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def calibrate(call: Call) -> tuple[float, int]:
    """Seconds of a call, and how many calls fill a round."""
    seconds = max(timed(call, 1), 1e-9)
    return seconds, max(1, min(1000, round(ROUND_SECONDS / seconds)))


def paired_ratios(ours: Call, peers: dict[str, Call]) -> tuple[float, dict[str, float]]:
    """Median seconds of `ours`, and for each peer the median over rounds of its time over ours."""
    calibrated = {name: calibrate(call) for name, call in {"": ours, **peers}.items()}
    repeats = {name: count for name, (_, count) in calibrated.items()}
    fastest = min((calibrated[name][0] for name in peers), default=0.0)
    slow = {name for name in peers if calibrated[name][0] > SLOW * fastest}
    own_times, ratios = [], {name: [] for name in peers}
    start = time.perf_counter()
    for done in range(ROUNDS):
        if done >= MIN_ROUNDS and time.perf_counter() - start > CASE_SECONDS:
            break
        for name, call in peers.items():
            if done > 0 and name in slow:
                continue
            own = timed(ours, repeats[""])
            own_times.append(own)
            ratios[name].append(timed(call, repeats[name]) / own)
        if not peers:
            own_times.append(timed(ours, repeats[""]))
    return statistics.median(own_times), {name: statistics.median(values) for name, values in ratios.items()}


def peak_extra_bytes(call: Call) -> int | None:
    """Growth of the resident set at its peak during one call; None where the system cannot tell.

    Memory that the allocators had kept from earlier calls is handed back first.
    """
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def field(name: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024

    gc.collect()
    release_memory()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        reset.write_text("5")
        before = field("VmRSS:")
        result = call()
        peak = field("VmHWM:")
    except (OSError, AttributeError, StopIteration):
        return None
    del result
    return max(peak - before, 0)


def compare(benchmark, name: str, ours: Call, peers: dict[str, Call], *, memory: bool = False) -> None:
    """Times `ours` against every peer with one thread and with all, and records it in pytest-benchmark.

    A peer that can use several threads reads torch.get_num_threads() within its call.

    Args:
        benchmark: pytest-benchmark's fixture.
        name: what the table calls this case.
        ours: the call to measure.   peers: name -> call doing the same job.
        memory: also measure the peak extra memory of one call of each side.
    """
    all_threads = torch.get_num_threads()
    info = benchmark.extra_info
    info.update(name=name, threads=all_threads, seconds={}, ratios={})
    try:
        for threads in sorted({1, all_threads}):
            torch.set_num_threads(threads)
            with threadpool_limits(threads):
                seconds, ratios = paired_ratios(ours, peers)
            info["seconds"][str(threads)] = seconds
            info["ratios"][str(threads)] = ratios
        if memory:
            info["peak_extra_bytes"] = {
                side: peak_extra_bytes(call) for side, call in {"ours": ours, **peers}.items()
            }
    finally:
        torch.set_num_threads(all_threads)
    benchmark.pedantic(ours, rounds=5, iterations=1, warmup_rounds=1)


def copy_bandwidth() -> float:
    """Bytes per second that a copy of a large array moves, read plus write, all threads."""
    source = torch.ones(1 << 26)
    target = torch.empty_like(source)
    best = min(timed(lambda: target.copy_(source), 1) for _ in range(5))
    return 2 * source.numel() * 4 / best


def matmul_rate() -> float:
    """float32 FLOP/s of a large square matrix product, all threads."""
    a = torch.randn(2048, 2048)
    best = min(timed(lambda: a @ a, 1) for _ in range(5))
    return 2 * 2048**3 / best
