"""StyleGAN2's residual discriminator.

Source: Karras et al., Analyzing and Improving the Image Quality of StyleGAN, CVPR 2020; deviation over a minibatch:
Karras et al., Progressive Growing of GANs, ICLR 2018, sec. 3.
"""

import torch
from torch import Tensor, nn

import avatar_ops
from avatar.config import DiscriminatorConfig
from avatar.models.equalized import EqualizedConv2d, EqualizedLinear
from avatar.models.pyramid import channels, check_images, fir_filter, fir_macs, resolutions

LAST = 4  # the resolution the convolutions end at


class ResidualBlock(nn.Module):
    """Halves a resolution: (B, inputs, r, r) to (B, outputs, r / 2, r / 2)."""

    def __init__(self, inputs: int, outputs: int, resolution: int):
        super().__init__()
        self.inputs, self.resolution = inputs, resolution
        self.first = EqualizedConv2d(inputs, inputs, 3, activation="lrelu")
        # Both branches are scaled by sqrt(1/2), which makes this gain sqrt(2) sqrt(1/2).
        self.second = EqualizedConv2d(inputs, outputs, 3, stride=2, activation="lrelu", gain=1.0)
        self.skip = EqualizedConv2d(inputs, outputs, 1, bias=False)
        self.register_buffer("filter", fir_filter(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.skip(avatar_ops.upfirdn2d(x, self.filter, down=2, padding=1, gain=0.5**0.5))
        return skip + self.second(self.first(x), self.filter)

    def macs(self) -> int:
        size = self.resolution
        convolutions = self.first.macs(size) + self.second.macs(size // 2) + self.skip.macs(size // 2)
        return convolutions + 2 * fir_macs(self.inputs, size)


def discriminator_resolutions(size: int) -> tuple[int, ...]:
    """Resolutions of the discriminator's feature maps, fine to coarse.

    Raises:
        ValueError: size is not 4 times a power of 2.
    """
    return resolutions(LAST, size)[::-1]


class Discriminator(nn.Module):
    """Logits of images being real: (B, 3, S, S) in [0, 1] to (B, 1).

    Args:
        size: S, 4 times a power of 2.

    Raises:
        ValueError: size.
    """

    def __init__(self, config: DiscriminatorConfig, size: int):
        super().__init__()
        self.size, self.group = size, config.group
        levels = discriminator_resolutions(size)
        widths = [channels(config, resolution) for resolution in levels]
        self.from_rgb = EqualizedConv2d(3, widths[0], 1, activation="lrelu")
        self.blocks = nn.ModuleList(
            ResidualBlock(*arguments) for arguments in zip(widths[:-1], widths[1:], levels[:-1], strict=True)
        )
        self.conv = EqualizedConv2d(widths[-1] + 1, widths[-1], 3, activation="lrelu")
        self.hidden = EqualizedLinear(widths[-1] * LAST**2, widths[-1], activation="lrelu")
        self.logit = EqualizedLinear(widths[-1], 1)

    def forward(self, images: Tensor) -> Tensor:
        """Judge images.

        Raises:
            ValueError: shape.
        """
        check_images("images", images, 3, self.size)
        x = self.from_rgb(2 * images - 1)
        for block in self.blocks:
            x = block(x)
        x = self.conv(torch.cat([x, group_deviation(x, self.group)], 1))
        return self.logit(self.hidden(x.flatten(1)))

    def macs(self) -> int:
        """Multiplications for one image."""
        total = self.from_rgb.macs(self.size) + sum(block.macs() for block in self.blocks)
        return total + self.conv.macs(LAST) + self.hidden.macs() + self.logit.macs()


def group_deviation(x: Tensor, group: int) -> Tensor:
    """Mean over channels and pixels of the standard deviation over a group of images: (B, 1, H, W).

    Groups have the largest size up to `group` that divides the batch; image b belongs to the group b mod (B / size).
    """
    batch, _, height, width = x.shape
    count = next(count for count in range(min(group, batch), 0, -1) if batch % count == 0)
    members = x.unflatten(0, (count, -1))
    deviation = (members.var(0, correction=0) + 1e-8).sqrt().mean((1, 2, 3))
    return deviation.repeat(count)[:, None, None, None].expand(-1, -1, height, width)
