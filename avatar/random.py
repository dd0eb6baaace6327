"""Randomness that depends on the seed and the step alone, so that a resumed run draws what it would have."""

import hashlib

import torch


def keyed_generator(seed: int, purpose: str, index: int = 0) -> torch.Generator:
    """A CPU generator for one purpose at one step; the same on every machine and after every restart."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
