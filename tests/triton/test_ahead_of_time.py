"""Triton kernels compiled for sm_80, sm_90 and sm_100 over the shapes of the networks that use them."""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="comes with torch's CUDA builds")
# Kernels of a process in which triton interprets cannot be compiled.
import ahead_of_time

from avatar_ops.triton import _edge_layers, edge_mlp, edge_moments, local_attention_pool
from avatar_ops.triton._launch import dot_precision


def position_network_inputs(points, k, width, depth, dtype):
    weights = [torch.empty(width, 10, dtype=dtype), *(torch.empty(width, width, dtype=dtype),) * (depth - 1)]
    biases = [torch.empty(width, dtype=dtype)] * depth
    return (
        torch.empty(1, points, 3, dtype=dtype),
        torch.empty(1, points, k, dtype=torch.int64),
        weights,
        biases,
    )


def run_local_attention_pool(points, k, width, depth, dtype):
    cloud, neighbors, weights, biases = position_network_inputs(points, k, width, depth, dtype)
    inputs = (
        cloud,
        torch.empty(1, points, width, dtype=dtype),
        neighbors,
        weights,
        biases,
        torch.empty(2 * width, 2 * width, dtype=dtype),
    )
    pooled, statistics = local_attention_pool.local_attention_pool(*inputs, 0.2, True)
    local_attention_pool.local_attention_pool_backward(pooled, *inputs, pooled, statistics, 0.2, True)


def run_edge_moments(points, k, width, depth, dtype):
    inputs = position_network_inputs(points, k, width, depth, dtype)
    mean, covariance, count = edge_moments.edge_moments(*inputs, 0.2)
    edge_moments.edge_moments_backward(mean, covariance, *inputs, mean, count, 0.2, True)


def run_edge_mlp(points, k, widths, depth, dtype):
    """A width for all layers, or that of each."""
    widths = widths if isinstance(widths, tuple) else (widths,) * depth
    p = torch.empty(points, widths[0], dtype=dtype)
    edges = p, p.clone(), torch.empty(points, k, dtype=torch.int64)
    weights = [torch.empty(o, i, dtype=dtype) for i, o in itertools.pairwise(widths)]
    channels = [torch.empty(width, dtype=dtype) for width in widths]
    layers, hidden = (weights, channels, channels), (weights, channels[:-1], channels[:-1])
    output, slots = edge_mlp.edge_layers(*edges, *layers, 0.2, True)
    edge_mlp.edge_layers_statistics(*edges, *hidden, 0.2)
    edge_mlp.edge_layers_backward(output, slots, None, None, *edges, *layers, 0.2)
    edge_mlp.edge_layers_backward(None, None, channels[-1], channels[-1], *edges, *hidden, 0.2)


OPS = {"local_attention_pool": run_local_attention_pool, "edge_moments": run_edge_moments}
EDGE_OPS = {"edge_mlp": run_edge_mlp}
# RandLA-Net's levels: points, neighbours, C = P; the position network's depth; dtype.
SHAPES = [
    (1_562, 16, 128, 2, torch.float32),
    (6_250, 16, 64, 2, torch.float16),
    (25_000, 16, 32, 2, torch.bfloat16),
    (100_000, 12, 8, 1, torch.float32),
    (100_000, 16, 8, 2, torch.float64),
    (1_562, 12, 96, 2, torch.bfloat16),
    (1_562, 16, 128, 1, torch.float32),
    (6_250, 16, 64, 2, torch.float32),
    (25_000, 16, 32, 2, torch.float32),
    (100_000, 16, 8, 2, torch.float32),
]
# EdgeConv's: layers of a width per edge, or of several, one of which takes more than a block.
EDGE_SHAPES = [
    (8_192, 20, 64, 2, torch.float32),
    (8_192, 20, 128, 3, torch.float32),
    (8_192, 20, 128, 2, torch.float64),
    (8_192, 16, (9, 70, 5), 3, torch.float32),
    (8_192, 40, (150, 24), 2, torch.float32),
    (8_192, 20, 64, 3, torch.float32),
    (8_192, 20, 128, 2, torch.float32),
    (8_192, 20, 32, 2, torch.float32),
    (8_192, 20, 64, 1, torch.float32),
    (8_192, 20, (64, 128, 1024), 3, torch.float32),
]
CAPABILITIES = (80, 90, 100)
# Of all combinations, what is compiled unless --every-triton-shape asks for the rest: the widest for each
# architecture, then of the op with the larger kernels the other dtypes.
ALWAYS = [(op, SHAPES[0], capability) for op in OPS for capability in CAPABILITIES]
ALWAYS += [("local_attention_pool", SHAPES[2], 100), ("local_attention_pool", SHAPES[4], 90)]
ALWAYS += [("edge_mlp", EDGE_SHAPES[0], capability) for capability in CAPABILITIES]
ALWAYS += [
    ("edge_mlp", EDGE_SHAPES[1], 80),
    ("edge_mlp", EDGE_SHAPES[2], 90),
    ("edge_mlp", EDGE_SHAPES[3], 80),
]


def ids(value):
    return "-".join(str(part).removeprefix("torch.") for part in value) if isinstance(value, tuple) else None


def pytest_generate_tests(metafunc):
    if "shape" not in metafunc.fixturenames:
        return
    chosen = [(*run, "tf32x3") for run in ALWAYS]
    if metafunc.config.getoption("every_triton_shape"):
        precisions = ("tf32x3", "tf32")
        chosen = list(itertools.product(OPS, SHAPES, CAPABILITIES, precisions))
        chosen += itertools.product(["edge_mlp"], EDGE_SHAPES, CAPABILITIES, precisions)
    metafunc.parametrize(("op", "shape", "capability", "precision"), chosen, ids=ids)


def test_kernels_compile_without_spills_and_use_matrix_units(op, shape, capability, precision):
    """`precision` is that of float32 products, by torch's switch."""
    with pytest.MonkeyPatch.context() as patch:
        if shape[4] == torch.float32:
            for module in (local_attention_pool, edge_moments, _edge_layers):
                patch.setattr(module, "dot_precision", lambda dtype: precision)
        started = ahead_of_time.launches(lambda: (OPS | EDGE_OPS)[op](*shape))
    assert started
    for launch in started:
        compiled = ahead_of_time.compile_for(launch, capability)
        assert compiled.local_accesses == 0, (launch.name, compiled)
        assert compiled.shared_bytes <= ahead_of_time.SHARED_BYTES[capability], (launch.name, compiled)
        # The others add up, or have one layer: that of a position network made of multiply-adds, or differences.
        one_layer = shape[3] == 1 and (op == "edge_mlp" or launch.name == "mean_kernel")
        if launch.name not in ("sum_edges_kernel", "subtract_edges_kernel") and not one_layer:
            assert compiled.matrix_instructions, (launch.name, compiled)


@pytest.mark.parametrize(
    ("allowed", "dtype", "precision"),
    [
        (False, torch.float32, "tf32x3"),
        (True, torch.float32, "tf32"),
        (False, torch.bfloat16, "tf32"),
        (True, torch.float64, "ieee"),
    ],
)
def test_precision_of_products_follows_the_switch_of_torch(allowed, dtype, precision):
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    try:
        matmul.allow_tf32 = allowed
        assert dot_precision(dtype) == precision
    finally:
        matmul.allow_tf32 = before
