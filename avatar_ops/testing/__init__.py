"""OpCase: what tests and benchmarks share about each op - inputs, reference, tolerances, bytes and FLOPs."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Inputs = dict[str, object]


@dataclass(frozen=True)
class Rejection:
    """Inputs that an op must refuse: `change` edits valid inputs, `error` and `match` say how it answers."""

    id: str
    change: Callable[[Inputs], Inputs]
    error: type[Exception]
    match: str

    @property
    def of_data(self) -> bool:
        """Whether a value in a tensor is what is wrong: the kernel finds it, and traps where it is on a GPU."""
        return r"\] = " in self.match


@dataclass(frozen=True)
class OpCase:
    """One op on one kind of input.

    make(generator, dtype) returns keyword arguments of `function` and `reference`; floating inputs that are
    not differentiated must still follow dtype where the op wants one dtype. `small` makes gradcheck-sized
    inputs, away from kinks and ties.
    """

    op: str
    id: str
    make: Callable[[torch.Generator, torch.dtype], Inputs]
    function: Callable
    reference: Callable
    small: Callable[[torch.Generator, torch.dtype], Inputs] | None = None
    differentiable: tuple[str, ...] = ()
    second_order: bool = False
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    tolerance: Mapping[torch.dtype, float] = field(
        default_factory=lambda: {torch.float32: 1e-5, torch.float64: 1e-11}
    )
    # Under autocast to bfloat16 the floating outputs have this dtype for float32 inputs.
    autocast_dtype: torch.dtype = torch.float32
    # Whether the op composes torch's own products or convolutions, whose last bits depend on the threads.
    composes_products: bool = False
    # Inputs that carry the batch dimension and may go without it.
    batched: tuple[str, ...] = ()
    # Of the inputs: bytes that must move and floating-point operations, for rooflines in benchmarks.
    bytes: Callable[[Inputs], int] | None = None
    flops: Callable[[Inputs], int] | None = None
    rejections: tuple[Rejection, ...] = ()

    def __str__(self) -> str:
        return f"{self.op}-{self.id}"


def tensors_of(value) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_of(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_of(part)


def map_tensors(value, change: Callable[[Tensor], Tensor]):
    """The same nesting with every tensor changed; named tuples keep their type."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(part, change) for key, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [map_tensors(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def on_device(inputs: Inputs, device: torch.device) -> Inputs:
    """Inputs with their tensors, and a device that they name, on `device`."""
    inputs = {name: device if isinstance(value, torch.device) else value for name, value in inputs.items()}
    return map_tensors(inputs, lambda t: t.to(device))


def require_grad(case: OpCase, inputs: Inputs) -> tuple[Inputs, list[Tensor]]:
    """Fresh leaves for the differentiable inputs, and the list of them."""
    inputs = map_tensors(inputs, lambda t: t.detach().clone())
    leaves = list(tensors_of([inputs[name] for name in case.differentiable if inputs.get(name) is not None]))
    for leaf in leaves:
        leaf.requires_grad_()
    return inputs, leaves


def neighbors_for(
    generator: torch.Generator, batch: int, rows: int, k: int, num_points: int, missing: float = 0.0
) -> Tensor:
    """Random neighbours (B, M, K) int64, a share `missing` of them -1."""
    neighbors = torch.randint(num_points, (batch, rows, k), generator=generator)
    return neighbors.masked_fill(torch.rand(batch, rows, k, generator=generator) < missing, -1)


def normal(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    """Normal values, the same for every dtype up to rounding."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def distinct(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    """Values that differ by at least 0.01 and lie around zero: safe for finite differences of a maximum."""
    count = torch.Size(shape).numel()
    values = torch.randperm(count, generator=generator).to(torch.float64) * 0.01
    return (values - values.mean() if count else values).reshape(shape).to(dtype)


def changed(name: str, value) -> Callable[[Inputs], Inputs]:
    return lambda inputs: {**inputs, name: value(inputs[name]) if callable(value) else value}


def poisoned(position: tuple[int, ...], value: int) -> Callable[[Tensor], Tensor]:
    def change(neighbors: Tensor) -> Tensor:
        neighbors = neighbors.clone()
        neighbors[position] = value
        return neighbors

    return change


# Rejections of every op that takes neighbors (B, M, K) with M, K >= 2.
NEIGHBOR_REJECTIONS = (
    Rejection(
        "neighbor-high", changed("neighbors", poisoned((0, 1, 1), 10**9)), IndexError, r"neighbors\[0, 1, 1\]"
    ),
    Rejection(
        "neighbor-low",
        changed("neighbors", poisoned((0, 1, 0), -2)),
        IndexError,
        r"neighbors\[0, 1, 0\] = -2",
    ),
    Rejection("neighbor-dtype", changed("neighbors", lambda n: n.float()), TypeError, "neighbors"),
    Rejection("neighbor-rank", changed("neighbors", lambda n: n[0]), ValueError, "neighbors"),
    Rejection("neighbor-batch", changed("neighbors", lambda n: n.repeat(2, 1, 1)), ValueError, "neighbors"),
)


def op_cases() -> list[OpCase]:
    """Every case of every op: the CASES of the modules of this package."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return [case for name in names for case in importlib.import_module(f"{__name__}.{name}").CASES]
