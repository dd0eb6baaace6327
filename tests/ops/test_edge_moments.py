"""What is special to edge_moments: centring, and what it says of a next layer."""

import torch

import avatar_ops
from avatar_ops.testing import edge_moments as cases


def inputs(dtype=torch.float64, **options):
    make = cases._moments_case("", **options).make
    return make(torch.Generator().manual_seed(1), dtype)


def test_edge_moments_give_mean_and_variance_of_a_following_layer(isa):
    """As batch normalisation would compute them from the edges themselves."""
    values = inputs(missing=0.0, widths=(9,))
    mean, covariance, count = avatar_ops.edge_moments(**values)
    points, neighbors = values["points"], values["neighbors"]
    neighbor = points[torch.arange(points.shape[0]).view(-1, 1, 1), neighbors]
    center = points.unsqueeze(2).expand_as(neighbor)
    difference = center - neighbor
    code = torch.cat([center, neighbor, difference, difference.norm(dim=-1, keepdim=True)], -1)
    hidden = torch.nn.functional.leaky_relu(
        torch.nn.functional.linear(code, values["position_weight"][0], values["position_bias"][0]), 0.2
    )
    weight = torch.randn(4, 9, dtype=torch.float64)
    variance, center = torch.var_mean(hidden @ weight.T, (0, 1, 2), correction=0)
    torch.testing.assert_close(weight @ mean, center)
    torch.testing.assert_close(((weight @ covariance) * weight).sum(1), variance)
    assert count == neighbors.numel()


def test_edge_moments_do_not_cancel_far_from_the_origin(isa):
    """The covariance in float32 of a cloud at 1000 +- 1 is that of the cloud itself."""
    near = inputs(torch.float32, widths=(), points=3000)
    near["points"] = (near["points"] * 512).round() / 512
    far = {**near, "points": near["points"] + 1024}
    torch.testing.assert_close(
        avatar_ops.edge_moments(**far)[1], avatar_ops.edge_moments(**near)[1], rtol=1e-5, atol=1e-6
    )


def test_edge_moments_ignore_what_empty_slots_would_read(isa):
    values = inputs(missing=0.0)
    values["neighbors"] = values["neighbors"].clamp(min=1)
    values["neighbors"][:, 0] = -1
    clean = avatar_ops.edge_moments(**values)
    values["points"][:, 0] = float("nan")
    assert all(torch.equal(a, e) for a, e in zip(avatar_ops.edge_moments(**values), clean, strict=True))


def test_edge_moments_of_no_edges_are_zero():
    values = inputs(missing=1.0)
    mean, covariance, count = avatar_ops.edge_moments(**values)
    assert count == 0
    assert (mean == 0).all()
    assert (covariance == 0).all()


def test_edge_moments_are_float64_for_float32_points():
    assert all(part.dtype == torch.float64 for part in avatar_ops.edge_moments(**inputs(torch.float32)))
