"""Cases of linear_act."""

import torch

from avatar_ops import reference
from avatar_ops.linear_act import linear_act
from avatar_ops.testing import OpCase, Rejection, changed, normal, poisoned


def _inputs(batch=2, points=70, channels=20, outputs=36, beside=7, rest=13, bias=True, negative_slope=0.2):
    """`beside`: None or its width; `rest`: None, 0 for one row per point, else the rows that places name."""

    def make(generator, dtype):
        inputs = channels + (beside or 0)
        values = {
            "x": normal(generator, dtype, batch, points, channels),
            "weight": normal(generator, dtype, outputs, inputs) / max(inputs, 1) ** 0.5,
            "bias": normal(generator, dtype, outputs) if bias else None,
            "beside": None if beside is None else normal(generator, dtype, batch, points, beside),
            "rest": None,
            "places": None,
            "negative_slope": negative_slope,
        }
        if rest is not None:
            values["rest"] = normal(generator, dtype, batch, rest or points, outputs)
        if rest:
            values["places"] = torch.randint(rest, (points,), generator=generator)
        return values

    return make


def _case(id: str, **options) -> OpCase:
    return OpCase(
        op="linear_act",
        id=id,
        make=_inputs(**options),
        small=_inputs(2, 5, 3, 4, 2, 2),
        function=linear_act,
        reference=reference.linear_act,
        differentiable=("x", "weight", "bias", "beside", "rest"),
        second_order=True,
        composes_products=True,
        autocast_dtype=torch.bfloat16,
        batched=("x", "beside", "rest"),
        rejections=(
            Rejection("dtype", changed("x", lambda t: t.int()), TypeError, "x"),
            Rejection("mixed", changed("weight", lambda t: t.double()), TypeError, "weight: got dtype"),
            Rejection("rank", changed("x", lambda t: t[0, 0]), ValueError, "x"),
            Rejection("columns", changed("weight", lambda t: t[:, 1:]), ValueError, "weight"),
            Rejection("beside", changed("beside", lambda t: t[:, 1:]), ValueError, "beside"),
            Rejection("beside-dtype", changed("beside", lambda t: t.int()), TypeError, "beside"),
            Rejection("bias", changed("bias", lambda t: t[1:]), ValueError, "bias"),
            Rejection("rest", changed("rest", lambda t: t[..., 1:]), ValueError, "rest"),
            Rejection("places", changed("places", lambda t: t[1:]), ValueError, "places"),
            Rejection("place-dtype", changed("places", lambda t: t.float()), TypeError, "places"),
            Rejection("alone", changed("rest", None), ValueError, "places: got some without rest"),
            Rejection("slope", changed("negative_slope", -0.1), ValueError, "negative_slope"),
            Rejection("place", changed("places", poisoned((5,), 13)), IndexError, r"places\[5\] = 13"),
            Rejection("negative", changed("places", poisoned((7,), -1)), IndexError, r"places\[7\] = -1"),
        ),
    )


CASES = [
    # bfloat16 turns the sign of sums near zero: a steep kink there would be all that autocast's gradients show.
    _case("places", negative_slope=0.7),
    _case("steep"),
    _case("row-by-row", rest=0, negative_slope=0.0),
    _case("alone", beside=None, rest=None, outputs=8),
    _case("no-bias", beside=None, rest=None, bias=False, negative_slope=1.0, outputs=19),
    _case("wide", points=301, channels=130, outputs=150),
    _case("one-point", points=1),
    _case("no-points", points=0),
    _case("no-channels", channels=0, beside=0),
    _case("no-outputs", outputs=0),
    _case("no-clouds", batch=0),
]
