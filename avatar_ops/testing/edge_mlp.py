"""Cases of edge_mlp and edge_mlp_statistics."""

import torch

from avatar_ops import reference
from avatar_ops.edge_mlp import edge_mlp, edge_mlp_statistics
from avatar_ops.testing import NEIGHBOR_REJECTIONS, OpCase, Rejection, changed, normal
from avatar_ops.testing.edge_conv import SHAPE_REJECTIONS, edge_inputs


def _inputs(batch=2, points=40, inputs=6, widths=(12, 20), k=5, missing=0.2, normalized=2, **options):
    def make(generator, dtype):
        result = edge_inputs(generator, dtype, batch, points, inputs, k, missing)
        sizes = [2 * inputs, *widths]
        result["weights"] = [
            normal(generator, dtype, sizes[n + 1], sizes[n]) / max(sizes[n], 1) ** 0.5
            for n in range(len(widths))
        ]
        result["scales"] = [normal(generator, dtype, width) for width in widths[:normalized]]
        result["shifts"] = [normal(generator, dtype, width) for width in widths[:normalized]]
        return result | options

    return make


def _first(name, value):
    return changed(name, lambda tensors: [value(tensors[0]), *tensors[1:]])


def _case(id: str, **options) -> OpCase:
    return OpCase(
        op="edge_mlp",
        id=id,
        make=_inputs(**options),
        small=_inputs(2, 7, 3, (4, 3), 3),
        function=edge_mlp,
        reference=reference.edge_mlp,
        differentiable=("x", "weights", "scales", "shifts"),
        composes_products=True,
        autocast_dtype=torch.bfloat16,
        batched=("x", "neighbors"),
        rejections=(
            *NEIGHBOR_REJECTIONS,
            *SHAPE_REJECTIONS,
            Rejection("no-layers", changed("weights", lambda w: []), ValueError, "weights"),
            Rejection("weight-shape", _first("weights", lambda t: t[1:]), ValueError, r"weights\[1\]"),
            Rejection("weight-dtype", _first("weights", lambda t: t.double()), TypeError, "weight"),
            Rejection("scales", changed("scales", lambda s: s[1:]), ValueError, "scales: got 1"),
            Rejection("shift-shape", _first("shifts", lambda t: t[1:]), ValueError, r"shifts\[0\]"),
        ),
    )


def _statistics_case(id: str, widths=(12, 20), **options) -> OpCase:
    return OpCase(
        op="edge_mlp_statistics",
        id=id,
        make=_inputs(widths=widths, normalized=len(widths) - 1, **options),
        small=_inputs(2, 7, 3, (4, 3), 3, normalized=1),
        function=edge_mlp_statistics,
        reference=reference.edge_mlp_statistics,
        differentiable=("x", "weights", "scales", "shifts"),
        composes_products=True,
        dtypes=(torch.float32, torch.float64),
        batched=("x", "neighbors"),
        rejections=NEIGHBOR_REJECTIONS,
    )


CASES = [
    _case("two-layers"),
    _case("three-layers", widths=(9, 70, 5), normalized=3, missing=0.0, negative_slope=0.0),
    _case("one-layer", widths=(20,), normalized=1),
    _case("tiles", points=500, k=20, widths=(16, 32)),
    _case("all-missing", missing=1.0),
    _case("no-points", points=0, missing=0.0),
    _case("no-neighbors", k=0),
    _case("no-clouds", batch=0),
    _statistics_case("two-layers"),
    _statistics_case("one-layer", widths=(20,), missing=0.0),
    _statistics_case("tiles", points=500, k=20, widths=(16, 32)),
    _statistics_case("all-missing", missing=1.0),
    _statistics_case("no-neighbors", k=0),
    _statistics_case("no-clouds", batch=0),
]
