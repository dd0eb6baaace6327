"""How near an image is to the truth: L1, PSNR, SSIM and LPIPS, one value per image.

Images are (B, 3, H, W) in [0, 1]. A mask (B, 1, H, W) in [0, 1] restricts a metric as PointAvatar's
evaluation without clothes does: errors are weighted by it, LPIPS sees both images multiplied by it, SSIM
sees them zeroed where it is 0.
"""

import warnings
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from avatar.imagenet_weights import ALEXNET, VGG16, load_convolutions

CLOTH_LABELS = (15, 16)
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
Denominator = Literal["pixels", "mask"]


def l1(
    prediction: Tensor, target: Tensor, mask: Tensor | None = None, *, denominator: Denominator = "pixels"
) -> Tensor:
    """Mean absolute error over pixels and channels.

        l1[b] = sum mask |prediction - target| / (3 area),   area = H W, or the sum of the mask

    Args:
        prediction: (B, 3, H, W) float32 or float64.
        target: same shape, dtype and device.
        mask: (B, 1, H, W) bool or floating point, weight of each pixel; None is 1 everywhere.
        denominator: "pixels" divides by all pixels, which flatters small masks but is what PointAvatar
            published; "mask" divides by the mask's own area, as IMavatar does.

    Returns:
        (B,) in the dtype of prediction.

    Raises:
        TypeError: a wrong or mixed dtype.   ValueError: a wrong shape, device or option, or
        denominator="mask" with a mask that is 0 all over.
    """
    _check_pair(prediction, target)
    return _masked_mean((prediction - target).abs(), mask, denominator)


def psnr(
    prediction: Tensor, target: Tensor, mask: Tensor | None = None, *, denominator: Denominator = "pixels"
) -> Tensor:
    """Peak signal-to-noise ratio in decibel, 20 log10(1 / RMSE) of each image; +inf for equal images.

    Arguments, result and errors as for l1; the mask weighs the squared errors.
    """
    _check_pair(prediction, target)
    return -10 * torch.log10(_masked_mean((prediction - target).square(), mask, denominator))


def ssim(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Structural similarity with an 11 x 11 Gaussian of sigma 1.5, over windows inside the image.

    Args:
        prediction: (B, 3, H, W) float32 or float64, H and W at least 11.
        target: same shape, dtype and device.
        mask: (B, 1, H, W); both images are set to 0 where it is 0.

    Returns:
        (B,) in the dtype of prediction, 1 for equal images.

    Raises:
        TypeError: a wrong or mixed dtype.   ValueError: a wrong shape or device.

    Source: Wang et al., Image Quality Assessment, TIP 2004, eq. 13, with C1 = 0.01^2, C2 = 0.03^2.
    """
    _check_pair(prediction, target)
    if min(prediction.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(
            f"prediction has shape {tuple(prediction.shape)}, wants H and W of at least {SSIM_WINDOW}"
        )
    if mask is not None:
        inside = _check_mask(mask, prediction) > 0
        prediction, target = prediction * inside, target * inside
    c1, c2 = 0.01**2, 0.03**2
    mean_a, mean_b = _window_mean(prediction), _window_mean(target)
    # rounding can leave a flat window's variance below zero
    variance_a = (_window_mean(prediction.square()) - mean_a.square()).clamp(min=0)
    variance_b = (_window_mean(target.square()) - mean_b.square()).clamp(min=0)
    covariance = _window_mean(prediction * target) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + c1) / (mean_a.square() + mean_b.square() + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _window_mean(images: Tensor) -> Tensor:
    """Gaussian-weighted mean of every window inside the image: (B, C, H, W) to (B, C, H - 10, W - 10)."""
    offsets = torch.arange(SSIM_WINDOW, dtype=images.dtype, device=images.device) - SSIM_WINDOW // 2
    weights = torch.softmax(-offsets.square() / (2 * SSIM_SIGMA**2), dim=0)
    channels = images.shape[1]
    column = weights.view(1, 1, -1, 1).expand(channels, -1, -1, -1)
    row = weights.view(1, 1, 1, -1).expand(channels, -1, -1, -1)
    return functional.conv2d(functional.conv2d(images, column, groups=channels), row, groups=channels)


class Lpips(nn.Module):
    """Learned perceptual image patch similarity (version 0.1), frozen; 0 for equal images, larger is worse.

    Args:
        net: "alex", the one that tables report, or "vgg".

    Raises:
        ValueError: an unknown net.   WeightsUnavailable: see avatar.imagenet_weights.load_convolutions.

    Source: Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric, CVPR 2018.
    """

    def __init__(self, net: Literal["alex", "vgg"] = "alex"):
        super().__init__()
        # the smallest side that leaves every pooling layer a window
        networks = {"alex": (ALEXNET, 31), "vgg": (VGG16, 16)}
        if net not in networks:
            raise ValueError(f"net is {net!r}, wants one of {', '.join(map(repr, networks))}")
        network, self.smallest_side = networks[net]
        weights = load_convolutions(network)
        import lpips

        with warnings.catch_warnings():
            # lpips 0.1.4 calls torchvision by arguments that torchvision has deprecated
            warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
            self.distance = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        # lpips cuts torchvision's `features` into slices and keeps each layer's own index as its name
        trunk = self.distance.net
        trunk.load_state_dict({name: weights[name.split(".", 1)[1]] for name in trunk.state_dict()})
        self.requires_grad_(False)
        self.eval()

    def forward(self, prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The distance of each pair, (B,), both images multiplied by mask; arguments and errors as for l1."""
        _check_pair(prediction, target)
        if min(prediction.shape[-2:]) < self.smallest_side:
            raise ValueError(
                f"prediction has shape {tuple(prediction.shape)}, "
                f"wants H and W of at least {self.smallest_side}"
            )
        if mask is not None:
            mask = _check_mask(mask, prediction)
            prediction, target = prediction * mask, target * mask
        dtype = next(self.parameters()).dtype
        distances = self.distance(prediction.to(dtype), target.to(dtype), normalize=True)
        return distances.flatten().to(prediction.dtype)


def image_metrics(
    prediction: Tensor,
    target: Tensor,
    lpips: Callable[..., Tensor],
    mask: Tensor | None = None,
    *,
    denominator: Denominator = "pixels",
) -> dict[str, Tensor]:
    """All four metrics of each image, without gradient: "l1", "lpips", "ssim", "psnr", each (B,).

    Arguments and errors as for l1, and lpips, an Lpips on the images' device.
    """
    with torch.no_grad():
        return {
            "l1": l1(prediction, target, mask, denominator=denominator),
            "lpips": lpips(prediction, target, mask),
            "ssim": ssim(prediction, target, mask),
            "psnr": psnr(prediction, target, mask, denominator=denominator),
        }


def no_cloth_mask(matte: Tensor, labels: Tensor) -> Tensor:
    """The matte without clothes: 0 where the face parsing says 15 (necklace) or 16 (cloth).

    Args:
        matte: (B, 1, H, W) floating point in [0, 1], the person's opacity.
        labels: (B, 1, H, W) integers, the 19 labels of BiSeNet's face parsing.

    Returns:
        (B, 1, H, W) in the dtype of matte.

    Raises:
        TypeError: matte is not floating point or labels are not integers.
        ValueError: shapes or devices differ.
    """
    if not matte.is_floating_point():
        raise TypeError(f"matte is {matte.dtype}, wants floating point")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels is {labels.dtype}, wants integers")
    if matte.ndim != 4 or matte.shape[1] != 1:
        raise ValueError(f"matte has shape {tuple(matte.shape)}, wants (B, 1, H, W)")
    if labels.shape != matte.shape or labels.device != matte.device:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)} on {labels.device}, "
            f"wants {tuple(matte.shape)} on {matte.device} as matte"
        )
    cloth = torch.isin(labels, torch.tensor(CLOTH_LABELS, dtype=labels.dtype, device=labels.device))
    return matte.masked_fill(cloth, 0)


def _masked_mean(errors: Tensor, mask: Tensor | None, denominator: str) -> Tensor:
    if denominator not in ("pixels", "mask"):
        raise ValueError(f"denominator is {denominator!r}, wants 'pixels' or 'mask'")
    if mask is None:
        return errors.mean(dim=(1, 2, 3))
    mask = _check_mask(mask, errors)
    if denominator == "pixels":
        return (errors * mask).mean(dim=(1, 2, 3))
    area = mask.sum(dim=(1, 2, 3))
    empty = (area == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"mask is 0 all over in image {empty[0]}; denominator='mask' wants a pixel inside")
    return (errors * mask).sum(dim=(1, 2, 3)) / (errors.shape[1] * area)


def _check_pair(prediction: Tensor, target: Tensor) -> None:
    for name, images in (("prediction", prediction), ("target", target)):
        if images.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} is {images.dtype}, wants float32 or float64 in [0, 1]")
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"{name} has shape {tuple(images.shape)}, wants (B, 3, H, W)")
        if 0 in images.shape[2:]:
            raise ValueError(f"{name} has shape {tuple(images.shape)}, wants at least one pixel")
    if prediction.dtype != target.dtype:
        raise TypeError(f"target is {target.dtype}, wants {prediction.dtype} as prediction")
    if prediction.shape != target.shape:
        raise ValueError(
            f"target has shape {tuple(target.shape)}, wants {tuple(prediction.shape)} as prediction"
        )
    if prediction.device != target.device:
        raise ValueError(f"target is on {target.device}, wants {prediction.device} as prediction")


def _check_mask(mask: Tensor, images: Tensor) -> Tensor:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"mask is {mask.dtype}, wants bool or floating point in [0, 1]")
    wanted = (images.shape[0], 1, *images.shape[2:])
    if mask.shape != wanted:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, wants {wanted}")
    if mask.device != images.device:
        raise ValueError(f"mask is on {mask.device}, wants {images.device} as the images")
    return mask.to(images.dtype)
