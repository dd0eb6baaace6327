"""Cases of upfirdn2d."""

import avatar_ops
from avatar_ops import reference
from avatar_ops.testing import OpCase, Rejection, changed, normal


def _inputs(shape=(2, 3, 9, 7), taps=(4,), up=2, down=1, padding=(2, 1, 2, 1), gain=4.0):
    def inputs(generator, dtype):
        return {
            "x": normal(generator, dtype, *shape),
            "f": normal(generator, dtype, *taps),
            "up": up,
            "down": down,
            "padding": padding,
            "gain": gain,
        }

    return inputs


def _moved_bytes(inputs):
    x = inputs["x"]
    return x.numel() * x.element_size() * (1 + inputs["up"] ** 2 / inputs["down"] ** 2)


def _case(id: str, **options) -> OpCase:
    return OpCase(
        op="upfirdn2d",
        id=id,
        make=_inputs(**options),
        small=_inputs((2, 1, 4, 3)),
        function=avatar_ops.upfirdn2d,
        reference=reference.upfirdn2d,
        differentiable=("x", "f"),
        second_order=True,
        bytes=_moved_bytes,
        rejections=(
            Rejection("dtype", changed("x", lambda t: t.int()), TypeError, "x: got int32"),
            Rejection("filter-dtype", changed("f", lambda t: t.double()), TypeError, "f: got dtype"),
            Rejection("rank", changed("x", lambda t: t[0]), ValueError, r"x: got shape \(3, 9, 7\)"),
            Rejection("filter-rank", changed("f", lambda t: t[None, None]), ValueError, "f: got shape"),
            Rejection("filter-empty", changed("f", lambda t: t[:0]), ValueError, "f: got shape"),
            Rejection("device", changed("f", lambda t: t.to("meta")), ValueError, "f: got device meta"),
            Rejection("up", changed("up", 0), ValueError, "up: got 0"),
            Rejection("up-float", changed("up", 2.0), ValueError, "up: got 2.0"),
            Rejection("down", changed("down", -1), ValueError, "down: got -1"),
            Rejection("gain", changed("gain", "2"), ValueError, "gain: got '2'"),
            Rejection("padding-count", changed("padding", (1, 2)), ValueError, r"padding: got \(1, 2\)"),
            Rejection("padding-type", changed("padding", 1.5), ValueError, "padding: got 1.5"),
            Rejection("nothing-left", changed("padding", -9), ValueError, "padding: got -9.*height"),
        ),
    )


CASES = [
    _case("up-separable"),
    _case("up", taps=(3, 5), padding=(0, 4, 3, -1)),
    _case("down-separable", up=1, down=2, padding=1),
    _case("down", taps=(4, 2), up=1, down=2, padding=(1, 1, 2, -2)),
    _case("filter", shape=(2, 3, 40, 75), taps=(4,), up=1, padding=1, gain=-1.5),
    _case("three-halves", taps=(6,), up=3, down=2, padding=(5, 3, -2, 4)),
    _case("two-thirds", taps=(3, 3), up=2, down=3, padding=(1, 2, 3, 4)),
    _case("sparse-taps", taps=(2,), up=4, down=3, padding=2),
    _case("crop", taps=(1,), up=1, padding=-2),
    _case("one-pixel", shape=(1, 2, 1, 1), taps=(4, 4), up=1, padding=3),
    _case("no-pixels", shape=(2, 3, 0, 0), padding=4),
    _case("no-images", shape=(0, 3, 8, 8)),
    _case("no-channels", shape=(2, 0, 8, 8)),
]
