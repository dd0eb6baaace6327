"""One vector of features of a whole image: ResNet with group normalisation, pooled, and layers on top.

Sources: He et al., Deep Residual Learning, CVPR 2016; Wu and He, Group Normalization, ECCV 2018.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from avatar.models.mlp import linear_layers, linear_macs
from avatar.perceptual import IMAGENET_MEAN, IMAGENET_STD

NEGATIVE_SLOPE = 0.2
GROUPS = 32


def group_norm(channels: int) -> nn.GroupNorm:
    """As many parameters as batch normalisation, but no statistics over the few frames of a batch."""
    return nn.GroupNorm(GROUPS, channels)


class ImageFeatures(nn.Module):
    """ResNet without its classifier and linear layers with LeakyReLU 0.2 over its pooled features.

    Args:
        resnet: which of torchvision's; its weights are drawn at random.
        widths: of the layers on top.
    """

    def __init__(
        self,
        resnet: Literal["resnet18", "resnet34", "resnet50"] = "resnet50",
        widths: Sequence[int] = (1024, 512),
    ):
        super().__init__()
        self.resnet = getattr(torchvision.models, resnet)(weights=None, norm_layer=group_norm)
        pooled = self.resnet.fc.in_features
        self.resnet.fc = nn.Identity()
        self.layers = linear_layers((pooled, *widths))
        self.out_channels = widths[-1]
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, widths[-1]) of images (B, 3, H, W) in [0, 1]."""
        x = self.resnet((images - self.mean) / self.std)
        for layer in self.layers:
            x = F.leaky_relu(layer(x), NEGATIVE_SLOPE)
        return x

    def macs(self, size: int) -> dict[str, int]:
        """Multiply-accumulates of convolutions and linear layers for one image of size x size."""
        return {
            "resnet": convolution_macs(self.resnet, (1, 3, size, size)),
            "layers": linear_macs(self.layers),
        }


def convolution_macs(network: nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply-accumulates of a network's convolutions for an input of this shape; nothing is computed."""
    total = 0

    def count(layer: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal total
        total += layer.weight.numel() * output.shape[0] * output.shape[2] * output.shape[3]

    hooks = [
        layer.register_forward_hook(count) for layer in network.modules() if isinstance(layer, nn.Conv2d)
    ]
    tensors = dict(network.named_parameters()) | dict(network.named_buffers())
    shapes = {name: tensor.to("meta") for name, tensor in tensors.items()}
    try:
        with torch.no_grad():
            torch.func.functional_call(network, shapes, torch.empty(shape, device="meta"))
    finally:
        for hook in hooks:
            hook.remove()
    return total
