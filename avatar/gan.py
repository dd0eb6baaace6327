"""Losses and averaging of the image networks, one function each.

Sources: logistic losses: Goodfellow et al., Generative Adversarial Nets, 2014; R1: Mescheder et al., Which
Training Methods for GANs do actually Converge?, ICML 2018; path length and moving average: Karras et al.,
Analyzing and Improving the Image Quality of StyleGAN, CVPR 2020, and its published code.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avatar.models.generator import Synthesis
from avatar.models.inverter import Inverter
from avatar.models.pyramid import normalize_rms


def generator_loss(fake: Tensor) -> Tensor:
    """mean softplus(-fake) over logits (B, 1)."""
    return F.softplus(-fake).mean()


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """mean softplus(-real) + mean softplus(fake) over logits (B, 1)."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def r1_penalty(discriminator: nn.Module, real: Tensor, gamma: float) -> Tensor:
    """gamma / 2 times the mean over images of |d logit / d image|^2 (Mescheder et al., eq. 9).

    Args:
        discriminator: images to logits.
        real: (B, 3, S, S).
    """
    real = real.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(discriminator(real).sum(), real, create_graph=True)
    return gamma / 2 * gradient.square().sum((1, 2, 3)).mean()


class PathLength(nn.Module):
    """Holds the length of the generator's steps per step in style to their running mean a.

        mean (|J^T y| - a)^2,  J = d image / d style,  y ~ N(0, 1) / sqrt(H W)

    Source: Karras et al. 2020, sec. 3.2, eq. 4. a follows the mean length at the rate `decay`.
    """

    def __init__(self, decay: float = 0.01):
        super().__init__()
        self.decay = decay
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, images: Tensor, styles: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The penalty; also moves the running mean.

        Args:
            images: (B, 3, H, W), made from styles.
            styles: (B, style_size), in the graph of images.
            generator: draws y.
        """
        device = images.device if generator is None else generator.device
        y = torch.randn(images.shape, generator=generator, device=device).to(images)
        y = y / math.sqrt(images.shape[2] * images.shape[3])
        (gradient,) = torch.autograd.grad((images * y).sum(), styles, create_graph=True)
        # Finite slope at zero, where a generator stands that does not paint yet.
        lengths = (gradient.square().sum(1) + 1e-8).sqrt()
        with torch.no_grad():
            self.mean.lerp_(lengths.mean().to(self.mean), self.decay)
        return (lengths - self.mean).square().mean()


def inversion_loss(inverter: Inverter, z: Tensor, synthesis: Synthesis) -> Tensor:
    """How far the inverter is from the code and the feature maps an image was made from (eq. 9).

        MSE(z', z / rms(z)) + sum_i mean |R_i - G_i|

    The gradient reaches the inverter alone: neither z nor the generator.

    Args:
        z: (B, latent_size), what the images were made from.
        synthesis: what the generator made of it.
    """
    inversion = inverter(synthesis.image.detach())
    loss = F.mse_loss(inversion.z, normalize_rms(z.detach()))
    for ours, theirs in zip(inversion.features, synthesis.features, strict=True):
        loss = loss + F.l1_loss(ours, theirs.detach())
    return loss


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """mean (1 - cos(a, b)) over vectors (..., C)."""
    return (1 - F.cosine_similarity(a, b, dim=-1)).mean()


class Ema(nn.Module):
    """A copy of a model whose weights are the exponential moving average of the model's.

    Saved and restored by its state_dict, after which it goes on bitwise as it would have.

    Args:
        half_life: images after which a weight's share has halved.

    Source: Karras et al., Progressive Growing of GANs, ICLR 2018; half-life in images as in StyleGAN2's code.
    """

    def __init__(self, model: nn.Module, half_life: float):
        super().__init__()
        self.half_life = half_life
        self.model = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: nn.Module, images: int) -> None:
        """Take the model's present weights in, after a step on so many images; buffers are copied."""
        share = 1 - 0.5 ** (images / self.half_life)
        for average, value in zip(self.model.parameters(), model.parameters(), strict=True):
            average.lerp_(value, share)
        for average, value in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(value)
