"""Training losses, one function each.

Sources: Zheng et al., PointAvatar, CVPR 2023 (and its published code); eikonal: Gropp et al., Implicit
geometric regularization, ICML 2020. Perceptual losses are in perceptual.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import avatar_ops
from avatar.models.point_avatar import Fields, PointAvatar

EXPRESSION_WEIGHT = 1000.0
POSE_WEIGHT = 1000.0
SKINNING_WEIGHT = 0.1
VARIANCE_SHARE = 50.0
EIKONAL_RANGE = 0.25


def rgb(image: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error over the whole image (PointAvatar, eq. 9)."""
    return F.l1_loss(image, target)


def mask(opacity: Tensor, matte: Tensor) -> Tensor:
    """Mean absolute error of the accumulated opacity."""
    return F.l1_loss(opacity, matte)


def surface(sdf: Tensor) -> Tensor:
    """The signed distance is zero at the points: they carry the surface."""
    return (sdf**2).mean()


def eikonal(gradient: Tensor) -> Tensor:
    """A distance grows at rate one: mean (|gradient| - 1)^2 over samples (N, 3)."""
    return ((gradient.norm(dim=-1) - 1) ** 2).mean()


def eikonal_samples(
    avatar: PointAvatar, at_points: Tensor, count: int | None, generator: torch.Generator
) -> Tensor:
    """Gradients of the distance at the points and as many within +- 0.25 of them, or at a draw of both.

    Args:
        at_points: (N, 3), known gradients at all points.
        count: gradients wanted, None for 2 N.
        generator: on the CPU.
    """
    near = avatar.points.detach()
    if count is not None:
        chosen = torch.randint(len(near), (max(1, count // 2),), generator=generator).to(near.device)
        near, at_points = near[chosen], at_points[chosen]
    noise = (torch.rand(near.shape, generator=generator) * 2 - 1) * EIKONAL_RANGE
    _, beside = avatar.sdf_and_gradient(near + noise.to(near.device))
    return torch.cat([at_points, beside])


def flame(avatar: PointAvatar, fields: Fields) -> Tensor:
    """Hold the deformer's fields to those of the nearest canonical vertex of the head.

        1000 MSE(E) / (50 var) + 1000 MSE(P) + 0.1 MSE(W)

    at the points moved onto the head by their offset; var is each expression's variance over the training
    frames, at least a hundredth of the largest, lest an unused expression outweigh all others.
    """
    head = avatar.head
    on_head = (avatar.points + fields.offset).detach()
    nearest = avatar_ops.knn(avatar.canonical_vertices, 1, queries=on_head).indices[:, 0]
    variance = avatar.expression_variance
    variance = torch.maximum(variance, 0.01 * variance.max()).clamp_min(1e-8)
    errors = (fields.expression - head.expression_basis[nearest]) ** 2
    loss = EXPRESSION_WEIGHT * (errors / (VARIANCE_SHARE * variance)).mean()
    if head.num_pose_features:
        loss = loss + POSE_WEIGHT * F.mse_loss(fields.pose, head.pose_basis[nearest])
    return loss + SKINNING_WEIGHT * F.mse_loss(fields.weights, head.weights_with_ghost()[nearest])
