"""Cases of composite_points."""

import torch

import avatar_ops
from avatar_ops import Fragments, reference
from avatar_ops.testing import Inputs, OpCase, Rejection, changed, normal, poisoned


def _inputs(batch=2, count=40, size=(9, 21), slots=5, channels=20, missing=0.3, opaque=0.2):
    """Alphas in [0, 1], a share `opaque` of them 1, also NaN in empty slots."""

    def inputs(generator, dtype) -> Inputs:
        shape = (batch, *size, slots)
        indices = torch.randint(max(count, 1), shape, generator=generator)
        empty = torch.rand(shape, generator=generator) < missing
        alphas = torch.rand(shape, generator=generator, dtype=torch.float64)
        alphas[torch.rand(shape, generator=generator) < opaque] = 1
        alphas[empty] = float("nan")
        far = torch.full(shape, float("inf"), dtype=dtype)
        return {
            "fragments": Fragments(indices.masked_fill(empty, -1), far, far.clone()),
            "features": normal(generator, dtype, batch, count, channels),
            "alphas": alphas.to(dtype),
        }

    return inputs


def _small(generator, dtype) -> Inputs:
    inputs = _inputs(2, 5, (2, 3), 4, 3)(generator, dtype)
    inputs["alphas"] = inputs["alphas"].nan_to_num(0.5)
    return inputs


def _bytes(inputs: Inputs) -> int:
    indices, features, alphas = inputs["fragments"][0], inputs["features"], inputs["alphas"]
    pixels = indices.shape[0] * indices.shape[1] * indices.shape[2]
    floats = alphas.numel() + features.numel() + pixels * (features.shape[2] + 1)
    return indices.numel() * 8 + floats * features.element_size()


def _flops(inputs: Inputs) -> int:
    return inputs["alphas"].numel() * (2 * inputs["features"].shape[-1] + 3)


def _index(change):
    return changed("fragments", lambda fragments: fragments._replace(indices=change(fragments.indices)))


def _case(id: str, **options) -> OpCase:
    return OpCase(
        op="composite_points",
        id=id,
        make=_inputs(**options),
        small=_small,
        function=avatar_ops.composite_points,
        reference=reference.composite_points,
        differentiable=("features", "alphas"),
        batched=("fragments", "features", "alphas"),
        bytes=_bytes,
        flops=_flops,
        rejections=(
            Rejection(
                "index-high",
                _index(poisoned((1, 3, 4, 2), 10**9)),
                IndexError,
                r"fragments.indices\[1, 3, 4, 2\] = 1000000000",
            ),
            Rejection(
                "index-low",
                _index(poisoned((0, 8, 20, 4), -2)),
                IndexError,
                r"fragments.indices\[0, 8, 20, 4\] = -2",
            ),
            Rejection("index-dtype", _index(lambda t: t.float()), TypeError, "fragments.indices"),
            Rejection("index-rank", _index(lambda t: t[0]), ValueError, "fragments.indices"),
            Rejection("index-batch", _index(lambda t: t[:1]), ValueError, "fragments.indices"),
            Rejection("fragments-kind", changed("fragments", lambda f: f.indices), TypeError, "fragments"),
            Rejection("fragments-two", changed("fragments", lambda f: f[:2]), TypeError, "fragments"),
            Rejection("dtype", changed("features", lambda t: t.int()), TypeError, "features"),
            Rejection("mixed-dtypes", changed("alphas", lambda t: t.double()), TypeError, "alphas"),
            Rejection("rank", changed("features", lambda t: t[None]), ValueError, "features"),
            Rejection("slots", changed("alphas", lambda t: t[..., 1:]), ValueError, "alphas"),
        ),
    )


CASES = [
    _case("missing"),
    _case("colors", channels=3, slots=10),
    _case("wide", channels=150, missing=0.0),
    _case("all-missing", missing=1.0),
    _case("no-points", count=0, missing=1.0),
    _case("no-slots", slots=0),
    _case("no-channels", channels=0),
    _case("no-clouds", batch=0),
    _case("no-pixels", size=(0, 4)),
]
