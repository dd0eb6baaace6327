"""What is special to linear_act: rows at the ends of chunks, and numbers that are not finite."""

import pytest
import torch

from avatar_ops import reference
from avatar_ops.linear_act import linear_act


@pytest.mark.parametrize("points", [5, 11, 12, 13, 191, 193, 400])
@pytest.mark.parametrize("outputs", [1, 8, 16, 17, 32, 40])
def test_linear_act_of_any_number_of_rows_and_columns(points, outputs, isa):
    x, weight = torch.randn(points, 9), torch.randn(outputs, 9)
    rest, places = torch.randn(4, outputs), torch.randint(4, (points,))
    for width in (4, None):
        own = x if width is None else x[:, :width]
        options = {"rest": rest, "places": places, "negative_slope": 0.1}
        if width is not None:
            options["beside"] = x[:, width:]
        actual = linear_act(own, weight, **options)
        expected = reference.linear_act(own, weight, **options)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_linear_act_keeps_nan_within_its_row(isa):
    x = torch.randn(30, 9)
    x[7, 3] = float("nan")
    y = linear_act(x, torch.randn(20, 9), negative_slope=0.2)
    assert y[7].isnan().all()
    assert y[:7].isfinite().all()
    assert y[8:].isfinite().all()


def test_linear_act_reads_nothing_past_the_rows_that_are_added(isa):
    """A narrow last row ends where its memory does."""
    x, weight = torch.randn(13, 4), torch.randn(5, 4)
    rest = torch.randn(13 * 5 + 64)
    rest[13 * 5 :] = float("nan")
    y = linear_act(x, weight, rest=rest[: 13 * 5].view(13, 5))
    assert y.isfinite().all()
