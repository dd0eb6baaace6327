"""Other ways to pool a neighbourhood with attention: each function takes the arguments of
`avatar_ops.local_attention_pool` for one cloud, one position layer and no missing neighbours."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def literal(points, features, neighbors, position_weight, position_bias, score_weight):
    """The formula, edge by edge, in plain PyTorch."""
    neighbor = points[neighbors]
    center = points.unsqueeze(1).expand_as(neighbor)
    difference = center - neighbor
    code = torch.cat([center, neighbor, difference, difference.norm(dim=-1, keepdim=True)], -1)
    position = F.leaky_relu(F.linear(code, position_weight, position_bias), 0.2)
    hidden = torch.cat([features[neighbors], position], -1)
    attention = F.linear(hidden, score_weight).softmax(1)
    return (attention * hidden).sum(1)


def pyg_layer(neighbors):
    """The layer as PyTorch Geometric users write it: messages over an edge list, softmax per target."""
    import torch_geometric.nn
    import torch_geometric.utils

    rows, k = neighbors.shape
    target = torch.arange(rows).repeat_interleave(k)
    edges = torch.stack([neighbors.flatten(), target])

    class AttentivePooling(torch_geometric.nn.MessagePassing):
        def __init__(self):
            super().__init__(aggr="add")

        def forward(self, points, features, weights):
            return self.propagate(edges, x=features, pos=points, weights=weights, size=(rows, rows))

        def message(self, x_j, pos_i, pos_j, weights, index):
            position_weight, position_bias, score_weight = weights
            difference = pos_i - pos_j
            code = torch.cat([pos_i, pos_j, difference, difference.norm(dim=1, keepdim=True)], 1)
            position = F.leaky_relu(F.linear(code, position_weight, position_bias), 0.2)
            hidden = torch.cat([x_j, position], 1)
            scores = F.linear(hidden, score_weight)
            return torch_geometric.utils.softmax(scores, index, num_nodes=rows) * hidden

    layer = AttentivePooling()

    def run(points, features, _, position_weight, position_bias, score_weight):
        return layer(points, features, (position_weight, position_bias, score_weight))

    return run


def pool_peers(neighbors) -> dict[str, object]:
    """Name -> function; PyTorch Geometric only where it is installed."""
    peers = {"literal PyTorch": literal, "torch.compile": torch.compile(literal)}
    try:
        peers["PyG layer"] = pyg_layer(neighbors)
    except ImportError:
        print("torch-geometric is not installed: its layer is left out")
    return peers
