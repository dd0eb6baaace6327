"""Cases of nearest_sampled."""

import torch

from avatar_ops import reference
from avatar_ops.nearest_sampled import nearest_sampled
from avatar_ops.testing import OpCase, Rejection, changed, neighbors_for, poisoned


def _case(id: str, rows=60, k=6, num_points=40, sampled=10, missing=0.3) -> OpCase:
    def make(generator, dtype):
        places = torch.full((num_points,), -1)
        chosen = torch.randperm(num_points, generator=generator)[:sampled]
        places[chosen] = torch.arange(len(chosen))
        return {
            "neighbors": neighbors_for(generator, 1, rows, k, num_points, missing).squeeze(0),
            "places": places,
        }

    return OpCase(
        op="nearest_sampled",
        id=id,
        make=make,
        function=nearest_sampled,
        reference=reference.nearest_sampled,
        dtypes=(torch.float64,),
        rejections=(
            Rejection("rank", changed("neighbors", lambda t: t[0]), ValueError, "neighbors"),
            Rejection("dtype", changed("neighbors", lambda t: t.float()), TypeError, "neighbors"),
            Rejection("places", changed("places", lambda t: t[None]), ValueError, "places"),
            Rejection("places-dtype", changed("places", lambda t: t.bool()), TypeError, "places"),
            Rejection(
                "high", changed("neighbors", poisoned((3, 0), 40)), IndexError, r"neighbors\[3, 0\] = 40"
            ),
            Rejection(
                "low", changed("neighbors", poisoned((5, 0), -2)), IndexError, r"neighbors\[5, 0\] = -2"
            ),
        ),
    )


CASES = [
    _case("some"),
    _case("all-sampled", sampled=40, missing=0.0),
    _case("none-sampled", sampled=0),
    _case("one-slot", k=1),
    _case("many-rows", rows=40_000, k=16, num_points=5000, sampled=1250, missing=0.0),
    _case("no-slots", k=0),
    _case("no-rows", rows=0),
]
