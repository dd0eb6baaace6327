"""The teacher: a fitted point avatar refined by what point networks and an image network see."""

from torch import Tensor, nn

from avatar.config import TeacherConfig
from avatar.models.image_features import ImageFeatures
from avatar.models.mlp import linear_macs
from avatar.models.point_features import PointFeatures, Pyramid
from avatar.models.refined import Fusion, Latent, PointHead, Refined, refine


class Teacher(nn.Module):
    """Offsets, fused features and latent codes for the points that a point avatar poses.

    Args:
        config: sizes and options.
        latent_size: of the generator's latent code.
    """

    def __init__(self, config: TeacherConfig, latent_size: int = 512):
        super().__init__()
        self.config = config
        self.features = PointFeatures(config.features)
        self.image = ImageFeatures(config.resnet, config.image_widths)
        self.fusion = Fusion(self.features.out_channels, config.fusion_widths, self.image.out_channels)
        self.head = PointHead(self.fusion.out_channels, config.head_widths)
        self.latent = Latent(2 * self.fusion.out_channels, config.latent_width, latent_size)

    def forward(self, posed: Tensor, colors: Tensor, image: Tensor, pyramid: Pyramid) -> Refined:
        """Refine posed points.

        Args:
            posed: (B, N, 3).   colors: (B, N, 3) in [0, 1].   image: (B, 3, H, W) in [0, 1].
            pyramid: of the N canonical points, built with config.features.
        """
        point_features = self.features(posed, colors, pyramid)
        features = self.fusion(point_features, self.image(image))
        return refine(posed, colors, self.head, features, point_features)

    def parts(self) -> dict[str, nn.Module]:
        """The networks by the names `macs` counts them under."""
        return {
            "randla": self.features.randla,
            "gcn": self.features.gcn,
            "image": self.image,
            "fusion": self.fusion,
            "head": self.head,
            "latent": self.latent,
        }

    def macs(self, num_points: int, size: int) -> dict[str, int]:
        """Multiply-accumulates of linear and convolution layers for one frame, image size x size."""
        return {
            **self.features.macs(num_points),
            "image": sum(self.image.macs(size).values()),
            "fusion": self.fusion.macs(num_points),
            "head": num_points * linear_macs(self.head),
            "latent": linear_macs(self.latent),
        }
