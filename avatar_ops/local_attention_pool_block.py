"""RandLA-Net's dilated residual block in evaluation as one op on the CPU: schema, function, fake."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._library import check_floating, check_neighbors, check_shape, define
from .linear_act import NormedLayer

define(
    "local_attention_pool_block(Tensor points, Tensor features, Tensor neighbors, Tensor[] layers, "
    "float[] eps, Tensor[] scores, float negative_slope) -> Tensor"
)


def local_attention_pool_block(
    points: Tensor,
    features: Tensor,
    neighbors: Tensor,
    layers: Sequence[NormedLayer],
    eps: Sequence[float],
    scores: Sequence[Tensor],
    negative_slope: float,
) -> Tensor | None:
    """The block that `nn.LocalFeatureAggregation` describes, with norms by the statistics given.

    Args:
        points: (B, N, D).   features: (B, N, C).   neighbors: (B, N, K), -1 for none; all unbatched, too.
        layers: reduce, encode.0, encode.1, attend.0, attend.1, expand, shortcut.   eps: of their norms.
        scores: two (d, d).   negative_slope: of every LeakyReLU.

    Returns:
        (B, N, 2 d); None where the steps have to be taken one by one: a gradient is wanted, tensors are
        elsewhere than on the CPU or of several dtypes, or autocast is on.

    Raises:
        What `local_attention_pool` does.   ValueError: layers of other shapes.
    """
    parts = [part for layer in layers for part in layer]
    tensors = [points, features, *parts, *scores]
    if torch.is_autocast_enabled(points.device.type) or any(
        not t.is_cpu or t.dtype != points.dtype for t in tensors
    ):
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return None
    check_floating("points", points)
    check_floating("features", features, points)
    check_shape("features", features, (*points.shape[:-1], None), "the points' shape but for channels")
    neighbors = check_neighbors(neighbors, points, rows=points.shape[-2])
    batched = points.dim() == 3
    if not batched:
        points, features, neighbors = points.unsqueeze(0), features.unsqueeze(0), neighbors.unsqueeze(0)
    result = torch.ops.avatar_ops.local_attention_pool_block(
        points, features, neighbors, parts, list(eps), list(scores), negative_slope
    )
    return result if batched else result.squeeze(0)


@torch.library.register_fake("avatar_ops::local_attention_pool_block")
def _(points, features, neighbors, layers, eps, scores, negative_slope):
    return points.new_empty(points.shape[0], points.shape[1], 2 * scores[0].shape[0])
