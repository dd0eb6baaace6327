"""edge_max against gathering the edges and reducing them."""

import peers_edge_conv as peers
import pytest
import torch

import avatar_ops


@pytest.mark.parametrize(("points", "channels"), [(8192, 64), (65536, 64)])
def test_edge_max_forward(compare, points, channels):
    features = torch.randn(1, points, channels)
    neighbors = torch.randint(points, (1, points, 20))
    others = peers.edge_max_peers(features, neighbors)
    for peer in others.values():
        assert torch.equal(peer(), avatar_ops.edge_max(features, neighbors)[0])
    compare(
        f"edge_max N={points} C={channels} K=20",
        ours=lambda: avatar_ops.edge_max(features, neighbors),
        peers=others,
        memory=True,
    )
