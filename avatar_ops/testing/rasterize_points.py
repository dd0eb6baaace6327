"""Cases of rasterize_points."""

import torch
from torch import Tensor

import avatar_ops
from avatar_ops import reference
from avatar_ops.testing import Inputs, OpCase, Rejection, changed, distinct

IMAGE_SIZE = (21, 37)


def points_in_view(
    generator: torch.Generator, dtype: torch.dtype, batch: int, count: int, image_size=IMAGE_SIZE
) -> Tensor:
    """Points (B, N, 3) in and around the image, on a grid of 1/8 pixel, many of equal depth, some behind."""
    height, width = image_size
    spread = torch.rand(batch, count, 3, generator=generator, dtype=torch.float64)
    scale = torch.tensor([width + 8.0, height + 8.0, 40.0], dtype=torch.float64)
    points = ((spread * scale - 4) * 8).round() / 8
    points[..., 2] = points[..., 2].round() / 8
    return points.to(dtype)


def _inputs(
    batch=2,
    count=150,
    image_size=IMAGE_SIZE,
    points_per_pixel=5,
    radius=None,
    lengths=None,
    make=points_in_view,
):
    """radius None: one for each point, some of them covering nothing."""

    def inputs(generator, dtype) -> Inputs:
        points = make(generator, dtype, batch, count, image_size)
        each = torch.rand(batch, count, generator=generator, dtype=torch.float64) * 6 - 1
        return {
            "points": points,
            "image_size": image_size,
            "radius": each.to(dtype) if radius is None else radius,
            "points_per_pixel": points_per_pixel,
            "lengths": None if lengths is None else torch.tensor(lengths),
        }

    return inputs


def _small(generator, dtype) -> Inputs:
    """Every slot is taken: finite differences of an empty one's infinity say nothing."""
    points = torch.stack([distinct(generator, dtype, 2, 8) for _ in range(3)], -1)
    return {
        "points": points + points.new_tensor([2.0, 1.5, 3.0]),
        "image_size": (3, 4),
        "radius": 50.0,
        "points_per_pixel": 4,
    }


def _with_bad_values(generator, dtype, batch, count, image_size) -> Tensor:
    points = points_in_view(generator, dtype, batch, count, image_size)
    for position, value in enumerate((float("nan"), float("inf"), -float("inf"))):
        for axis in range(3):
            points[:, 3 * position + axis, axis] = value
    return points


def _identical(generator, dtype, batch, count, image_size) -> Tensor:
    return torch.tensor([10.5, 7.25, 1.0], dtype=dtype).expand(batch, count, 3).clone()


def _bytes(inputs: Inputs) -> int:
    points, (height, width) = inputs["points"], inputs["image_size"]
    slots = points.shape[0] * height * width * inputs["points_per_pixel"]
    return points.numel() * points.element_size() + slots * (8 + 2 * points.element_size())


def _case(id: str, **options) -> OpCase:
    return OpCase(
        op="rasterize_points",
        id=id,
        make=_inputs(**options),
        small=_small,
        function=avatar_ops.rasterize_points,
        reference=reference.rasterize_points,
        differentiable=("points",),
        batched=("points", "radius", "lengths"),
        bytes=_bytes,
        rejections=(
            Rejection("dtype", changed("points", lambda t: t.int()), TypeError, "points: got int32"),
            Rejection("rank", changed("points", lambda t: t[None]), ValueError, "points"),
            Rejection("axes", changed("points", lambda t: t[..., :2]), ValueError, "points"),
            Rejection("radius-dtype", changed("radius", lambda t: t.double()), TypeError, "radius"),
            Rejection("radius-shape", changed("radius", lambda t: t[:, 1:]), ValueError, "radius"),
            Rejection("radius-kind", changed("radius", "wide"), TypeError, "radius: got 'wide'"),
            Rejection("radius-negative", changed("radius", -0.5), ValueError, "radius: got -0.5"),
            Rejection("radius-nan", changed("radius", float("nan")), ValueError, "radius: got nan"),
            Rejection("image-size-kind", changed("image_size", 21), TypeError, "image_size: got 21"),
            Rejection("image-size-rank", changed("image_size", (21, 37, 3)), ValueError, "image_size"),
            Rejection("image-size-float", changed("image_size", (21, 3.5)), TypeError, "image_size: got 3.5"),
            Rejection(
                "image-size-negative", changed("image_size", (21, -1)), ValueError, "image_size: got -1"
            ),
            Rejection("slots-float", changed("points_per_pixel", 2.0), TypeError, "points_per_pixel"),
            Rejection("slots-negative", changed("points_per_pixel", -1), ValueError, "points_per_pixel"),
            Rejection("lengths-dtype", changed("lengths", lambda t: t.float()), TypeError, "lengths"),
            Rejection("lengths-shape", changed("lengths", lambda t: t[:1]), ValueError, "lengths"),
            Rejection(
                "lengths-high", changed("lengths", lambda t: t + 100), ValueError, r"lengths\[0\] = 220"
            ),
            Rejection("lengths-low", changed("lengths", lambda t: -t), ValueError, r"lengths\[0\] = -120"),
        ),
    )


CASES = [
    _case("radii-ragged", lengths=[120, 150]),
    _case("one-radius", radius=2.4),
    _case("wide", radius=9.0, points_per_pixel=12),
    _case("everywhere", radius=1e6, count=60, points_per_pixel=70),
    _case("subpixel", radius=0.3, image_size=(70, 50)),
    _case("bad-values", radius=float("inf"), make=_with_bad_values),
    _case("identical", radius=3.0, make=_identical),
    _case("far-away", radius=4.0, make=lambda *args: points_in_view(*args) + 1e4),
    _case("no-radius", radius=0),
    _case("no-slots", points_per_pixel=0),
    _case("no-points", count=0),
    _case("no-clouds", batch=0),
    _case("no-rows", image_size=(0, 5)),
    _case("no-columns", image_size=(5, 0)),
    _case("lengths-zero", lengths=[0, 3]),
]
