"""Cases of modulated_conv2d."""

import torch

import avatar_ops
from avatar_ops import reference
from avatar_ops.testing import OpCase, Rejection, changed, normal


def _inputs(shape=(2, 6, 9, 8), channels=5, kernel=3, taps=None, noise=None, bias=True, **options):
    def inputs(generator, dtype):
        return {
            "x": normal(generator, dtype, *shape),
            "weight": normal(generator, dtype, channels, shape[1], kernel, kernel),
            "styles": normal(generator, dtype, *shape[:2]) + 1,
            "noise": None if noise is None else normal(generator, dtype, *noise, 1)[..., 0],
            "bias": normal(generator, dtype, channels) if bias else None,
            "resample_filter": None if taps is None else normal(generator, dtype, *taps).abs() + 0.5,
            **options,
        }

    return inputs


def _flops(inputs):
    """Multiplications and additions of the convolution in its direct form."""
    x, weight = inputs["x"], inputs["weight"]
    scale = 1 / 4 if inputs.get("down") == 2 else 1
    return 2 * x.shape[0] * x.shape[2] * x.shape[3] * weight.numel() * scale


DIFFERENTIABLE = ("x", "weight", "styles", "noise", "bias", "resample_filter")


def _case(id: str, differentiable=DIFFERENTIABLE, **options) -> OpCase:
    return OpCase(
        op="modulated_conv2d",
        id=id,
        make=_inputs(**options),
        small=_inputs((2, 2, 3, 4), 2, up=2, noise=(2, 1, 6, 8), taps=(4,), activation="lrelu", clamp=1.5),
        function=avatar_ops.modulated_conv2d,
        reference=reference.modulated_conv2d,
        differentiable=differentiable,
        second_order=True,
        composes_products=True,
        autocast_dtype=torch.bfloat16,
        flops=_flops,
        rejections=(
            Rejection("dtype", changed("x", lambda t: t.int()), TypeError, "x: got int32"),
            *(
                Rejection(
                    f"{name}-dtype", changed(name, lambda t: t.double()), TypeError, f"{name}: got dtype"
                )
                for name in ("weight", "styles", "noise", "bias", "resample_filter")
            ),
            *(
                Rejection(
                    f"{name}-device", changed(name, lambda t: t.to("meta")), ValueError, f"{name}: got device"
                )
                for name in ("weight", "styles", "noise", "bias", "resample_filter")
            ),
            Rejection("rank", changed("x", lambda t: t[0]), ValueError, r"x: got shape \(6, 9, 8\)"),
            Rejection("channels", changed("weight", lambda t: t[:, 1:]), ValueError, "weight: got shape"),
            Rejection("weight-rank", changed("weight", lambda t: t[0]), ValueError, "weight: got shape"),
            Rejection(
                "even-kernel", changed("weight", lambda t: t[..., :2, :2]), ValueError, "weight: .* odd k"
            ),
            Rejection(
                "oblong-kernel", changed("weight", lambda t: t[..., :1]), ValueError, "weight: .* odd k"
            ),
            Rejection("styles-batch", changed("styles", lambda t: t[:1]), ValueError, "styles: got shape"),
            Rejection("styles-channels", changed("styles", lambda t: t[:, 1:]), ValueError, "styles: got"),
            Rejection("up", changed("up", 3), ValueError, "up: got 3"),
            Rejection("up-float", changed("up", 2.0), ValueError, "up: got 2.0"),
            Rejection("down", changed("down", 0), ValueError, "down: got 0"),
            Rejection("up-and-down", changed("down", 2), ValueError, "down: got 2 with up = 2"),
            Rejection("padding", changed("padding", -1), ValueError, "padding: got -1"),
            Rejection("padding-type", changed("padding", (1, 1)), ValueError, r"padding: got \(1, 1\)"),
            Rejection(
                "filter-rank",
                changed("resample_filter", lambda t: t[None, None]),
                ValueError,
                "resample_filter: got shape",
            ),
            Rejection(
                "filter-oblong",
                changed("resample_filter", lambda t: t.expand(2, -1)),
                ValueError,
                r"resample_filter: got shape \(2, 4\)",
            ),
            Rejection(
                "noise-size", changed("noise", lambda t: t[..., 1:]), ValueError, "noise: got shape .*18, 16"
            ),
            Rejection(
                "noise-channels", changed("noise", lambda t: t.expand(-1, 48, -1, -1)), ValueError, "noise: "
            ),
            Rejection("noise-rank", changed("noise", lambda t: t[None]), ValueError, "noise: got shape"),
            Rejection("bias-size", changed("bias", lambda t: t[1:]), ValueError, r"bias: got shape \(47,\)"),
            Rejection("activation", changed("activation", "relu"), ValueError, "activation: got 'relu'"),
            Rejection("gain", changed("gain", "2"), ValueError, "gain: got '2'"),
            Rejection("clamp", changed("clamp", -1.0), ValueError, "clamp: got -1.0"),
            Rejection("eps", changed("eps", -1e-8), ValueError, "eps: got -1e-08"),
            Rejection("too-small", changed("x", lambda t: t[:, :, :0]), ValueError, "x: got shape"),
        ),
    )


CASES = [
    # Many channels, so that no single one that low precision moves across a kink weighs much.
    _case("up-all", channels=48, up=2, taps=(4,), noise=(2, 1, 18, 16), activation="lrelu", clamp=4.0),
    _case("up", up=2, activation="lrelu"),
    _case("up-wide-kernel", up=2, kernel=5, taps=(3, 3), padding=1),
    _case("up-point", up=2, kernel=1, taps=(6,), demodulate=False),
    # One tap divided by its sum is 1 whatever it was.
    _case("up-one-tap", differentiable=DIFFERENTIABLE[:-1], up=2, taps=(1,)),
    _case("down", down=2, activation="lrelu", noise=(5, 4), shape=(2, 6, 10, 8)),
    _case("down-odd", down=2, kernel=5, taps=(5, 5), padding=3, shape=(2, 6, 9, 7), demodulate=False),
    _case("down-point", down=2, kernel=1, taps=(2,)),
    _case("plain", noise=(2, 1, 9, 8), activation="lrelu"),
    _case("plain-small-gain", noise=(9, 1), activation="lrelu", gain=0.5, clamp=0.4),
    # Enough channels and pixels for Winograd's form, none of them a multiple of anything.
    _case("plain-tiles", shape=(2, 17, 19, 18), channels=35, noise=(2, 1, 19, 18), activation="lrelu"),
    _case("plain-linear", noise=(), gain=2.0, eps=0.3),
    _case("plain-unpadded", kernel=5, padding=0, bias=False),
    _case("rgb", kernel=1, channels=3, demodulate=False, clamp=2.0),
    _case("rgb-lrelu", kernel=1, channels=3, demodulate=False, activation="lrelu"),
    _case("no-images", shape=(0, 6, 9, 8), up=2),
    _case("no-outputs", channels=0),
    _case("no-inputs", shape=(2, 0, 4, 4), noise=(4, 4)),
]
