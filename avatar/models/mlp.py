"""The three small networks of a point avatar.

Sizes and initialisation: Zheng et al., PointAvatar, CVPR 2023, and its published code; the geometric
initialisation is Atzmon and Lipman, SAL, CVPR 2020.
"""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

SOFTPLUS_BETA = 100.0


def positional_encoding(points: Tensor, frequencies: int) -> Tensor:
    """Coordinates, then sine and cosine at 2^0 ... 2^(n-1): (N, 3) to (N, 3 + 6 n)."""
    features = [points]
    for power in range(frequencies):
        features += [torch.sin(points * 2.0**power), torch.cos(points * 2.0**power)]
    return torch.cat(features, -1)


def softplus(x: Tensor) -> Tensor:
    return F.softplus(x, beta=SOFTPLUS_BETA)


def hidden_linear(inputs: int, outputs: int) -> nn.Linear:
    """Weights N(0, sqrt(2) / sqrt(outputs)), zero bias."""
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, 0.0, math.sqrt(2) / math.sqrt(outputs))
    nn.init.zeros_(layer.bias)
    return layer


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def linear_layers(sizes: Sequence[int]) -> nn.ModuleList:
    """Linear layers from each size to the next."""
    return nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(sizes))


class SdfNetwork(nn.Module):
    """Signed distance and albedo logits of a canonical point: (N, 3) to (N, 4).

    Starts as a sphere of radius `sphere`. The encoded input comes back at layer `skip`.
    """

    def __init__(
        self, width: int = 256, layers: int = 10, skip: int = 4, frequencies: int = 6, sphere: float = 0.6
    ):
        super().__init__()
        inputs = 3 + 6 * frequencies
        self.frequencies, self.skip = frequencies, skip
        self.layers = nn.ModuleList()
        for index in range(layers):
            fan_in = inputs if index == 0 else width
            if index == layers - 1:
                layer = nn.Linear(fan_in, 4)
                nn.init.normal_(layer.weight, math.sqrt(math.pi) / math.sqrt(fan_in), 1e-4)
                nn.init.constant_(layer.bias, -sphere)
            else:
                layer = hidden_linear(fan_in, width - inputs if index + 1 == skip else width)
                if index == 0:
                    nn.init.zeros_(layer.weight[:, 3:])
                elif index == skip:
                    nn.init.zeros_(layer.weight[:, width - inputs + 3 :])
            self.layers.append(weight_norm(layer))

    def forward(self, points: Tensor) -> Tensor:
        encoded = positional_encoding(points, self.frequencies)
        hidden = encoded
        for index, layer in enumerate(self.layers):
            if index == self.skip:
                hidden = torch.cat([hidden, encoded], -1) / math.sqrt(2)
            hidden = layer(hidden)
            if index < len(self.layers) - 1:
                hidden = softplus(hidden)
        return hidden


class DeformerNetwork(nn.Module):
    """Blendshapes and skinning logits of a canonical point.

    Returns:
        blend: (N, pose + 3 expressions + 3): pose correctives, expression basis, offset; zero at first.
        logits: (N, bones); zero at first.
    """

    def __init__(self, blend_outputs: int, bones: int, width: int = 128, layers: int = 4):
        super().__init__()
        self.trunk = nn.ModuleList(
            weight_norm(hidden_linear(3 if index == 0 else width, width)) for index in range(layers)
        )
        self.blend = zero_linear(width, blend_outputs)
        self.skinning_hidden = weight_norm(hidden_linear(width, width))
        self.skinning = zero_linear(width, bones)

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        hidden = points
        for layer in self.trunk:
            hidden = softplus(layer(hidden))
        return self.blend(hidden), self.skinning(softplus(self.skinning_hidden(hidden)))


class TextureNetwork(nn.Module):
    """Shading of a deformed normal: (..., 3) to (..., 3) in [0, 1]."""

    def __init__(self, widths: tuple[int, ...] = (64, 64)):
        super().__init__()
        sizes = (3, *widths, 3)
        self.layers = nn.ModuleList(weight_norm(nn.Linear(*pair)) for pair in itertools.pairwise(sizes))

    def forward(self, normals: Tensor) -> Tensor:
        hidden = normals
        for layer in self.layers[:-1]:
            hidden = torch.relu(layer(hidden))
        return torch.sigmoid(self.layers[-1](hidden))


def parameter_count(module: nn.Module, *, gains: bool = False) -> int:
    """Number of weights; weight normalisation's gains are counted on request only."""
    return sum(
        parameter.numel()
        for name, parameter in module.named_parameters()
        if gains or not name.endswith("parametrizations.weight.original0")
    )


def linear_macs(module: nn.Module) -> int:
    """Multiply-accumulates of calling every linear layer of a module once, on one row."""
    return sum(
        layer.in_features * layer.out_features for layer in module.modules() if isinstance(layer, nn.Linear)
    )
