"""What every Triton launcher needs: the launch itself, the precision of products, sizes of blocks."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def launch(kernel, grid: tuple[int, ...], first: Tensor, *arguments, **options) -> None:
    """Starts `kernel` with `first` and `arguments` on the device of `first`, on its current stream.

    An empty grid is no work. `tl.device_assert` traps; integer overflows are not looked for.
    """
    if 0 in grid:
        return
    guard = torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext()
    with guard:
        kernel[grid](first, *arguments, debug=True, sanitize_overflow=False, **options)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def dot_precision(dtype: torch.dtype) -> str:
    """The input_precision of `tl.dot` on numbers that came as `dtype`.

    TensorFloat-32 holds every float16 and the mantissa of every bfloat16. float32 takes three such products,
    nearly as accurate as float32's own, unless torch's switch for matrix products allows one.
    """
    if dtype == torch.float64:
        return "ieee"
    if dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "tf32x3"


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << max(0, size - 1).bit_length()
