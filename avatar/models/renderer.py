"""The generative adversarial renderer: from a student's refined points to the finished image."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import avatar_ops
from avatar.config import RunConfig
from avatar.models.generator import Generator, Noise, Synthesis
from avatar.models.refined import Latent, Refined, pool_features
from avatar.splatting import Splats


@dataclass
class RenderInput:
    """What the renderer takes of B frames; all of it follows from the student."""

    pooled: Tensor  # (B, 2 C), mean and maximum of the points' features
    buffers: Tensor  # (B, 7, S, S): colour on white, normal, opacity
    fragments: avatar_ops.Fragments
    alphas: Tensor

    @staticmethod
    def of(refined: Refined, splats: Splats) -> "RenderInput":
        normals, _ = avatar_ops.composite_points(splats.fragments, refined.points.normals, splats.alphas)
        buffers = torch.cat([splats.image, normals, splats.mask], 1)
        return RenderInput(pool_features(refined.features), buffers, splats.fragments, splats.alphas)

    def tensors(self) -> dict[str, Tensor]:
        named = {"pooled": self.pooled, "buffers": self.buffers, "alphas": self.alphas}
        return named | self.fragments._asdict()

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor]) -> "RenderInput":
        fragments = avatar_ops.Fragments(*(tensors[name] for name in avatar_ops.Fragments._fields))
        return RenderInput(tensors["pooled"], tensors["buffers"], fragments, tensors["alphas"])


class Renderer(nn.Module):
    """Latent network, learned point features and generator.

    Args:
        num_points: N of the student.
        feature_channels: C of the student's features.
    """

    def __init__(self, config: RunConfig, num_points: int, feature_channels: int):
        super().__init__()
        self.latent = Latent(2 * feature_channels, config.student.latent_width, config.generator.latent_size)
        self.generator = Generator(config.generator, config.size)
        self.point_features = nn.Parameter(torch.randn(num_points, config.generator.point_features) * 0.1)

    def forward(
        self, given: RenderInput, *, noise: Noise = "constant", generator: torch.Generator | None = None
    ) -> tuple[Tensor, Synthesis]:
        """Codes z (B, latent_size) of unit root mean square, and what the generator paints of them."""
        z = self.latent(given.pooled)
        buffers = self.condition(given)
        return z, self.generator(z, buffers, noise=noise, generator=generator)

    def condition(self, given: RenderInput) -> Tensor | None:
        """The generator's buffers, None where it takes none: (B, 7 + point_features, S, S)."""
        if not self.generator.is_conditioned:
            return None
        if not self.point_features.shape[1]:
            return given.buffers
        features = self.point_features.expand(len(given.pooled), -1, -1)
        learned, _ = avatar_ops.composite_points(given.fragments, features, given.alphas)
        return torch.cat([given.buffers, learned], 1)
