"""Sampling without replacement by a keyed permutation: schema, public function, fake."""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import check_device, check_index, check_shape, define, describe

define(
    "random_sample(Tensor key, SymInt num_points, SymInt num_samples, SymInt batch_size, Tensor? lengths)"
    " -> Tensor"
)

# Rows and columns of the permutation's grid, about the square root of this, fit 31 bits.
_MOST_POINTS = 2**62


def random_sample(
    num_points: int,
    num_samples: int,
    *,
    batch_size: int | None = None,
    lengths: Tensor | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Random distinct indices in [0, num_points), in random order, in O(num_samples) time and memory.

    Each index is the image of 0, 1, 2, ... under a pseudorandom permutation of [0, num_points) chosen by a
    64-bit key, so nothing of the size of the cloud is formed, and the same `seed` gives the same indices on
    every device, for any thread count and in every release.

    Args:
        num_points: size of the cloud(s), at most 2**62.
        num_samples: how many to draw; at most num_points unless `lengths` is given.
        batch_size: B, each element with a permutation of its own, derived from the key and its position.
        lengths: (B,) int64 (or int32) in [0, num_points]: cloud b is [0, lengths[b]). One shorter than
            num_samples gives all its points, in random order, then -1.
        seed: in [-2**63, 2**63). Without one the key comes from torch's generator (torch.manual_seed).
        generator: draws the key in place of torch's own generator; eager mode, and not beside `seed`.
        device: of the result; that of `lengths`, else of `generator`, else torch's default.

    Returns:
        (num_samples,) int64, or (B, num_samples) with `batch_size` or `lengths`.

    Raises:
        TypeError: lengths that are no integers.   ValueError: sizes, seed, options or devices that do not
        fit; a length outside [0, num_points] (CPU).

    Source: Black and Rogaway, Ciphers with arbitrary finite domains, CT-RSA 2002 (a Feistel network on a
    grid, walked until it lands inside). Reference: reference.random_sample, bit for bit.
    """
    for name, value in (("num_points", num_points), ("num_samples", num_samples)):
        _check_integer(name, value)
    for name, value in (("batch_size", batch_size), ("seed", seed)):
        if value is not None:
            _check_integer(name, value)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"generator: got {describe(generator)}, expected a torch.Generator or None")
    if not 0 <= num_points <= _MOST_POINTS:
        raise ValueError(f"num_points: got {num_points}, expected a number in [0, 2**62]")
    if num_samples < 0:
        raise ValueError(f"num_samples: got {num_samples}, expected at least 0")
    if seed is not None and generator is not None:
        raise ValueError("seed and generator: got both, expected one of them")
    batched = batch_size is not None or lengths is not None
    if lengths is not None:
        check_index("lengths", lengths)
        check_shape("lengths", lengths, (batch_size,), "(B,)")
        batch_size = lengths.shape[0]
        device = lengths.device if device is None else device
    elif num_samples > num_points:
        raise ValueError(f"num_samples: got {num_samples}, expected at most num_points = {num_points}")
    if batch_size is not None and batch_size < 0:
        raise ValueError(f"batch_size: got {batch_size}, expected at least 0")
    key = _key(seed, generator, device)
    if lengths is not None:
        check_device("lengths", lengths, key)
        lengths = lengths.long()
    indices = torch.ops.avatar_ops.random_sample(
        key, num_points, num_samples, 1 if batch_size is None else batch_size, lengths
    )
    return indices if batched else indices.squeeze(0)


def _check_integer(name: str, value) -> None:
    if not isinstance(value, int | torch.SymInt) or isinstance(value, bool):
        raise ValueError(f"{name}: got {describe(value)}, expected an int")


def _key(seed: int | None, generator: torch.Generator | None, device) -> Tensor:
    """The key, () int64: a tensor, so that a compiled graph does not depend on its value."""
    if seed is None:
        source = device if generator is None else generator.device
        key = torch.randint(2**63 - 1, (), dtype=torch.int64, generator=generator, device=source)
        return key if device is None else key.to(device)
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: got {seed}, expected an integer in [-2**63, 2**63)")
    return torch.full((), seed, dtype=torch.int64, device=device)


@torch.library.register_fake("avatar_ops::random_sample")
def _(key, num_points, num_samples, batch_size, lengths):
    return key.new_empty(batch_size, num_samples)
