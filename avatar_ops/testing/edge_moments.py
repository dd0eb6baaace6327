"""Cases of edge_moments."""

import torch

import avatar_ops
from avatar_ops import reference
from avatar_ops.testing import NEIGHBOR_REJECTIONS, OpCase, Rejection, changed
from avatar_ops.testing.local_attention_pool import _pool_inputs

NAMES = ("points", "neighbors", "position_weight", "position_bias")


def _moments_case(id: str, **options) -> OpCase:
    def of_pool(make):
        return lambda generator, dtype: {name: make(generator, dtype)[name] for name in NAMES}

    return OpCase(
        op="edge_moments",
        id=id,
        make=of_pool(_pool_inputs(**options)),
        small=of_pool(_pool_inputs(2, 6, 3, 3, 2, (4, 3), 0.2)),
        function=avatar_ops.edge_moments,
        reference=reference.edge_moments,
        differentiable=("points", "position_weight", "position_bias"),
        tolerance={torch.float32: 2e-5, torch.float64: 1e-11},
        dtypes=(torch.float32, torch.float64),
        rejections=(
            *NEIGHBOR_REJECTIONS,
            Rejection("neighbor-rows", changed("neighbors", lambda t: t[:, 1:]), ValueError, "neighbors"),
            Rejection("dtype", changed("points", lambda t: t.int()), TypeError, "points"),
            Rejection(
                "layers", changed("position_bias", lambda t: t[:1]), ValueError, "position_bias: got 1"
            ),
        ),
    )


CASES = [
    _moments_case("two-layers"),
    _moments_case("one-layer", widths=(20,), points=700, batch=3, missing=0.0),
    _moments_case("no-layers", widths=(), points=900),
    _moments_case("far-from-origin", offset=4096.0),
    _moments_case("one-dimension", dims=1, widths=(5,)),
    _moments_case("all-missing", missing=1.0),
    _moments_case("no-points", points=0),
    _moments_case("no-neighbors", k=0),
    _moments_case("no-clouds", batch=0),
]
