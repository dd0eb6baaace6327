"""Cases of edge_conv and edge_conv_norm."""

import torch

import avatar_ops
from avatar_ops import reference
from avatar_ops.edge_conv import edge_conv_norm
from avatar_ops.testing import (
    NEIGHBOR_REJECTIONS,
    OpCase,
    Rejection,
    changed,
    neighbors_for,
    normal,
)


def edge_inputs(generator, dtype, batch, points, inputs, k, missing):
    """x and neighbors, with one row that has no neighbour where any is missing."""
    x = normal(generator, dtype, batch, points, inputs)
    neighbors = neighbors_for(generator, batch, points, k, max(points, 1), missing)
    if missing and batch and points:
        neighbors[:, 0] = -1
    return {"x": x, "neighbors": neighbors}


def _linear(generator, dtype, outputs, inputs):
    return normal(generator, dtype, outputs, inputs) / max(inputs, 1) ** 0.5


def _edge_conv_inputs(
    batch=2, points=40, inputs=6, outputs=20, k=5, missing=0.2, scale=normal, folded=True, **options
):
    def make(generator, dtype):
        result = edge_inputs(generator, dtype, batch, points, inputs, k, missing)
        result["weight"] = _linear(generator, dtype, outputs, 2 * inputs)
        if folded:
            result["bias"] = normal(generator, dtype, outputs)
            result["scale"] = scale(generator, dtype, outputs)
            result["shift"] = normal(generator, dtype, outputs)
        return result | options

    return make


def _some_zero(generator, dtype, *shape):
    values = normal(generator, dtype, *shape)
    return torch.where(torch.arange(shape[0]) % 3 == 1, 0, values)


SHAPE_REJECTIONS = (
    Rejection("x-dtype", changed("x", lambda t: t.int()), TypeError, "x: got"),
    Rejection("x-rank", changed("x", lambda t: t[None]), ValueError, "x: got"),
    Rejection("neighbor-rows", changed("neighbors", lambda n: n[:, 1:]), ValueError, r"neighbors: got shape"),
    Rejection("slope-high", changed("negative_slope", 1.5), ValueError, r"negative_slope: got 1\.5"),
    Rejection("slope-negative", changed("negative_slope", -0.1), ValueError, "negative_slope"),
)


def _edge_conv_case(id: str, **options) -> OpCase:
    return OpCase(
        op="edge_conv",
        id=id,
        make=_edge_conv_inputs(**options),
        small=_edge_conv_inputs(2, 7, 3, 4, 3),
        function=avatar_ops.edge_conv,
        reference=reference.edge_conv,
        differentiable=("x", "weight", "bias", "scale", "shift")
        if options.get("folded", True)
        else ("x", "weight"),
        autocast_dtype=torch.bfloat16,
        batched=("x", "neighbors"),
        rejections=(
            *NEIGHBOR_REJECTIONS,
            *SHAPE_REJECTIONS,
            Rejection("mixed", changed("weight", lambda t: t.double()), TypeError, "weight: got dtype"),
            Rejection("weight-shape", changed("weight", lambda t: t[:, 1:]), ValueError, "weight"),
            Rejection("bias-shape", changed("bias", lambda t: t[1:]), ValueError, "bias"),
            Rejection("scale-dtype", changed("scale", lambda t: t.double()), TypeError, "scale"),
            Rejection("shift-shape", changed("shift", lambda t: t[None]), ValueError, "shift"),
        ),
    )


def _edge_conv_norm_inputs(
    batch=2, points=40, inputs=6, outputs=20, k=5, missing=0.2, gamma=normal, **options
):
    def make(generator, dtype):
        return edge_inputs(generator, dtype, batch, points, inputs, k, missing) | {
            "weight": _linear(generator, dtype, outputs, 2 * inputs),
            "gamma": gamma(generator, dtype, outputs),
            "beta": normal(generator, dtype, outputs),
            **options,
        }

    return make


def _edge_conv_norm_case(id: str, **options) -> OpCase:
    return OpCase(
        op="edge_conv_norm",
        id=id,
        make=_edge_conv_norm_inputs(**options),
        small=_edge_conv_norm_inputs(2, 7, 3, 4, 3),
        function=edge_conv_norm,
        reference=reference.edge_conv_norm,
        differentiable=("x", "weight", "gamma", "beta"),
        dtypes=(torch.float32, torch.float64),
        batched=("x", "neighbors"),
        rejections=(
            *NEIGHBOR_REJECTIONS,
            *SHAPE_REJECTIONS,
            Rejection("gamma-dtype", changed("gamma", lambda t: t.double()), TypeError, "gamma"),
            Rejection("beta-shape", changed("beta", lambda t: t[1:]), ValueError, "beta"),
        ),
    )


CASES = [
    _edge_conv_case("folded-missing"),
    _edge_conv_case("plain", folded=False, missing=0.0),
    _edge_conv_case("zero-scale", scale=_some_zero),
    _edge_conv_case("relu", negative_slope=0.0),
    _edge_conv_case("linear", negative_slope=1.0),
    _edge_conv_case("wide", inputs=70, outputs=150, points=130),
    _edge_conv_case("many-neighbors", k=300, points=60, missing=0.5),
    _edge_conv_case("all-missing", missing=1.0),
    _edge_conv_case("one-point", points=1, missing=0.0),
    _edge_conv_case("no-points", points=0, missing=0.0),
    _edge_conv_case("no-neighbors", k=0),
    _edge_conv_case("no-inputs", inputs=0),
    _edge_conv_case("no-outputs", outputs=0),
    _edge_conv_case("no-clouds", batch=0),
    _edge_conv_norm_case("missing"),
    _edge_conv_norm_case("zero-gamma", gamma=_some_zero, missing=0.0),
    _edge_conv_norm_case("wide", inputs=70, outputs=150, points=130, negative_slope=0.0),
    _edge_conv_norm_case("many-neighbors", k=300, points=60, missing=0.5, eps=1e-3),
    _edge_conv_norm_case("all-missing", missing=1.0),
    _edge_conv_norm_case("no-neighbors", k=0),
    _edge_conv_norm_case("no-outputs", outputs=0),
    _edge_conv_norm_case("no-clouds", batch=0),
]
