"""The torch library namespace `avatar_ops`: loading the kernels, defining ops, checking arguments."""

from __future__ import annotations

import contextlib
import importlib.util
import numbers
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _native

NAMESPACE = "avatar_ops"
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Op -> launcher, of the ops that run in Triton where there is a GPU.
TRITON_KERNELS: dict[str, Callable] = {}
_FOLDER = Path(__file__).parent


def _load() -> bool:
    """Loads the kernels; returns whether CUDA kernels are among them."""
    if name := os.environ.get("AVATAR_OPS_ISA"):
        try:
            _native.set_isa(name)
        except ValueError as error:
            raise ValueError(f"AVATAR_OPS_ISA: {error}") from None
    torch.ops.load_library(_FOLDER / "libavatar_ops.so")
    cuda = _FOLDER / "libavatar_ops_cuda.so"
    if torch.version.cuda is None or not cuda.exists():
        return False
    torch.ops.load_library(cuda)
    return True


def define(schema: str) -> None:
    """Defines an op from its schema, without the namespace: `define("edge_max(Tensor a) -> Tensor")`."""
    torch.library.define(f"{NAMESPACE}::{schema.split('(')[0]}", "(" + schema.split("(", 1)[1])


def launch_with_triton(module: str, *names: str) -> None:
    """Gives the ops CUDA kernels: the functions of these names in avatar_ops.triton.`module`.

    The module is imported at the first call, since triton is not everywhere and takes long to import.
    """

    for name in names:

        def run(*args, name=name):
            launcher = getattr(importlib.import_module(f"{NAMESPACE}.triton.{module}"), name)
            # The op's own autocast has chosen the dtypes; products that a launcher makes by torch keep them.
            device_type = next(t for t in args if isinstance(t, Tensor)).device.type
            with torch.autocast(device_type, enabled=False):
                return launcher(*args)

        TRITON_KERNELS[name] = run
        if torch.version.cuda is not None and importlib.util.find_spec("triton") is not None:
            torch.library.impl(f"{NAMESPACE}::{name}", "CUDA", run)


def forbid_second_derivative(backward: str) -> None:
    """Makes differentiating through the op `backward` an error instead of a silent zero."""

    def raise_error(ctx, *grads):
        raise RuntimeError(f"{NAMESPACE}::{backward} has no derivative: second derivatives are not supported")

    torch.library.register_autograd(f"{NAMESPACE}::{backward}", raise_error)


def tensor_inputs(inputs: Sequence) -> list[int]:
    """Positions of an op's inputs that reached_inputs wants, found where its context is set up."""
    return [position for position, value in enumerate(inputs) if isinstance(value, Tensor)]


def reached_inputs(ctx, tensors: Sequence[int]) -> list[bool]:
    """ctx.needs_input_grad without the inputs whose gradients the running backward pass does not ask for.

    The former tells what may be asked for; a gradient in the image alone, say, needs no weight's.
    """
    reached = list(ctx.needs_input_grad)
    for position, (node, _) in zip(tensors, ctx.next_functions, strict=True):
        if node is not None and reached[position]:
            # An error tells of an input that torch.autograd.grad was called for, or of no such pass.
            with contextlib.suppress(RuntimeError):
                reached[position] = torch._C._will_engine_execute_node(node)
    return reached


def register_autocast(
    name: str, dtype_of: Callable[[str], torch.dtype | None], only: Sequence[int] | None = None
) -> None:
    """Casts the op's floating inputs under autocast to `dtype_of(device_type)` (None leaves them).

    `only` names the positions of the arguments to cast, if not all. float64 inputs are left as they are, as
    in torch's own autocast lists.
    """
    overload = getattr(torch.ops.avatar_ops, name).default
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):

        def run(*args, device_type=device_type, key=key, **kwargs):
            dtype = dtype_of(device_type)

            def cast(value):
                if isinstance(value, Tensor):
                    eligible = value.is_floating_point() and value.dtype != torch.float64
                    return value.to(dtype) if eligible and dtype is not None else value
                return [cast(part) for part in value] if isinstance(value, list | tuple) else value

            if only is None:
                args = [cast(value) for value in args]
                kwargs = {name: cast(value) for name, value in kwargs.items()}
            else:
                args = [cast(value) if n in only else value for n, value in enumerate(args)]
            keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return overload(*args, **kwargs)

        torch.library.impl(f"{NAMESPACE}::{name}", key, run)


def autocast_to_float32(name: str) -> None:
    """Runs the op in float32 under autocast."""
    register_autocast(name, lambda device_type: torch.float32)


def autocast_to_active(name: str, only: Sequence[int] | None = None) -> None:
    """Runs the op in the active autocast dtype; `only` as in register_autocast."""
    register_autocast(name, torch.get_autocast_dtype, only)


def autocast_to_input(name: str) -> None:
    """Runs the op in the dtype of its first input under autocast."""
    overload = getattr(torch.ops.avatar_ops, name).default
    for key in ("AutocastCPU", "AutocastCUDA"):

        def run(first, *args, key=key):
            keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return overload(first, *[t.to(first.dtype) if isinstance(t, Tensor) else t for t in args])

        torch.library.impl(f"{NAMESPACE}::{name}", key, run)


def describe(value) -> str:
    """A value in an error message: dtype, shape and device of a tensor, else its repr."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} on {value.device}"
    return f"{value!r} ({type(value).__name__})"


def check_floating(name: str, value, like: Tensor | None = None) -> None:
    """TypeError unless `value` is a floating tensor, of the dtype of `like` where given.

    Under autocast dtypes may differ, but for float64, since each op brings them together. RuntimeError where
    a forward-mode derivative is asked for, which no op has.
    """
    if not isinstance(value, Tensor) or value.dtype not in FLOATING:
        raise TypeError(
            f"{name}: got {describe(value)}, expected a float16, bfloat16, float32 or float64 tensor"
        )
    if like is not None and value.dtype != like.dtype:
        casts = torch.is_autocast_enabled(value.device.type)
        if not casts or torch.float64 in (value.dtype, like.dtype):
            raise TypeError(
                f"{name}: got dtype {value.dtype}, expected {like.dtype} as the other inputs have"
            )
    # torch would drop the tangent of a custom op without a word.
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None:
        raise RuntimeError(f"{name}: got a tangent, but forward-mode derivatives are not supported")


def is_size(value) -> bool:
    """Whether `value` is a positive int."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def check_slope(negative_slope) -> float:
    """ValueError unless the slope of a LeakyReLU lies in [0, 1], where the largest edge stays the largest."""
    if not isinstance(negative_slope, numbers.Real) or not 0 <= negative_slope <= 1:
        raise ValueError(f"negative_slope: got {negative_slope!r}, expected a number in [0, 1]")
    return float(negative_slope)


def check_shape(name: str, value: Tensor, expected: Sequence[int | None], meaning: str) -> None:
    """ValueError unless the shape of `value` is `expected`, where None admits any size."""
    # Small ops are called often enough for this to count.
    if value.dim() == len(expected):
        for size, want in zip(value.shape, expected, strict=True):
            if want is not None and size != want:
                break
        else:
            return
    sizes = ", ".join("*" if want is None else str(want) for want in expected)
    raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {meaning} = ({sizes})")


def check_rank(name: str, value: Tensor, ranks: Sequence[int], meaning: str) -> None:
    """ValueError unless `value` has one of the ranks."""
    if value.dim() not in ranks:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {meaning}")


def check_device(name: str, value: Tensor, like: Tensor) -> None:
    """ValueError unless both tensors are on one device."""
    if value.device != like.device:
        raise ValueError(
            f"{name}: got device {value.device}, expected {like.device} as the other inputs have"
        )


def check_option(name: str, value, options: Sequence) -> None:
    """ValueError unless `value` is one of `options`."""
    if value not in options:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, options))}")


def check_index(name: str, value) -> None:
    """TypeError unless `value` is an int64 or int32 tensor."""
    if not isinstance(value, Tensor) or value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: got {describe(value)}, expected an int64 or int32 tensor")


def check_neighbors(neighbors, like: Tensor, rows: int | None = None) -> Tensor:
    """Checks neighbours (B, M, K) or (M, K) against points or features `like`; returns them as int64.

    M has to be `rows` where that is given.
    """
    check_index("neighbors", neighbors)
    meaning = "(B, M, K)" if like.dim() == 3 else "(M, K)"
    check_shape("neighbors", neighbors, (*like.shape[: like.dim() - 2], rows, None), meaning)
    check_device("neighbors", neighbors, like)
    return neighbors.long()


define("release_memory() -> ()")


def release_memory() -> None:
    """Hands back to the system what the CPU kernels keep at hand for their next calls, at most 128 MiB.

    Results and working memory from 1 MiB and 64 KiB on are taken from there: fresh memory costs a page fault
    for each 4 KiB. Tensors in use are not touched.
    """
    torch.ops.avatar_ops.release_memory()


HAS_CUDA_KERNELS = _load()
