"""The renderer inversion network: an image back to the latent code and the feature maps it was painted from.

Widths and statistics: Pan et al., Inverting Generative Adversarial Renderer, CVPR 2021.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from avatar.config import GeneratorConfig, InverterConfig
from avatar.models.equalized import EqualizedConv2d, EqualizedLinear
from avatar.models.generator import generator_resolutions
from avatar.models.pyramid import channels, check_images, normalize_rms


class Inversion(NamedTuple):
    """What an image shows of the generator's inside."""

    z: Tensor  # (B, latent_size), of root mean square 1
    features: list[Tensor]  # as those of Synthesis: coarse to fine, (B, channels, r, r)


class Inverter(nn.Module):
    """Latent code and feature maps of images: a 3 x 3 convolution as wide as the generator at every one of its
    resolutions, fine to coarse, between them convolutions of stride 2. Means and standard deviations of all maps
    go through an MLP that ends in the latent code.

    Args:
        generator_config: of the generator to invert.
        size: S, that of its images.

    Raises:
        ValueError: size.
    """

    def __init__(self, config: InverterConfig, generator_config: GeneratorConfig, size: int):
        super().__init__()
        self.size = size
        self.resolutions = generator_resolutions(generator_config, size)
        widths = [channels(generator_config, resolution) for resolution in self.resolutions]
        self.from_rgb = EqualizedConv2d(3, widths[-1], 1, activation="lrelu")
        self.maps = nn.ModuleList(EqualizedConv2d(width, width, 3, activation="lrelu") for width in widths)
        self.downs = nn.ModuleList(
            EqualizedConv2d(fine, coarse, 3, stride=2, activation="lrelu")
            for coarse, fine in itertools.pairwise(widths)
        )
        hidden = [config.mapping_width] * (config.mapping_layers - 1)
        sizes = [2 * sum(widths), *hidden, generator_config.latent_size]
        self.mapping = nn.Sequential(
            *(
                EqualizedLinear(inputs, outputs, activation="lrelu" if index < len(hidden) else "linear")
                for index, (inputs, outputs) in enumerate(itertools.pairwise(sizes))
            )
        )

    def forward(self, images: Tensor) -> Inversion:
        """Invert images (B, 3, S, S) in [0, 1].

        Raises:
            ValueError: shape.
        """
        check_images("images", images, 3, self.size)
        x = self.from_rgb(2 * images - 1)
        features = []
        for level in reversed(range(len(self.maps))):
            x = self.maps[level](x)
            features.append(x)
            if level > 0:
                x = self.downs[level - 1](x)
        statistics = []
        for values in features:
            variance, mean = torch.var_mean(values, (2, 3), correction=0)
            statistics += [mean, (variance + 1e-8).sqrt()]
        z = normalize_rms(self.mapping(torch.cat(statistics, 1)))
        return Inversion(z, features[::-1])

    def macs(self) -> int:
        """Multiplications for one image."""
        total = self.from_rgb.macs(self.size) + sum(layer.macs() for layer in self.mapping)
        total += sum(layer.macs(size) for layer, size in zip(self.maps, self.resolutions, strict=True))
        downs = zip(self.downs, self.resolutions[:-1], strict=True)
        return total + sum(layer.macs(size) for layer, size in downs)
