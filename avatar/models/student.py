"""The student: a small point avatar of its own, refined by small point networks, without an image."""

from dataclasses import replace

from torch import Tensor, nn

from avatar.config import StudentConfig
from avatar.head.model import HeadModel
from avatar.models.mlp import linear_macs
from avatar.models.point_avatar import PointAvatar
from avatar.models.point_features import PointFeatures, Pyramid
from avatar.models.refined import Fusion, Latent, PointHead, Refined, refine


class Student(nn.Module):
    """The compressed model: poses its points and refines them.

    Args:
        config: sizes and options.
        head: the head that moves the points, identity baked in.
        canonical_expression, expression_variance: (E,), over the training frames.
        points: (N, 3), where the canonical points start: the teacher's.
        radius: of the splats, in [-1, 1] image coordinates: the teacher's.
        latent_size: of the generator's latent code.
    """

    def __init__(
        self,
        config: StudentConfig,
        head: HeadModel,
        canonical_expression: Tensor,
        expression_variance: Tensor,
        points: Tensor,
        radius: float,
        latent_size: int = 512,
    ):
        super().__init__()
        self.config = config
        avatar_config = replace(config.avatar, points=len(points), radius=radius)
        self.avatar = PointAvatar(avatar_config, head, canonical_expression, expression_variance)
        self.avatar.set_points(points.detach().clone())
        self.features = PointFeatures(config.features)
        self.fusion = Fusion(self.features.out_channels, config.fusion_widths)
        self.head = PointHead(self.fusion.out_channels, config.head_widths)
        self.latent = Latent(2 * self.fusion.out_channels, config.latent_width, latent_size)

    def forward(self, expression: Tensor, pose: Tensor, pyramid: Pyramid) -> Refined:
        """Refined points of frames with expression (B, E) and pose (B, 15).

        Args:
            pyramid: of the N canonical points, built with config.features.
        """
        points = self.avatar.pose_points(expression, pose)
        point_features = self.features(points.posed, points.colors, pyramid)
        features = self.fusion(point_features)
        return refine(points.posed, points.colors, self.head, features, point_features, points)

    def parts(self) -> dict[str, nn.Module]:
        """The networks by the names `macs` counts them under."""
        return {
            **self.avatar.parts(),
            "randla": self.features.randla,
            "gcn": self.features.gcn,
            "fusion": self.fusion,
            "head": self.head,
            "latent": self.latent,
        }

    def macs(self, num_points: int) -> dict[str, int]:
        """Multiply-accumulates of the linear layers for one frame; of the avatar's, one pass each."""
        return {
            **self.avatar.macs(num_points),
            **self.features.macs(num_points),
            "fusion": self.fusion.macs(num_points),
            "head": num_points * linear_macs(self.head),
            "latent": linear_macs(self.latent),
        }
