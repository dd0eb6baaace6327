"""Cases of local_attention_pool."""

import torch

import avatar_ops
from avatar_ops import reference
from avatar_ops.testing import (
    NEIGHBOR_REJECTIONS,
    OpCase,
    Rejection,
    changed,
    neighbors_for,
    normal,
)


def _pool_inputs(
    batch=2,
    points=40,
    channels=12,
    k=6,
    dims=3,
    widths=(9, 12),
    missing=0.2,
    offset=0.0,
    duplicates=False,
    spread=1.0,
):
    def inputs(generator, dtype):
        layers, columns = [], 3 * dims + 1
        for width in widths:
            layers.append((normal(generator, dtype, width, columns) / 2, normal(generator, dtype, width)))
            columns = width
        positions = normal(generator, dtype, batch, points, dims) * spread
        if duplicates:
            positions[:, 1::2] = positions[:, ::2]
        if offset:
            # Only differences and distances count, which have to stay exact.
            positions = (positions * 2**10).round() / 2**10 + offset
            layers[0][0][:, : 2 * dims] = 0
        width = channels + (widths[-1] if widths else 0)
        return {
            "points": positions,
            "features": normal(generator, dtype, batch, points, channels),
            "neighbors": neighbors_for(generator, batch, points, k, max(points, 1), missing),
            "position_weight": [weight for weight, _ in layers],
            "position_bias": [bias for _, bias in layers],
            "score_weight": normal(generator, dtype, width, width) / max(width, 1) ** 0.5,
        }

    return inputs


def _one_layer(make):
    def inputs(generator, dtype):
        values = make(generator, dtype)
        return {
            **values,
            "position_weight": values["position_weight"][0],
            "position_bias": values["position_bias"][0],
        }

    return inputs


def _layer(name, value):
    return changed(name, lambda layers: [value(layers[0]), *layers[1:]])


def _pool_case(id: str, negative_slope=0.2, single=False, **options) -> OpCase:
    def with_slope(make):
        return lambda generator, dtype: {**make(generator, dtype), "negative_slope": negative_slope}

    make = with_slope(_pool_inputs(**options))
    return OpCase(
        op="local_attention_pool",
        id=id,
        make=_one_layer(make) if single else make,
        small=with_slope(_pool_inputs(2, 6, 3, 3, 2, (4, 3), 0.2)),
        function=avatar_ops.local_attention_pool,
        reference=reference.local_attention_pool,
        differentiable=("points", "features", "position_weight", "position_bias", "score_weight"),
        tolerance={torch.float32: 2e-5, torch.float64: 1e-12},
        autocast_dtype=torch.bfloat16,
        batched=("points", "features", "neighbors"),
        rejections=(
            *NEIGHBOR_REJECTIONS,
            Rejection("neighbor-rows", changed("neighbors", lambda t: t[:, 1:]), ValueError, "neighbors"),
            Rejection("dtype", changed("points", lambda t: t.int()), TypeError, "points"),
            Rejection("mixed", changed("features", lambda t: t.double()), TypeError, "features: got dtype"),
            Rejection("rank", changed("points", lambda t: t[0, 0]), ValueError, "points"),
            Rejection("no-dimension", changed("points", lambda t: t[..., :0]), ValueError, "points"),
            Rejection("rows", changed("features", lambda t: t[:, 1:]), ValueError, "features"),
            Rejection(
                "layers", changed("position_bias", lambda t: t[:1]), ValueError, "position_bias: got 1"
            ),
            Rejection(
                "columns",
                _layer("position_weight", lambda t: t[:, 1:]),
                ValueError,
                r"position_weight\[0\]: got shape \(9, 9\)",
            ),
            Rejection("bias", _layer("position_bias", lambda t: t[1:]), ValueError, r"position_bias\[0\]"),
            Rejection("score", changed("score_weight", lambda t: t[1:]), ValueError, "score_weight"),
            Rejection("slope", changed("negative_slope", 1.5), ValueError, "negative_slope: got 1.5"),
        ),
    )


CASES = [
    _pool_case("two-layers"),
    _pool_case("one-layer", single=True, channels=16, widths=(16,), k=16, missing=0.0),
    _pool_case("narrow", single=True, channels=8, widths=(8,), k=16, missing=0.0),
    _pool_case("narrow-two-layers", points=45, channels=5, widths=(6, 7), k=11),
    _pool_case("near", single=True, channels=20, widths=(40,), k=16, spread=0.05),
    _pool_case("wide", channels=40, widths=(33, 24), k=9, negative_slope=0.0),
    _pool_case("deep", widths=(3, 8, 5, 7), negative_slope=1.0),
    _pool_case("many-neighbors", points=70, k=130),
    _pool_case("one-dimension", dims=1),
    _pool_case("many-dimensions", dims=19),
    _pool_case("duplicates", duplicates=True),
    _pool_case("far-from-origin", offset=4096.0),
    _pool_case("no-channels", channels=0),
    _pool_case("no-position-channels", widths=(4, 0)),
    _pool_case("all-missing", missing=1.0),
    _pool_case("no-points", points=0),
    _pool_case("no-neighbors", k=0),
    _pool_case("no-clouds", batch=0),
]
