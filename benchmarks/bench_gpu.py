"""Every op on a GPU at real sizes: against plain PyTorch, the same compiled, and public libraries if installed.

Times are of CUDA events. The roofline fraction is the least time that the device's data sheet allows for the
bytes and operations of a call (calls.py) over the time that it took.
"""

import importlib
import statistics

import calls
import pytest
import torch
from peers_rasterize_points import torch_rasterize
from rooflines import GPUS

import avatar_ops
from avatar_ops import reference

ROUNDS = 11
# Of one side in one round.
REPEATS = 5


def torch_cluster_knn(points, k):
    return importlib.import_module("torch_cluster").knn(points[0], points[0], k)


def pytorch3d_knn(points, k):
    return importlib.import_module("pytorch3d.ops").knn_points(points, points, K=k)


# Op -> peer -> a function in the place of the op's.
PEERS = {
    "knn": {"torch_cluster": torch_cluster_knn, "pytorch3d": pytorch3d_knn},
    "rasterize_points": {"sort in torch": lambda points, *rest: torch_rasterize(points[0], *rest)},
}


class PeerOps:
    """Stands in for the library, with a peer in the place of one op."""

    def __init__(self, op, function):
        setattr(self, op, function)


def side(call, ops, compiled=False):
    """The call as a function without arguments, and why there is none: a missing package, too little memory."""
    try:
        with torch.device("cuda"):
            prepared = call.prepare(ops)
            step = torch.compile(call.run) if compiled else call.run
            step(prepared)
            torch.cuda.synchronize()
    except (ImportError, torch.cuda.OutOfMemoryError) as error:
        return None, f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return lambda: step(prepared), None


def seconds_of(run):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPEATS):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / REPEATS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("call", calls.calls(), ids=lambda call: f"{call.op}-{call.name}")
def test_gpu(benchmark, call):
    torch.cuda.empty_cache()
    sides = {"ours": side(call, avatar_ops), "eager": side(call, reference)}
    if not call.is_backward:
        sides["compiled"] = side(call, reference, compiled=True)
        for name, function in PEERS.get(call.op, {}).items():
            sides[name] = side(call, PeerOps(call.op, function))
    ours, failure = sides["ours"]
    assert ours, failure
    runs = {name: run for name, (run, _) in sides.items() if run}
    rounds = [{name: seconds_of(run) for name, run in runs.items()} for _ in range(ROUNDS)]
    own = statistics.median(times["ours"] for times in rounds)
    device = torch.cuda.get_device_name()
    gpu = next((gpu for gpu in GPUS if gpu.name in device), None)
    benchmark.extra_info.update(
        call=f"{call.op}: {call.name}",
        device=device,
        milliseconds=own * 1e3,
        ratios={
            name: statistics.median(times[name] / times["ours"] for times in rounds)
            for name in runs
            if name != "ours"
        },
        left_out={name: why for name, (_, why) in sides.items() if why},
        roofline_fraction=gpu.seconds(call.bytes, call.flops, call.rate)[0] / own if gpu else None,
    )
    benchmark.pedantic(ours, rounds=3, iterations=1, warmup_rounds=1)
