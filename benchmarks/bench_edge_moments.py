"""edge_moments against forming the edges, and the batch normalisation that it replaces."""

import pytest
import torch
import torch.nn.functional as F
from bench_local_attention_pool import K, inputs

import avatar_ops


@torch.no_grad()
@pytest.mark.parametrize(("points", "width"), [(65_536, 32), (16_384, 128)])
def test_edge_moments(compare, points, width):
    cloud, _, neighbors, weight, bias, _ = inputs(points, width)
    following = torch.randn(width // 2, width // 2)

    def literal():
        neighbor = cloud[neighbors]
        center = cloud.unsqueeze(1).expand_as(neighbor)
        difference = center - neighbor
        code = torch.cat([center, neighbor, difference, difference.norm(dim=-1, keepdim=True)], -1)
        hidden = F.linear(F.leaky_relu(F.linear(code, weight, bias), 0.2), following)
        return torch.var_mean(hidden, (0, 1), correction=0)

    def ours():
        mean, covariance, _ = avatar_ops.edge_moments(cloud, neighbors, [weight], [bias])
        wide = following.double()
        return ((wide @ covariance) * wide).sum(1), wide @ mean

    for a, e in zip(ours(), literal(), strict=True):
        torch.testing.assert_close(a.float(), e, rtol=1e-3, atol=1e-3)
    compare(
        f"edge_moments N={points} P={width // 2} K={K}",
        ours=ours,
        peers={"literal PyTorch": literal},
        memory=True,
    )
