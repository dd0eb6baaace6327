"""What PyTorch users write today for StyleGAN2's layers: the forms that circulate, eager and compiled."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def fir(z: Tensor, f: Tensor, sides, gain: float = 1) -> Tensor:
    """Padding and a depthwise convolution with the 2-D filter f."""
    channels = z.shape[1]
    kernel = (f.flip(0, 1) * gain)[None, None].expand(channels, 1, -1, -1)
    return F.conv2d(F.pad(z, sides), kernel, groups=channels)


def epilogue(y: Tensor, noise: Tensor, bias: Tensor) -> Tensor:
    return F.leaky_relu(y + noise + bias.view(1, -1, 1, 1), 0.2) * 2**0.5


def grouped(x, weight, styles, noise, bias, f, up: int = 1, down: int = 1) -> Tensor:
    """One group a sample, each with its own weight (B, O, I, 3, 3)."""
    batch, channels = x.shape[:2]
    outputs = weight.shape[0]
    w = weight.unsqueeze(0) * styles.view(batch, 1, channels, 1, 1)
    w = w * (w.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
    if down == 2:
        x = fir(x, f, (2, 2, 2, 2))
    images = x.reshape(1, -1, *x.shape[2:])
    if up == 2:
        w = w.transpose(1, 2).reshape(batch * channels, outputs, 3, 3)
        y = F.conv_transpose2d(images, w, stride=2, groups=batch).view(batch, outputs, *_doubled(x))
        return epilogue(fir(y, f, (1, 1, 1, 1), 4), noise, bias)
    w = w.view(batch * outputs, channels, 3, 3)
    y = F.conv2d(images, w, stride=down, padding=1 if down == 1 else 0, groups=batch)
    return epilogue(y.view(batch, outputs, *y.shape[2:]), noise, bias)


def scaled(x, weight, styles, noise, bias, f, up: int = 1, down: int = 1) -> Tensor:
    """Styles scale the input and norms the output of one shared convolution."""
    norms = (styles.square() @ weight.square().sum((2, 3)).t() + 1e-8).rsqrt()
    x = x * styles[:, :, None, None]
    if up == 2:
        y = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
        y = fir(y, f, (1, 1, 1, 1), 4)
    elif down == 2:
        y = F.conv2d(fir(x, f, (2, 2, 2, 2)), weight, stride=2)
    else:
        y = F.conv2d(x, weight, padding=1)
    return epilogue(y * norms[:, :, None, None], noise, bias)


def _doubled(x: Tensor) -> tuple[int, int]:
    return 2 * x.shape[2] + 1, 2 * x.shape[3] + 1


def modulated_conv2d_peers(run, *tensors, **options) -> dict:
    """Both forms, eager and compiled; run(layer, tensors) calls a layer, perhaps with its backward pass."""
    calls = {}
    for name, form in (("grouped", grouped), ("scaled", scaled)):

        def layer(*tensors, form=form):
            return form(*tensors, **options)

        calls[name] = lambda layer=layer: run(layer, tensors)
        compiled = torch.compile(layer, dynamic=False)
        calls[f"{name}, compiled"] = lambda layer=compiled: run(layer, tensors)
    return calls
