"""Cases of bias_act."""

import avatar_ops
from avatar_ops import reference
from avatar_ops.testing import OpCase, Rejection, changed, normal


def _inputs(shape=(2, 5, 6, 7), bias=True, activation="lrelu", gain=None, clamp=None):
    def inputs(generator, dtype):
        return {
            "x": normal(generator, dtype, *shape),
            "bias": normal(generator, dtype, shape[1]) if bias else None,
            "activation": activation,
            "gain": gain,
            "clamp": clamp,
        }

    return inputs


def _with_nan(make):
    def inputs(generator, dtype):
        result = make(generator, dtype)
        result["x"].view(-1)[::5] = float("nan")
        return result

    return inputs


def _moved_bytes(inputs):
    return 2 * inputs["x"].numel() * inputs["x"].element_size()


def _case(id: str, make=None, **options) -> OpCase:
    return OpCase(
        op="bias_act",
        id=id,
        make=make or _inputs(**options),
        small=_inputs((2, 3, 2, 3), clamp=0.9),
        function=avatar_ops.bias_act,
        reference=reference.bias_act,
        differentiable=("x", "bias"),
        second_order=True,
        bytes=_moved_bytes,
        rejections=(
            Rejection("dtype", changed("x", lambda t: t.long()), TypeError, "x: got int64"),
            Rejection("bias-dtype", changed("bias", lambda t: t.double()), TypeError, "bias: got dtype"),
            Rejection("rank", changed("x", lambda t: t[0, :, 0, 0]), ValueError, r"x: got shape \(5,\)"),
            Rejection("bias-size", changed("bias", lambda t: t[1:]), ValueError, r"bias: got shape \(4,\)"),
            Rejection(
                "bias-rank", changed("bias", lambda t: t[None]), ValueError, r"bias: got shape \(1, 5\)"
            ),
            Rejection("device", changed("bias", lambda t: t.to("meta")), ValueError, "bias: got device meta"),
            Rejection("activation", changed("activation", "relu"), ValueError, "activation: got 'relu'"),
            Rejection("gain", changed("gain", "2"), ValueError, "gain: got '2'"),
            Rejection("clamp", changed("clamp", -1.0), ValueError, "clamp: got -1.0"),
            Rejection("clamp-nan", changed("clamp", float("nan")), ValueError, "clamp: got nan"),
        ),
    )


CASES = [
    _case("clamp", clamp=0.9),
    _case("lrelu"),
    _case("lrelu-small-gain", gain=0.25),
    _case("lrelu-negative-gain", gain=-1.5, bias=False),
    _case("linear", activation="linear", gain=3.0),
    _case("linear-clamp", activation="linear", clamp=0.5),
    _case("wide", shape=(2, 3, 50, 61), gain=1.25),
    _case("many-samples", shape=(70, 3, 16)),
    _case("large-images", shape=(2, 3, 40, 64), clamp=1.5),
    _case("matrix", shape=(9, 4)),
    _case("matrix-clamp", shape=(7, 35), clamp=0.9),
    _case("matrix-tall", shape=(600, 5), gain=0.5),
    _case("sequence", shape=(2, 4, 33), bias=False),
    _case("volume", shape=(2, 2, 3, 4, 5)),
    _case("nan", make=_with_nan(_inputs(clamp=1.0))),
    _case("no-batch", shape=(0, 3, 4)),
    _case("no-channels", shape=(2, 0, 4)),
    _case("no-inner", shape=(2, 3, 0)),
]
