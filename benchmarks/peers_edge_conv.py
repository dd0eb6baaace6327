"""What others do for edge_conv, edge_max and an EdgeConv training step."""

from __future__ import annotations

import copy
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def gather(x: Tensor, neighbors: Tensor) -> Tensor:
    """(B, N, K, C), one cloud after the other as DGCNN's code does."""
    batch, points = x.shape[:2]
    offset = torch.arange(batch, device=x.device).view(-1, 1, 1) * points
    return x.reshape(batch * points, -1)[(neighbors + offset).flatten()].view(*neighbors.shape, -1)


def dgcnn(x, neighbors, weight, scale, shift):
    """The formulation of Wang et al.: all edges, a 1x1 convolution, then the maximum."""
    center = x.unsqueeze(2).expand(-1, -1, neighbors.shape[2], -1)
    edges = torch.cat([center, center - gather(x, neighbors)], 3).permute(0, 3, 1, 2).contiguous()
    hidden = F.conv2d(edges, weight[:, :, None, None]) * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
    return F.leaky_relu(hidden, 0.2).amax(3).transpose(1, 2)


def split(x, neighbors, weight, scale, shift):
    """Products per point in plain torch, with the scale folded in, then gather and minimum."""
    inputs = x.shape[2]
    weight = weight * scale.unsqueeze(1)
    neighbor = x @ weight[:, inputs:].T
    own = x @ weight[:, :inputs].T + shift + neighbor
    return F.leaky_relu(own - gather(neighbor, neighbors).amin(2), 0.2)


def edge_index(neighbors: Tensor) -> Tensor:
    """PyG's (2, E): source, then target."""
    batch, points, k = neighbors.shape
    offset = torch.arange(batch).view(-1, 1, 1) * points
    target = torch.arange(batch * points).repeat_interleave(k)
    return torch.stack([(neighbors + offset).flatten(), target])


def pyg_edge_conv(layers: nn.Module):
    """PyG's EdgeConv around the layers, or None where it is not installed; it uses [x_i ; x_j - x_i]."""
    if importlib.util.find_spec("torch_geometric") is None:
        return None
    from torch_geometric.nn import EdgeConv

    return EdgeConv(layers, aggr="max")


def pyg_weight(weight: Tensor) -> Tensor:
    own, difference = weight.chunk(2, 1)
    return torch.cat([own, -difference], 1)


def inference_peers(x, neighbors, weight, scale, shift) -> dict:
    compiled = torch.compile(dgcnn)
    arguments = (x, neighbors, weight, scale, shift)
    peers = {
        "DGCNN": lambda: dgcnn(*arguments),
        "torch.compile of DGCNN": lambda: compiled(*arguments),
        "split in torch": lambda: split(*arguments),
    }
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    if (conv := pyg_edge_conv(nn.Sequential(linear, nn.LeakyReLU(0.2)))) is not None:
        # Its constructor draws new parameters.
        linear.weight.data = pyg_weight(weight * scale.unsqueeze(1))
        linear.bias.data = shift.clone()
        index, flat = edge_index(neighbors), x.flatten(0, 1)
        peers["PyG EdgeConv"] = lambda: conv(flat, index).view(*x.shape[:2], -1)
    return peers


class DGCNNLayers(nn.Module):
    """The layers of an nn.EdgeConv with batch norm, over all edges."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.linears, self.norms = (copy.deepcopy(part) for part in (module.linears, module.norms))

    def forward(self, x, neighbors):
        center = x.unsqueeze(2).expand(-1, -1, neighbors.shape[2], -1)
        hidden = torch.cat([center, center - gather(x, neighbors)], 3).permute(0, 3, 1, 2).contiguous()
        for linear, norm in zip(self.linears, self.norms, strict=True):
            hidden = F.leaky_relu(norm(F.conv2d(hidden, linear.weight[:, :, None, None])), 0.2)
        return hidden.amax(3).transpose(1, 2)


def training_peers(x, neighbors, module: nn.Module) -> dict:
    """name -> forward of the one-layer nn.EdgeConv `module` in training mode; x requires grad."""
    layer, weight = DGCNNLayers(module), module.linears[0].weight.detach()
    peers = {"DGCNN": lambda: layer(x, neighbors)}
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    conv = pyg_edge_conv(nn.Sequential(linear, nn.BatchNorm1d(weight.shape[0]), nn.LeakyReLU(0.2)))
    if conv is not None:
        linear.weight.data = pyg_weight(weight)
        index = edge_index(neighbors)
        peers["PyG EdgeConv + BatchNorm"] = lambda: conv(x.flatten(0, 1), index).view(*x.shape[:2], -1)
    return peers


def edge_max_peers(features: Tensor, neighbors: Tensor) -> dict:
    def scatter():
        batch, points, channels = features.shape
        flat = gather(features, neighbors).flatten(0, 2)
        target = torch.arange(batch * points).repeat_interleave(neighbors.shape[2])
        index = target.unsqueeze(1).expand(-1, channels)
        empty = features.new_empty(batch * points, channels)
        return empty.scatter_reduce_(0, index, flat, "amax", include_self=False).view(features.shape)

    return {
        "torch gather + amax": lambda: gather(features, neighbors).amax(2),
        "torch gather + max": lambda: gather(features, neighbors).max(2).values,
        "torch scatter_reduce": scatter,
    }
