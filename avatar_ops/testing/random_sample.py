"""Cases of random_sample."""

import torch

import avatar_ops
from avatar_ops import reference
from avatar_ops.testing import OpCase, Rejection, changed


def _random_sample_case(id: str, num_points, num_samples, lengths=None, **options) -> OpCase:
    def make(generator, dtype):
        inputs = {"num_points": num_points, "num_samples": num_samples, "seed": 1234, **options}
        if lengths is None:
            return {**inputs, "device": torch.device("cpu")}
        return {**inputs, "lengths": torch.tensor(lengths, dtype=torch.int64)}

    return OpCase(
        op="random_sample",
        id=id,
        make=make,
        function=avatar_ops.random_sample,
        reference=reference.random_sample,
        dtypes=(torch.float64,),
        rejections=(
            Rejection("points", changed("num_points", -1), ValueError, "num_points"),
            Rejection("samples", changed("num_samples", -1), ValueError, "num_samples"),
            Rejection("batch", changed("batch_size", 3), ValueError, r"lengths: got shape \(4,\)"),
            Rejection("length-rank", changed("lengths", lambda t: t[None]), ValueError, "lengths"),
            Rejection("length-dtype", changed("lengths", lambda t: t.float()), TypeError, "lengths"),
            Rejection("length-low", changed("lengths", lambda t: t - 1), ValueError, r"lengths\[1\] = -1"),
            Rejection("length-high", changed("num_points", 499), ValueError, r"lengths\[3\] = 500"),
            Rejection("seed", changed("seed", 2**63), ValueError, "seed"),
        ),
    )


CASES = [
    _random_sample_case("ragged", 500, 120, [90, 0, 30, 500]),
    _random_sample_case("one-cloud", 5000, 3000),
    _random_sample_case("whole-cloud", 65, 65, batch_size=3),
    _random_sample_case("small-cloud", 64, 64, batch_size=2),
    _random_sample_case("two-points", 2, 2, batch_size=3),
    _random_sample_case("huge-cloud", 2**62, 20, batch_size=2),
    _random_sample_case("no-samples", 10, 0),
    _random_sample_case("no-points", 0, 0),
    _random_sample_case("no-clouds", 10, 5, batch_size=0),
]
