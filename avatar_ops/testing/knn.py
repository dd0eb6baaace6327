"""Cases of knn."""

import torch

import avatar_ops
from avatar_ops import reference
from avatar_ops.testing import OpCase, Rejection, changed, normal


def _knn_inputs(
    batch=2, points=40, dims=3, k=6, queries=None, lengths=None, query_lengths=None, make=normal, **options
):
    def inputs(generator, dtype):
        values = {"points": make(generator, dtype, batch, points, dims), "k": k, **options}
        if queries is not None:
            values["queries"] = make(generator, dtype, batch, queries, dims)
        if lengths is not None:
            values["lengths"] = torch.tensor(lengths, dtype=torch.int64)
        if query_lengths is not None:
            values["query_lengths"] = torch.tensor(query_lengths, dtype=torch.int64)
        return values

    return inputs


def lattice(generator, dtype, *shape):
    """Small integers: many equal distances, exact in every dtype."""
    return torch.randint(-2, 3, shape, generator=generator).to(dtype)


def _far_lattice(generator, dtype, *shape):
    """Integers far from the origin, exact in every dtype: the product form would lose all digits."""
    offset = {torch.float16: 1024, torch.bfloat16: 128, torch.float32: 2**20, torch.float64: 2**40}[dtype]
    return offset + torch.randint(0, 9, shape, generator=generator).to(dtype)


def _with_bad_points(generator, dtype, *shape):
    values = normal(generator, dtype, *shape)
    values[:, 1::7, 0] = float("nan")
    values[:, 3::9, -1] = float("inf")
    return values


def _knn_case(id: str, small=None, **options) -> OpCase:
    differentiable = ("points",) if options.get("queries") is None else ("points", "queries")
    return OpCase(
        op="knn",
        id=id,
        make=_knn_inputs(**options),
        small=small,
        function=avatar_ops.knn,
        reference=reference.knn,
        differentiable=differentiable,
        batched=("points", "lengths"),
        bytes=lambda inputs: inputs["points"].numel() * 4 + inputs["points"].shape[1] * inputs["k"] * 12,
        rejections=(
            Rejection("dtype", changed("points", lambda t: t.int()), TypeError, "points"),
            Rejection("rank", changed("points", lambda t: t[None]), ValueError, "points"),
            Rejection("no-coordinates", changed("points", lambda t: t[:, :, :0]), ValueError, "points"),
            Rejection("k-negative", changed("k", -1), ValueError, "k: got -1"),
            Rejection("k-type", changed("k", 2.0), TypeError, "k: got 2.0"),
            Rejection(
                "lengths-high",
                changed("lengths", lambda t: t.new_tensor([3, 41])),
                ValueError,
                r"lengths\[1\] = 41",
            ),
            Rejection(
                "lengths-low",
                changed("lengths", lambda t: t.new_tensor([-1, 3])),
                ValueError,
                r"lengths\[0\] = -1",
            ),
            Rejection("lengths-size", changed("lengths", lambda t: t[:1]), ValueError, "lengths"),
            Rejection("lengths-dtype", changed("lengths", lambda t: t.float()), TypeError, "lengths"),
            Rejection(
                "query-lengths-high",
                lambda inputs: {**inputs, "query_lengths": torch.tensor([0, 50])},
                ValueError,
                r"query_lengths\[1\] = 50",
            ),
            Rejection(
                "exclude-self-with-queries",
                lambda inputs: {**inputs, "queries": inputs["points"]},
                ValueError,
                "exclude_self",
            ),
        ),
    )


CASES = [
    _knn_case(
        "ragged",
        lengths=[40, 5],
        exclude_self=True,
        small=_knn_inputs(2, 9, 3, 6, lengths=[9, 4], exclude_self=True),
    ),
    _knn_case("queries", queries=30, lengths=[40, 0], query_lengths=[30, 7]),
    _knn_case("line", dims=1, queries=30),
    _knn_case("plane", dims=2, points=300, k=20),
    _knn_case("cloud", points=700, batch=1, k=16),
    _knn_case("many-neighbors", points=300, k=70),
    _knn_case("more-neighbors-than-points", points=10, k=100, exclude_self=True),
    _knn_case("lattice", points=400, k=40, make=lattice),
    _knn_case("features", points=200, dims=33, k=20),
    _knn_case("features-queries", points=70, dims=64, k=9, queries=41, lengths=[70, 3]),
    _knn_case("features-lattice", points=300, dims=12, k=12, make=lattice, exclude_self=True),
    _knn_case("features-many-neighbors", points=150, dims=24, k=80),
    _knn_case("many-features", points=270, batch=1, dims=130, k=12, exclude_self=True),
    _knn_case("far", points=300, make=_far_lattice),
    _knn_case("features-far", points=300, dims=20, k=10, make=_far_lattice),
    _knn_case("bad-points", points=90, make=_with_bad_points),
    _knn_case("bad-features", points=90, dims=20, make=_with_bad_points),
    _knn_case("no-points", points=0, queries=5),
    _knn_case("no-queries", queries=0),
    _knn_case("no-neighbors", k=0),
    _knn_case("no-clouds", batch=0),
]
