"""StyleGAN2's networks on plain torch, with the weights of avatar's: what PyTorch users write for them today."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from peers_modulated_conv2d import fir, grouped, scaled
from torch import Tensor, nn

from avatar.models.discriminator import Discriminator
from avatar.models.equalized import EqualizedConv2d, EqualizedLinear
from avatar.models.generator import Generator
from avatar_ops.nn import ModulatedConv2d

FORMS = {"grouped": grouped, "scaled": scaled}


def filter_2d(like: Tensor) -> Tensor:
    taps = like.new_tensor([1.0, 3.0, 3.0, 1.0]) / 8
    return torch.outer(taps, taps)


def doubled(image: Tensor, f: Tensor) -> Tensor:
    """Up-sampling of an image by the filter, as a depthwise transposed convolution."""
    channels = image.shape[1]
    kernel = (4 * f)[None, None].expand(channels, 1, -1, -1)
    return F.conv_transpose2d(image, kernel, stride=2, padding=1, groups=channels)


def lrelu(x: Tensor, gain: float = 2**0.5) -> Tensor:
    return F.leaky_relu(x, 0.2) * gain


class PlainLinear(nn.Module):
    def __init__(self, layer: EqualizedLinear):
        super().__init__()
        self.weight, self.bias = nn.Parameter(layer.weight.detach()), nn.Parameter(layer.bias.detach())
        self.rate, self.activation = layer.rate, layer.activation

    def forward(self, x: Tensor) -> Tensor:
        scale = self.rate / self.weight.shape[1] ** 0.5
        y = F.linear(x, self.weight * scale, self.bias * self.rate)
        return lrelu(y) if self.activation == "lrelu" else y


class PlainLayer(nn.Module):
    """A modulated layer; form is `grouped` or `scaled`, of which toRGB uses the like without normalisation."""

    def __init__(self, layer: ModulatedConv2d, form: Callable):
        super().__init__()
        self.form, self.up = form, layer.up
        # The op correlates in its up-sampling too, the peers' transposed convolution convolves.
        weight = layer.weight.flip(2, 3) if layer.up == 2 else layer.weight
        self.weight, self.bias = nn.Parameter(weight.detach()), nn.Parameter(layer.bias.detach())
        self.affine_weight = nn.Parameter(layer.affine_weight.detach())
        self.affine_bias = nn.Parameter(layer.affine_bias.detach())
        strength = layer.noise_strength
        self.noise_strength = None if strength is None else nn.Parameter(strength.detach())

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None, f: Tensor) -> Tensor:
        styles = F.linear(w, self.affine_weight / w.shape[1] ** 0.5, self.affine_bias)
        if self.noise_strength is not None:
            return self.form(x, self.weight, styles, noise * self.noise_strength, self.bias, f, up=self.up)
        styles = styles / x.shape[1] ** 0.5
        bias = self.bias.view(1, -1, 1, 1)
        if self.form is scaled:
            return F.conv2d(x * styles[:, :, None, None], self.weight) + bias
        batch, channels, height, width = x.shape
        weight = (self.weight * styles.view(batch, 1, channels, 1, 1)).view(-1, channels, 1, 1)
        y = F.conv2d(x.reshape(1, -1, height, width), weight, groups=batch)
        return y.view(batch, -1, height, width) + bias


class PlainGenerator(nn.Module):
    """The unconditioned generator, with the constant noise."""

    def __init__(self, generator: Generator, form: Callable):
        super().__init__()
        self.mapping = nn.ModuleList(PlainLinear(layer) for layer in generator.mapping.layers)
        self.constant = nn.Parameter(generator.constant.detach())
        self.blocks = nn.ModuleList()
        self.noise = []
        for index, block in enumerate(generator.blocks):
            layers = [layer for layer in (block.first, block.second, block.to_rgb) if layer is not None]
            self.blocks.append(nn.ModuleList(PlainLayer(layer, form) for layer in layers))
            self.noise.append(getattr(generator, f"noise_{index}"))
        self.register_buffer("filter", filter_2d(self.constant.detach()))

    def forward(self, z: Tensor) -> Tensor:
        return self.synthesize(self.map(z))

    def map(self, z: Tensor) -> Tensor:
        w = z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()
        for layer in self.mapping:
            w = layer(w)
        return w

    def synthesize(self, w: Tensor) -> Tensor:
        x = self.constant.expand(len(w), -1, -1, -1)
        image = None
        for layers, maps in zip(self.blocks, self.noise, strict=True):
            *convolutions, to_rgb = layers
            for layer, noise in zip(convolutions, maps, strict=True):
                x = layer(x, w, noise, self.filter)
            rgb = to_rgb(x, w, None, self.filter)
            image = rgb if image is None else rgb + doubled(image, self.filter)
        return 0.5 + 0.5 * image


class PlainConv2d(nn.Module):
    def __init__(self, layer: EqualizedConv2d):
        super().__init__()
        self.weight = nn.Parameter(layer.weight.detach())
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach())
        self.stride, self.padding, self.activation = layer.stride, layer.padding, layer.activation
        self.gain = 2**0.5 if layer.gain is None else layer.gain

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight[0].numel() ** -0.5
        y = F.conv2d(x, self.weight * scale, self.bias, stride=self.stride, padding=self.padding)
        return lrelu(y, self.gain) if self.activation == "lrelu" else y


class PlainDiscriminator(nn.Module):
    def __init__(self, discriminator: Discriminator):
        super().__init__()
        self.group = discriminator.group
        self.from_rgb = PlainConv2d(discriminator.from_rgb)
        self.blocks = nn.ModuleList(
            nn.ModuleList(PlainConv2d(layer) for layer in (block.first, block.second, block.skip))
            for block in discriminator.blocks
        )
        for _, second, _ in self.blocks:
            second.padding = 0  # the filter's is enough
        self.conv = PlainConv2d(discriminator.conv)
        self.hidden, self.logit = PlainLinear(discriminator.hidden), PlainLinear(discriminator.logit)
        self.register_buffer("filter", filter_2d(discriminator.conv.weight.detach()))

    def forward(self, images: Tensor) -> Tensor:
        x = self.from_rgb(2 * images - 1)
        for first, second, skip in self.blocks:
            channels = x.shape[1]
            kernel = (self.filter * 0.5**0.5)[None, None].expand(channels, 1, -1, -1)
            side = skip(F.conv2d(x, kernel, stride=2, padding=1, groups=channels))
            x = second(fir(first(x), self.filter, (2, 2, 2, 2))) + side
        batch = len(x)
        count = next(count for count in range(min(self.group, batch), 0, -1) if batch % count == 0)
        members = x.view(count, -1, *x.shape[1:])
        deviation = (members.var(0, correction=0) + 1e-8).sqrt().mean((1, 2, 3)).repeat(count)
        x = torch.cat([x, deviation.view(-1, 1, 1, 1).expand(-1, -1, *x.shape[2:])], 1)
        return self.logit(self.hidden(self.conv(x).flatten(1)))


def generator_peers(generator: Generator) -> dict[str, Callable[[Tensor], Tensor]]:
    """Codes to images: both forms, eager and compiled."""
    calls = {}
    for name, form in FORMS.items():
        plain = PlainGenerator(generator, form)
        calls[name] = plain
        calls[f"{name}, compiled"] = torch.compile(plain, dynamic=False)
    return calls
