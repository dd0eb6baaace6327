"""StyleGAN2's generator, on its own or conditioned on splatted point buffers.

Sources: Karras et al., Analyzing and Improving the Image Quality of StyleGAN, CVPR 2020; conditioning of every
resolution on rendered buffers: Pan et al., Inverting Generative Adversarial Renderer, CVPR 2021.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import avatar_ops
from avatar.config import GeneratorConfig
from avatar.models.equalized import EqualizedConv2d, EqualizedLinear
from avatar.models.pyramid import channels, check_images, fir_filter, fir_macs, normalize_rms, resolutions
from avatar_ops.nn import ModulatedConv2d

Noise = Literal["random", "constant", "none"]
FIXED_BUFFERS = 7  # RGB, normal, opacity


class Synthesis(NamedTuple):
    """Images and what they were made from."""

    image: Tensor  # (B, 3, S, S), about [0, 1], not clamped
    features: list[Tensor]  # last map of every resolution, coarse to fine: (B, channels, r, r)


def generator_resolutions(config: GeneratorConfig, size: int) -> tuple[int, ...]:
    """Resolutions of a generator's feature maps, coarse to fine.

    Raises:
        ValueError: size is not the first resolution times a power of 2.
    """
    start = config.start
    if start is None:
        start = size // 4 if config.condition == "splat" else 4
    return resolutions(start, size)


class MappingNetwork(nn.Module):
    """Latent codes to styles: (B, latent_size) to (B, style_size).

    Codes are divided by their root mean square first; layers learn `mapping_rate` times as fast as others.
    """

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.layers = nn.ModuleList(
            EqualizedLinear(
                config.style_size if index else config.latent_size,
                config.style_size,
                activation="lrelu",
                rate=config.mapping_rate,
            )
            for index in range(config.mapping_layers)
        )

    def forward(self, z: Tensor) -> Tensor:
        x = normalize_rms(z)
        for layer in self.layers:
            x = layer(x)
        return x

    def macs(self) -> int:
        return sum(layer.macs() for layer in self.layers)


class SynthesisBlock(nn.Module):
    """The layers of one resolution.

    Args:
        inputs: width of the coarser resolution, or None for the first one.
        buffer_channels: of the buffers added after the first convolution, or None.
    """

    def __init__(
        self, inputs: int | None, width: int, resolution: int, style_size: int, buffer_channels: int | None
    ):
        super().__init__()
        self.resolution = resolution
        injects = buffer_channels is not None
        self.first = ModulatedConv2d(
            width if inputs is None else inputs,
            width,
            style_dim=style_size,
            up=1 if inputs is None else 2,
            activation="linear" if injects else "lrelu",
        )
        self.inject = EqualizedConv2d(buffer_channels, width, 3, bias=False) if injects else None
        self.second = None if inputs is None else ModulatedConv2d(width, width, style_dim=style_size)
        self.to_rgb = ModulatedConv2d(
            width, 3, 1, style_dim=style_size, demodulate=False, noise=False, activation="linear"
        )

    def forward(
        self, x: Tensor, styles: Tensor, buffers: Tensor | None, noise: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The resolution's last feature map and its share of the image."""
        x = self.first(x, styles, noise[0])
        if self.inject is not None:
            x = avatar_ops.bias_act(x + self.inject(buffers), activation="lrelu")
        if self.second is not None:
            x = self.second(x, styles, noise[1])
        return x, self.to_rgb(x, styles)

    @property
    def noise_maps(self) -> int:
        return 1 if self.second is None else 2

    def macs(self) -> int:
        size = self.resolution
        layers = [layer for layer in (self.first, self.second, self.to_rgb) if layer is not None]
        total = sum(layer.affine_weight.numel() for layer in layers)
        for layer in layers:
            # Convolutions that double the size work on the coarser grid.
            total += layer.weight.numel() * (size // layer.up) ** 2
            if layer.up == 2:
                total += fir_macs(layer.out_channels, size)
        if self.first.up == 2:
            total += fir_macs(3, size)  # the coarser image
        return total + (0 if self.inject is None else self.inject.macs(size))


class Generator(nn.Module):
    """Images from latent codes and, with `condition` "splat", from splatted buffers.

    Without buffers this is StyleGAN2's generator with skip connections, its result moved from [-1, 1] to [0, 1].
    With buffers it starts at a quarter of the size; a 3 x 3 convolution of the buffers, averaged down to each
    resolution, is added after the first convolution of that resolution, before bias and activation; and what it
    paints is added to the splatted colours. As toRGB layers start at zero, so does what it paints.

    Args:
        size: S, the first resolution times a power of 2.
        buffer_channels: by default 7 + point_features: RGB on white, normal, opacity, learned features.

    Raises:
        ValueError: size or start do not fit, or a constant is asked for that the condition lacks.
    """

    def __init__(self, config: GeneratorConfig, size: int, buffer_channels: int | None = None):
        super().__init__()
        self.config, self.size = config, size
        self.resolutions = generator_resolutions(config, size)
        self.is_conditioned = config.condition == "splat"
        if buffer_channels is None:
            buffer_channels = FIXED_BUFFERS + config.point_features
        if self.is_conditioned and buffer_channels < 3:
            raise ValueError(f"buffer_channels: got {buffer_channels}, expected at least the 3 of RGB")
        if config.start_input == "buffer" and not self.is_conditioned:
            raise ValueError("start_input: got 'buffer', expected 'constant', as the condition is 'none'")
        self.buffer_channels = buffer_channels if self.is_conditioned else None

        widths = [channels(config, resolution) for resolution in self.resolutions]
        self.mapping = MappingNetwork(config)
        start = self.resolutions[0]
        if config.start_input == "buffer":
            self.input = EqualizedConv2d(buffer_channels, widths[0], 3)
        else:
            self.constant = nn.Parameter(torch.randn(1, widths[0], start, start))
        self.blocks = nn.ModuleList(
            SynthesisBlock(inputs, width, resolution, config.style_size, self.buffer_channels)
            for inputs, width, resolution in zip([None, *widths[:-1]], widths, self.resolutions, strict=True)
        )
        if self.is_conditioned:
            for block in self.blocks:
                nn.init.zeros_(block.to_rgb.weight)
        for index, block in enumerate(self.blocks):
            shape = (block.noise_maps, 1, 1, block.resolution, block.resolution)
            self.register_buffer(f"noise_{index}", torch.randn(shape))
        self.register_buffer("filter", fir_filter(), persistent=False)

    def forward(
        self,
        z: Tensor,
        buffers: Tensor | None = None,
        *,
        noise: Noise = "random",
        generator: torch.Generator | None = None,
    ) -> Synthesis:
        """Paint images.

        Args:
            z: (B, latent_size), of any length: only the direction counts.
            buffers: (B, buffer_channels, S, S), the first 3 channels the splatted colours on white; None without
                condition.
            noise: random: drawn at every call, from `generator` where given; constant: the maps drawn when the
                network was made; none: zero.

        Raises:
            ValueError: shape or option.
        """
        if z.dim() != 2 or z.shape[1] != self.config.latent_size:
            raise ValueError(f"z: got shape {tuple(z.shape)}, expected (B, {self.config.latent_size})")
        return self.synthesize(self.mapping(z), buffers, noise=noise, generator=generator)

    def synthesize(
        self,
        styles: Tensor,
        buffers: Tensor | None = None,
        *,
        noise: Noise = "random",
        generator: torch.Generator | None = None,
    ) -> Synthesis:
        """As forward, from styles (B, style_size) instead of latent codes."""
        batch = len(styles)
        self._check_buffers(buffers, batch)
        levels = self._buffer_levels(buffers)
        maps = self._noise_maps(noise, batch, styles, generator)
        if self.config.start_input == "buffer":
            x = self.input(levels[0])
        else:
            x = self.constant.expand(batch, -1, -1, -1)
        image = None
        features = []
        for block, level, block_maps in zip(self.blocks, levels, maps, strict=True):
            x, rgb = block(x, styles, level, block_maps)
            if image is not None:
                rgb = rgb + avatar_ops.upfirdn2d(image, self.filter, up=2, padding=(2, 1, 2, 1), gain=4)
            image = rgb
            features.append(x)
        image = image + buffers[:, :3] if self.is_conditioned else 0.5 + 0.5 * image
        return Synthesis(image, features)

    def macs(self) -> int:
        """Multiplications for one image."""
        total = self.mapping.macs() + sum(block.macs() for block in self.blocks)
        if self.config.start_input == "buffer":
            total += self.input.macs(self.resolutions[0])
        return total

    def _check_buffers(self, buffers: Tensor | None, batch: int) -> None:
        if not self.is_conditioned:
            if buffers is not None:
                raise ValueError("buffers: got a tensor, expected None: the condition is 'none'")
            return
        if buffers is None:
            shape = (batch, self.buffer_channels, self.size, self.size)
            raise ValueError(f"buffers: got None, expected {shape}: the condition is 'splat'")
        check_images("buffers", buffers, self.buffer_channels, self.size)
        if len(buffers) != batch:
            raise ValueError(f"buffers: got {len(buffers)} images, expected {batch}, one for every z")

    def _buffer_levels(self, buffers: Tensor | None) -> list[Tensor | None]:
        """The buffers averaged to every resolution, coarse to fine."""
        if buffers is None:
            return [None] * len(self.blocks)
        levels = [buffers]
        while len(levels) < len(self.blocks):
            levels.append(F.avg_pool2d(levels[-1], 2))
        return levels[::-1]

    def _noise_maps(
        self, noise: Noise, batch: int, like: Tensor, generator: torch.Generator | None
    ) -> list[list[Tensor]]:
        """For every block, a map for each of its convolutions: (B or 1, 1, r, r) or (1, 1, 1, 1)."""
        if noise == "none":
            return [[like.new_zeros(1, 1, 1, 1)] * block.noise_maps for block in self.blocks]
        if noise == "constant":
            return [list(getattr(self, f"noise_{index}")) for index in range(len(self.blocks))]
        if noise != "random":
            raise ValueError(f"noise: got {noise!r}, expected 'random', 'constant' or 'none'")
        device = like.device if generator is None else generator.device
        maps = []
        for block in self.blocks:
            shape = (block.noise_maps, batch, 1, block.resolution, block.resolution)
            maps.append(list(torch.randn(shape, generator=generator, device=device).to(like)))
        return maps
