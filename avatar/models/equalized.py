"""Layers with an equalised learning rate: weights from N(0, 1), scaled when used by 1 / sqrt(fan-in).

Source: Karras et al., Progressive Growing of GANs, ICLR 2018, sec. 4.1; the learning rate multiplier is that of
Karras et al., A Style-Based Generator Architecture for GANs, CVPR 2019.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import avatar_ops
from avatar_ops.conv2d_act import conv2d_act


class EqualizedLinear(nn.Module):
    """A linear layer with activation: (B, inputs) to (B, outputs).

    Args:
        activation: "linear" or "lrelu", the latter with a gain of sqrt(2).
        rate: learning rate relative to that of other layers.
    """

    def __init__(self, inputs: int, outputs: int, *, activation: str = "linear", rate: float = 1.0):
        super().__init__()
        self.activation, self.rate = activation, rate
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / rate)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        # The same as scaled weights, of which there are more.
        x = F.linear(x * (self.rate / self.weight.shape[1] ** 0.5), self.weight)
        return avatar_ops.bias_act(x, self.bias * self.rate, activation=self.activation)

    def macs(self) -> int:
        """Multiplications of one sample."""
        return self.weight.numel()


class EqualizedConv2d(nn.Module):
    """A convolution with activation: (B, inputs, H, W) to (B, outputs, H', W').

    Args:
        padding: zeros on every side, by default what keeps the size.
        activation: "linear" or "lrelu".
        gain: factor of the result, by default sqrt(2) for lrelu and 1 for linear.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int | None = None,
        bias: bool = True,
        activation: str = "linear",
        gain: float | None = None,
    ):
        super().__init__()
        self.stride = stride
        self.padding = kernel_size // 2 if padding is None else padding
        self.activation, self.gain = activation, gain
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel_size, kernel_size))
        self.register_parameter("bias", nn.Parameter(torch.zeros(outputs)) if bias else None)

    def forward(self, x: Tensor, f: Tensor | None = None) -> Tensor:
        """Applies the layer, one of stride 2 after the filter f (n,) where given, which sums to 1."""
        scale = self.weight[0].numel() ** -0.5
        return conv2d_act(
            x,
            self.weight * scale,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            f=f,
            activation=self.activation,
            gain=self.gain,
        )

    def macs(self, size: int) -> int:
        """Multiplications of one sample whose result is `size` by `size`."""
        return self.weight.numel() * size**2
