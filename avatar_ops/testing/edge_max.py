"""Cases of edge_max."""

import torch

import avatar_ops
from avatar_ops import reference
from avatar_ops.testing import (
    NEIGHBOR_REJECTIONS,
    OpCase,
    Rejection,
    changed,
    distinct,
    neighbors_for,
    normal,
)


def _edge_max_inputs(batch=2, points=40, rows=30, channels=20, k=5, missing=0.2, make=normal):
    def inputs(generator, dtype):
        return {
            "features": make(generator, dtype, batch, points, channels),
            "neighbors": neighbors_for(generator, batch, rows, k, points, missing),
        }

    return inputs


def _edge_max_case(id: str, **options) -> OpCase:
    return OpCase(
        op="edge_max",
        id=id,
        make=_edge_max_inputs(**options),
        small=_edge_max_inputs(2, 7, 5, 3, 3, make=distinct),
        function=avatar_ops.edge_max,
        reference=reference.edge_max,
        differentiable=("features",),
        tolerance={torch.float32: 0, torch.float64: 0},
        batched=("features", "neighbors"),
        rejections=(
            *NEIGHBOR_REJECTIONS,
            Rejection("dtype", changed("features", lambda t: t.int()), TypeError, "features"),
            Rejection("rank", changed("features", lambda t: t[None]), ValueError, "features"),
        ),
    )


CASES = [
    _edge_max_case("missing"),
    _edge_max_case("wide", channels=300, missing=0.0),
    _edge_max_case("all-missing", missing=1.0),
    _edge_max_case("no-points", points=1, missing=1.0),
    _edge_max_case("no-rows", rows=0),
    _edge_max_case("no-neighbors", k=0),
    _edge_max_case("no-channels", channels=0),
    _edge_max_case("no-clouds", batch=0),
]
