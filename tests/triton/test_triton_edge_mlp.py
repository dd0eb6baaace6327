"""edge_mlp's Triton kernels against the native ones, and that neither tiles nor workspaces show."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="comes with torch's CUDA builds")
from avatar_ops.triton import _edge_layers

ROOT = Path(__file__).resolve().parents[2]

PRELUDE = """
import torch
import avatar_ops
from avatar_ops.triton import _edge_layers, _position, edge_mlp

native = torch.ops.avatar_ops

def inputs(widths, rows, k, seed=0, missing=0.2):
    generator = torch.Generator().manual_seed(seed)
    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)
    points = torch.randint(rows, (rows, k), generator=generator)
    points[torch.rand(rows, k, generator=generator) < missing] = -1
    weights = [normal(o, i) / i**0.5 for i, o in zip(widths, widths[1:])]
    return normal(rows, widths[0]), normal(rows, widths[0]), points, weights, [normal(w) for w in widths], [
        normal(w) for w in widths
    ]

def everything(ops, p, q, points, weights, scales, shifts):
    layers = p, q, points, weights
    output, slots = ops.edge_layers(*layers, scales, shifts, 0.2, True)
    without, none = ops.edge_layers(*layers, scales, shifts, 0.2, False)
    assert none.numel() == 0 and torch.equal(without, output)
    statistics = ops.edge_layers_statistics(*layers, scales[:-1], shifts[:-1], 0.2)
    maximum = ops.edge_layers_backward(output.cos(), slots, None, None, *layers, scales, shifts, 0.2)
    moments = ops.edge_layers_backward(
        None, None, shifts[-1], scales[-1], *layers, scales[:-1], shifts[:-1], 0.2
    )
    return output, slots, *statistics, *maximum, *moments

def choose(edges, workspace):
    _edge_layers.EDGES[torch.float64] = dict.fromkeys((16, 32, 64, 128), edges)
    _edge_layers.LEAST_WORKSPACE = workspace

def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
"""

DEPTHS_AND_WIDTHS = """
edge_mlp.INCOMING["ROWS"] = 128
for widths, k in (((5,), 3), ((12, 20), 20), ((9, 70, 5), 7), ((130, 150, 3), 4), ((150,), 4), ((8, 7, 6, 5), 40),
                  ((6, 5), 0)):
    given = inputs(widths, 60, k)
    choose(256, 1 << 24)
    close(everything(edge_mlp, *given), everything(native, *given))
"""

TILES = """
given = inputs((12, 20, 7), 45, 9)
expected = everything(native, *given)
_position.LEAST_SLICES = 3
for edges, workspace in ((16, 0), (32, 1 << 24), (128, 4000), (1024, 0)):
    choose(edges, workspace)
    close(everything(edge_mlp, *given), expected)
"""

TIES = """
choose(64, 1 << 24)
nan, inf = float("nan"), float("inf")
p, _, points, _, _, _ = inputs((3,), 40, 12, missing=0.3)
points[4] = -1
q = torch.randint(3, (40, 3), generator=torch.Generator().manual_seed(1)).double()
q[points[0, 3:5]], q[points[7, 6]], q[points[9]] = nan, -inf, inf
points[11] = points[12, 0] = 30
for weights, one, zero in (([], [torch.ones(3)], [torch.zeros(3)]),
                           ([torch.eye(3)], [torch.ones(3)] * 2, [torch.zeros(3)] * 2)):
    layers = [[t.double() for t in part] for part in (weights, one, zero)]
    if weights:
        # Zeros of a matrix make NaN of infinite numbers in one order of summation as in another.
        q = q.nan_to_num()
    actual, expected = (ops.edge_layers(p, q, points, *layers, 0.2, True) for ops in (edge_mlp, native))
    assert torch.equal(actual[0].nan_to_num(7.0), expected[0].nan_to_num(7.0))
    assert torch.equal(actual[0].isnan(), expected[0].isnan())
    assert torch.equal(actual[1], expected[1])
    assert not actual[0][4].any() and (actual[1][4] == -1).all()
"""


def in_the_interpreter(program: str):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", PRELUDE + program], cwd=ROOT, env=environment, check=True)


def test_any_depth_and_width_gives_what_the_native_kernels_give():
    in_the_interpreter(DEPTHS_AND_WIDTHS)


def test_the_size_of_tiles_and_workspaces_does_not_show():
    in_the_interpreter(TILES)


def test_ties_go_to_the_first_slot_and_nan_wins():
    in_the_interpreter(TIES)


@pytest.mark.parametrize(("k", "slots"), [(20, 4), (16, 16), (40, 8), (64, 32), (5, 8), (1, 4), (0, 32)])
def test_chunks_leave_few_slots_empty(k, slots):
    assert _edge_layers.slots_of(k, 64) == slots
