"""StyleGAN2's style-modulated convolution layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._library import check_floating, check_option, describe
from ..bias_act import SLOPES
from ..modulated_conv2d import modulated_conv2d, output_size


class ModulatedConv2d(nn.Module):
    """A convolution modulated by styles that a learned affine layer makes of w, with noise, bias, activation.

    All weights are drawn from N(0, 1) and scaled when used, by 1 / sqrt(fan-in) (equalised learning rate); the
    affine layer's bias starts at 1, the convolution's bias and the strength of the noise at 0. A toRGB layer is
    `ModulatedConv2d(channels, 3, 1, style_dim=..., demodulate=False, noise=False, activation="linear")`.

    Args:
        in_channels, out_channels: I and O.
        kernel_size: k, odd.
        style_dim: the size of w.
        demodulate: whether each filter of each sample is normalised.
        up, down: 1 or 2, not both 2; resampled with the filter [1, 3, 3, 1].
        noise: whether one map of noise, times a learned strength, is added to all channels.
        activation: "linear" or "lrelu", with the default gain of modulated_conv2d.
        clamp: the largest magnitude of the result, or None.

    Source: Karras et al., Analyzing and Improving the Image Quality of StyleGAN, CVPR 2020.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        style_dim: int,
        demodulate: bool = True,
        up: int = 1,
        down: int = 1,
        noise: bool = True,
        activation: str = "lrelu",
        clamp: float | None = None,
    ):
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: got {kernel_size}, expected an odd number")
        check_option("up", up, (1, 2))
        check_option("down", down, (1, 2))
        if up == 2 and down == 2:
            raise ValueError("down: got 2 with up = 2, expected at most one of them")
        check_option("activation", activation, tuple(SLOPES))
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.style_dim, self.demodulate, self.up, self.down = style_dim, demodulate, up, down
        self.activation, self.clamp = activation, clamp
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.affine_weight = nn.Parameter(torch.randn(in_channels, style_dim))
        self.affine_bias = nn.Parameter(torch.ones(in_channels))
        self.register_parameter("noise_strength", nn.Parameter(torch.zeros(())) if noise else None)

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None = None) -> Tensor:
        """Applies the layer.

        Args:
            x: (B, I, H, W).
            w: (B, style_dim).
            noise: broadcastable to (B, 1, H', W'), multiplied by the learned strength; None draws fresh normal
                noise where the layer has noise, so pass a fixed map to get the same image again, and zeros to
                leave it out.

        Returns:
            (B, O, H', W').
        """
        if not isinstance(w, Tensor) or w.dim() != 2 or w.shape[1] != self.style_dim:
            raise ValueError(f"w: got {describe(w)}, expected (B, {self.style_dim})")
        if not torch.is_autocast_enabled(w.device.type):
            check_floating("w", w, like=self.affine_weight)
        styles = F.linear(w / self.style_dim**0.5, self.affine_weight, self.affine_bias)
        # Demodulation cancels the scale of the weight.
        if not self.demodulate:
            styles = styles / (self.in_channels * self.kernel_size**2) ** 0.5
        if self.noise_strength is None:
            if noise is not None:
                raise ValueError(f"noise: got {describe(noise)}, expected None: this layer has no noise")
        else:
            if noise is None:
                size = output_size(
                    x.shape[2:], self.kernel_size, 4, self.kernel_size // 2, self.up, self.down
                )
                noise = torch.randn(x.shape[0], 1, *size, dtype=x.dtype, device=x.device)
            noise = noise * self.noise_strength
        return modulated_conv2d(
            x,
            self.weight,
            styles,
            demodulate=self.demodulate,
            up=self.up,
            down=self.down,
            noise=noise,
            bias=self.bias,
            activation=self.activation,
            clamp=self.clamp,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, {self.kernel_size}, style_dim={self.style_dim}, "
            f"demodulate={self.demodulate}, up={self.up}, down={self.down}, "
            f"noise={self.noise_strength is not None}, activation={self.activation!r}"
        )
