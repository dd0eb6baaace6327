"""Calls of every op at the sizes of the paper's networks, with the bytes and operations that each needs.

The calls are of avatar_ops or of avatar_ops.reference, on torch's default device.

Bytes are those of a call that reads every input and writes every output once; what a call gathers again, from
the second-level cache where it fits, counts apart. Operations are those of the form that the kernels compute,
a multiply-add as two; searches have none, as theirs depend on the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

import avatar_ops
from avatar_ops.edge_conv import edge_conv_norm
from avatar_ops.edge_mlp import edge_mlp
from avatar_ops.testing import tensors_of

POINTS = 400_000
NEIGHBORS = 20
SIZE = 512


@dataclass(frozen=True)
class Call:
    """One call: `prepare(ops)` makes what `run` needs, and is not part of the call."""

    op: str
    name: str
    prepare: Callable[[ModuleType], object]
    run: Callable[[object], object]
    bytes: int
    flops: int = 0
    gathered_bytes: int = 0
    # Whose peak rate bounds the operations: float32 (vector units), tf32, tf32x3 (three products for one that is
    # as accurate as float32's) or bfloat16 (matrix units).
    rate: str = "float32"
    is_backward: bool = False


def size_of(*values) -> int:
    return sum(t.numel() * t.element_size() for t in tensors_of(values))


def forward_and_backward(
    op: str,
    name: str,
    make: Callable[[ModuleType], tuple[Callable, list]],
    differentiable: list[int],
    needed: list[int] | None = None,
    flops: tuple[int, int] = (0, 0),
    gathered_bytes: tuple[int, int] = (0, 0),
    rate: str = "float32",
) -> Iterator[Call]:
    """The call of a function on inputs, and that of its gradient for the inputs at the positions given.

    The gradient reads the inputs that are `needed` (default: all), the indices among the outputs and the
    gradients of the others, and writes those of the inputs.
    """
    with torch.device("meta"):
        function, inputs = make(avatar_ops)
        outputs = list(tensors_of(function(*inputs)))
    read, written = size_of(inputs), size_of(outputs)
    yield Call(
        op, name, make, lambda made: made[0](*made[1]), read + written, flops[0], gathered_bytes[0], rate
    )

    def prepare(ops):
        function, inputs = make(ops)
        leaves = [inputs[place].requires_grad_() for place in differentiable]
        outputs = [t for t in tensors_of(function(*inputs)) if t.requires_grad]
        return outputs, leaves, [torch.ones_like(t) for t in outputs]

    needed_inputs = inputs if needed is None else [inputs[place] for place in needed]
    gradients = size_of([inputs[place] for place in differentiable])
    yield Call(
        op,
        name + ", backward",
        prepare,
        lambda made: torch.autograd.grad(*made, retain_graph=True),
        size_of(needed_inputs) + written + gradients,
        flops[1],
        gathered_bytes[1],
        rate,
        is_backward=True,
    )


def random_neighbors(rows: int, k: int) -> Tensor:
    return torch.randint(rows, (1, rows, k))


def graph_calls() -> Iterator[Call]:
    def knn(points, dims, k):
        return lambda ops: (lambda x: ops.knn(x, k), [torch.randn(1, points, dims)])

    yield from forward_and_backward("knn", "400k points, 3-D, k = 16", knn(POINTS, 3, 16), [0])
    rows, dims = 16_384, 64
    yield from forward_and_backward(
        "knn",
        "16k points, 64-D, k = 20",
        knn(rows, dims, NEIGHBORS),
        [0],
        flops=(2 * rows * rows * dims, 0),
        rate="tf32x3",
    )
    channels = 64
    gathered = POINTS * NEIGHBORS * channels * 4
    yield from forward_and_backward(
        "edge_max",
        "400k points, k = 20, 64 channels",
        lambda ops: (
            ops.edge_max,
            [torch.randn(1, POINTS, channels), random_neighbors(POINTS, NEIGHBORS)],
        ),
        [0],
        needed=[1],
        gathered_bytes=(gathered, gathered),
    )
    product = 2 * POINTS * channels * channels
    yield from forward_and_backward(
        "edge_conv",
        "400k points, k = 20, 64 to 64 channels",
        lambda ops: (
            ops.edge_conv,
            [
                torch.randn(1, POINTS, channels),
                random_neighbors(POINTS, NEIGHBORS),
                torch.randn(channels, 2 * channels),
            ],
        ),
        [0, 2],
        flops=(2 * product, 4 * product),
        gathered_bytes=(gathered, gathered),
    )

    yield from forward_and_backward(
        "edge_conv_norm",
        "400k points, k = 20, 64 to 64 channels",
        lambda ops: (
            edge_conv_norm if ops is avatar_ops else ops.edge_conv_norm,
            [
                torch.randn(1, POINTS, channels),
                random_neighbors(POINTS, NEIGHBORS),
                torch.randn(channels, 2 * channels),
                torch.randn(channels),
                torch.randn(channels),
            ],
        ),
        [0, 2, 3, 4],
        flops=(2 * product, 4 * product),
        gathered_bytes=(2 * gathered, 2 * gathered),
    )

    def make_edge_mlp(ops):
        function = edge_mlp if ops is avatar_ops else ops.edge_mlp

        def layers(x, neighbors, first, second, *scales_and_shifts):
            scales, shifts = scales_and_shifts[:2], scales_and_shifts[2:]
            return function(x, neighbors, [first, second], scales, shifts)

        inputs = [
            torch.randn(1, POINTS, channels),
            random_neighbors(POINTS, NEIGHBORS),
            torch.randn(channels, 2 * channels),
            torch.randn(channels, channels),
        ]
        return layers, inputs + [torch.randn(channels) for _ in range(4)]

    # The first layer by the point, the second by the edge. The backward pass computes both again, and gathers for
    # that, for the weight's gradient and for the first activation's; then each edge's gradient by its neighbour.
    yield from forward_and_backward(
        "edge_mlp",
        "400k points, k = 20, 64 to 64 to 64 channels",
        make_edge_mlp,
        [0, *range(2, 8)],
        flops=((2 + NEIGHBORS) * product, (6 + 3 * NEIGHBORS) * product),
        gathered_bytes=(gathered, 4 * gathered),
        rate="tf32x3",
    )


def sampling_calls() -> Iterator[Call]:
    yield Call(
        "random_sample",
        "100k of 400k",
        lambda ops: ops,
        lambda ops: ops.random_sample(POINTS, POINTS // 4, seed=1, device=torch.get_default_device()),
        POINTS // 4 * 8,
    )
    k = 16
    for points, width, dtype in (
        (100_000, 8, torch.float32),
        (25_000, 32, torch.float32),
        (6_250, 64, torch.bfloat16),
    ):

        def make(ops, points=points, width=width, dtype=dtype):
            return ops.local_attention_pool, [
                torch.randn(1, points, 3, dtype=dtype),
                torch.randn(1, points, width, dtype=dtype),
                random_neighbors(points, k),
                torch.randn(width, 10, dtype=dtype),
                torch.randn(width, dtype=dtype),
                torch.randn(2 * width, 2 * width, dtype=dtype),
            ]

        # Scores from the position code by the edge, from features by the point.
        edge = 2 * 10 * width + 2 * width * 2 * width + 8 * 2 * width
        flops = points * (k * edge + 2 * width * 2 * width)
        gathered = points * k * (width + 3) * torch.tensor([], dtype=dtype).element_size()
        yield from forward_and_backward(
            "local_attention_pool",
            f"{points} points, k = {k}, C = P = {width}, {str(dtype).removeprefix('torch.')}",
            make,
            [0, 1, 3, 4, 5],
            flops=(flops, 3 * flops),
            gathered_bytes=(gathered, 2 * gathered),
            rate="tf32x3" if dtype == torch.float32 else "bfloat16",
        )
    yield Call(
        "edge_moments",
        f"100k points, k = {k}",
        lambda ops: (ops, torch.randn(1, 100_000, 3), random_neighbors(100_000, k)),
        lambda made: made[0].edge_moments(*made[1:]),
        100_000 * (12 + 8 * k),
        100_000 * k * 2 * 10 * 11,
        100_000 * k * 12,
    )


def image_calls() -> Iterator[Call]:
    batch = 4
    for channels, size, up, dtype in (
        (512, 32, 1, torch.float32),
        (512, 32, 1, torch.bfloat16),
        (512, 32, 2, torch.bfloat16),
        (64, 512, 1, torch.bfloat16),
    ):

        def make(ops, channels=channels, size=size, up=up, dtype=dtype):
            def layer(x, weight, styles, bias):
                return ops.modulated_conv2d(x, weight, styles, up=up, bias=bias, activation="lrelu")

            return layer, [
                torch.randn(batch, channels, size, size, dtype=dtype),
                torch.randn(channels, channels, 3, 3, dtype=dtype),
                torch.randn(batch, channels, dtype=dtype),
                torch.randn(channels, dtype=dtype),
            ]

        flops = 2 * batch * channels * channels * 9 * size * size
        kind = "" if up == 1 else ", up"
        yield from forward_and_backward(
            "modulated_conv2d",
            f"4 x {channels} channels, {size} x {size}{kind}, {str(dtype).removeprefix('torch.')}",
            make,
            [0, 1, 2, 3],
            flops=(flops, 2 * flops),
            rate="tf32" if dtype == torch.float32 else "bfloat16",
        )
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    yield from forward_and_backward(
        "upfirdn2d",
        "4 x 64 channels, 256 x 256, up 2",
        lambda ops: (
            lambda x, f: ops.upfirdn2d(x, f, up=2, padding=(2, 1, 2, 1), gain=4),
            [torch.randn(batch, 64, 256, 256), taps.to(torch.get_default_device())],
        ),
        [0],
        needed=[1],
        flops=(2 * batch * 64 * 512 * 512 * 4,) * 2,
    )
    yield from forward_and_backward(
        "bias_act",
        "4 x 64 channels, 512 x 512",
        lambda ops: (
            lambda x, bias: ops.bias_act(x, bias, activation="lrelu"),
            [torch.randn(batch, 64, SIZE, SIZE), torch.randn(64)],
        ),
        [0, 1],
    )
    slots = 10

    def cloud():
        return torch.rand(1, POINTS, 3) * SIZE + 1

    yield from forward_and_backward(
        "rasterize_points",
        "400k points, 512 x 512, 10 per pixel",
        lambda ops: (lambda points: ops.rasterize_points(points, (SIZE, SIZE), 1.5, slots), [cloud()]),
        [0],
    )
    channels = 64

    gathered = SIZE * SIZE * slots * channels * 4
    yield from forward_and_backward(
        "composite_points",
        "400k points, 64 channels, 512 x 512, 10 per pixel",
        lambda ops: (
            lambda features, alphas, indices: ops.composite_points(
                (indices, alphas.detach(), alphas.detach()), features, alphas
            ),
            [
                torch.randn(1, POINTS, channels),
                torch.rand(1, SIZE, SIZE, slots),
                torch.randint(POINTS, (1, SIZE, SIZE, slots)),
            ],
        ),
        [0, 1],
        flops=(SIZE * SIZE * slots * 2 * channels, 2 * SIZE * SIZE * slots * 2 * channels),
        gathered_bytes=(gathered, 2 * gathered),
    )


def calls() -> list[Call]:
    return [*graph_calls(), *sampling_calls(), *image_calls()]
