"""Peak rates of GPUs, and the least time that they allow for a call."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Peak rates by the data sheet, without sparsity: bytes/s and FLOP/s."""

    name: str
    bandwidth: float
    float32: float
    tf32: float
    bfloat16: float

    @property
    def tf32x3(self) -> float:
        return self.tf32 / 3

    def seconds(self, bytes: int, flops: int, rate: str) -> tuple[float, str]:
        """The roofline time, and what bounds it: "memory" or the rate."""
        memory, compute = bytes / self.bandwidth, flops / getattr(self, rate)
        return max(memory, compute), "memory" if memory >= compute else rate


# NVIDIA's data sheets: A100 80GB SXM, H100 SXM, H200 SXM; HGX B200, per GPU.
GPUS = (
    Gpu("A100", 2.039e12, 19.5e12, 156e12, 312e12),
    Gpu("H100", 3.35e12, 67e12, 494.5e12, 989.5e12),
    Gpu("H200", 4.8e12, 67e12, 494.5e12, 989.5e12),
    Gpu("B200", 8e12, 75e12, 1.1e15, 2.25e15),
)
