"""The VGG perceptual loss."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from avatar.imagenet_weights import VGG16, build_convolutions

VGG_TAPS = ("relu1_2", "relu2_2", "relu3_3", "relu4_3")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class VggFeatures(nn.Module):
    """Activations of VGG16 at named layers.

    Args:
        taps: names reluB_I, the I-th activation of block B.

    Raises:
        ValueError: taps is empty or has an unknown name.   WeightsUnavailable: see load_convolutions.

    Source: Simonyan and Zisserman, Very Deep Convolutional Networks, ICLR 2015, configuration D.
    """

    def __init__(self, taps: Sequence[str] = VGG_TAPS):
        super().__init__()
        with torch.device("meta"):
            positions = _relu_positions(VGG16.build())
        unknown = [tap for tap in taps if tap not in positions]
        if unknown or not taps:
            raise ValueError(f"taps is {tuple(taps)}, wants one or more of {', '.join(positions)}")
        self.taps = tuple(taps)
        self.positions = tuple(positions[tap] for tap in taps)
        self.layers = build_convolutions(VGG16)[: max(self.positions) + 1]
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Features (B, C, h, w) at each tap, of images (B, 3, H, W) in [0, 1]."""
        _check_images("images", images)
        x = (images.to(self.mean.dtype) - self.mean) / self.std
        found = {}
        for position, layer in enumerate(self.layers):
            x = layer(x)
            if position in self.positions:
                found[position] = x
        return [found[position] for position in self.positions]


def vgg16_features(taps: Sequence[str] = VGG_TAPS) -> VggFeatures:
    """Frozen VGG16 with ImageNet weights that returns its activations at `taps`; see VggFeatures."""
    return VggFeatures(taps)


class VggLoss(nn.Module):
    """Perceptual distance: the sum over taps of the mean absolute difference of VGG16's activations.

        loss = sum_t mean |phi_t(image) - phi_t(target)|

    Args:
        taps: layers to compare, see VggFeatures.
        size: images are resized bilinearly to size x size first; None takes them as they are.

    Source: Johnson et al., Perceptual Losses for Real-Time Style Transfer, ECCV 2016, with L1 at the taps.
    """

    def __init__(self, taps: Sequence[str] = VGG_TAPS, *, size: int | None = 224):
        super().__init__()
        if size is not None and size < 1:
            raise ValueError(f"size is {size}, wants a positive integer or None")
        self.size = size
        self.network = vgg16_features(taps)

    def features(self, images: Tensor) -> list[Tensor]:
        """Features of images (B, 3, H, W) in [0, 1] at each tap, differentiable in images."""
        _check_images("images", images)
        if self.size is not None and images.shape[-2:] != (self.size, self.size):
            images = functional.interpolate(images, size=(self.size, self.size), mode="bilinear")
        return self.network(images)

    def target_features(self, target: Tensor) -> list[Tensor]:
        """What forward accepts in place of target, to be computed once and kept; without gradient."""
        with torch.no_grad():
            return self.features(target)

    def forward(self, image: Tensor, target: Tensor | Sequence[Tensor]) -> Tensor:
        """The loss, a scalar, differentiable in image.

        Args:
            image: (B, 3, H, W) in [0, 1].
            target: (B, 3, H, W) in [0, 1], or its target_features.

        Raises:
            TypeError: image or target is not floating point.
            ValueError: a shape is wrong, or the batches or the features differ.
        """
        features = self.features(image)
        wanted = self.target_features(target) if isinstance(target, Tensor) else list(target)
        got_shapes = [tuple(feature.shape) for feature in wanted]
        wanted_shapes = [tuple(feature.shape) for feature in features]
        if got_shapes != wanted_shapes:
            raise ValueError(f"target has features {got_shapes}, those of image are {wanted_shapes}")
        differences = [functional.l1_loss(a, b) for a, b in zip(features, wanted, strict=True)]
        return torch.stack(differences).sum()


def _relu_positions(layers: nn.Sequential) -> dict[str, int]:
    positions = {}
    block, index = 1, 0
    for position, layer in enumerate(layers):
        if isinstance(layer, nn.MaxPool2d):
            block, index = block + 1, 0
        elif isinstance(layer, nn.ReLU):
            index += 1
            positions[f"relu{block}_{index}"] = position
    return positions


def _check_images(name: str, images: Tensor) -> None:
    if not images.is_floating_point():
        raise TypeError(f"{name} is {images.dtype}, wants floating point in [0, 1]")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"{name} has shape {tuple(images.shape)}, wants (B, 3, H, W)")
