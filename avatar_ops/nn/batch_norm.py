"""Batch normalisation by statistics that an op gives, kept as torch's own modules keep theirs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm


def uses_batch_statistics(norm: _BatchNorm) -> bool:
    return norm.training or norm.running_mean is None


@torch.no_grad()
def track(norm: _BatchNorm, mean: Tensor, variance: Tensor, count: Tensor) -> None:
    """Updates running statistics over `count` values a channel, none of them changing nothing.

    As BatchNorm2d does: unbiased variance, and momentum None averages all batches.
    """
    if not norm.training or norm.running_mean is None:
        return
    some = count > 0
    norm.num_batches_tracked.add_(some.to(norm.num_batches_tracked.dtype))
    share = norm.momentum
    if share is None:
        share = 1 / norm.num_batches_tracked.clamp(min=1).to(mean.dtype)
    unbiased = variance * (count.double() / (count - 1).clamp(min=1)).to(variance.dtype)
    for running, batch in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        step = torch.where(some, share * (batch - running), 0)
        running.add_(step.to(running.dtype))
