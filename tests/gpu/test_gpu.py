"""What the library promises on a GPU beyond the contract of the ops; every test needs one."""

import subprocess
import sys

import pytest
import torch

import avatar_ops
from avatar_ops.testing import map_tensors, on_device, op_cases, require_grad, tensors_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

MAIN = list({case.op: case for case in reversed(op_cases())}.values())[::-1]
# knn_graph's size depends on the data.
SYNCHRONIZES = ("knn_graph",)
QUIET = [case for case in MAIN if case.op not in SYNCHRONIZES]


def inputs_of(case, dtype=None, device="cuda"):
    inputs = case.make(torch.Generator().manual_seed(1234), dtype or case.dtypes[0])
    return on_device(inputs, torch.device(device))


def forward_and_backward(case, inputs, leaves):
    outputs = list(tensors_of(case.function(**inputs)))
    differentiable = [t for t in outputs if t.requires_grad]
    total = sum((t.where(t.isfinite(), 0) * 0.7).sum() for t in differentiable)
    gradients = torch.autograd.grad(total, leaves, allow_unused=True) if differentiable else []
    return [t for t in [*outputs, *gradients] if t is not None]


@pytest.mark.parametrize("case", QUIET, ids=str)
def test_waits_for_nothing(case):
    inputs, leaves = require_grad(case, inputs_of(case))
    forward_and_backward(case, inputs, leaves)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_backward(case, inputs, leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", QUIET, ids=str)
def test_runs_on_the_current_stream(case):
    """Inputs that another stream fills late are read after that."""
    expected = forward_and_backward(case, *require_grad(case, inputs_of(case)))
    inputs = inputs_of(case)
    late = map_tensors(inputs, torch.zeros_like)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for target, source in zip(tensors_of(late), tensors_of(inputs), strict=True):
            target.copy_(source)
        actual = forward_and_backward(case, *require_grad(case, late))
    stream.synchronize()
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a.nan_to_num(), e.nan_to_num())


@pytest.mark.parametrize("case", QUIET, ids=str)
def test_captures_into_a_graph(case):
    """A replay works on what the inputs hold then."""
    inputs = inputs_of(case)
    expected = [t.clone() for t in tensors_of(case.function(**inputs))]
    held = map_tensors(inputs, torch.clone)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            case.function(**held)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = list(tensors_of(case.function(**held)))
    for t in tensors_of(outputs):
        t.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for a, e in zip(outputs, expected, strict=True):
        assert torch.equal(a.nan_to_num(), e.nan_to_num())


@pytest.mark.parametrize("case", QUIET, ids=str)
def test_same_bits_every_time(case):
    inputs = inputs_of(case)
    results = [forward_and_backward(case, *require_grad(case, inputs)) for _ in range(5)]
    for other in results[1:]:
        for a, e in zip(other, results[0], strict=True):
            assert torch.equal(a.nan_to_num(), e.nan_to_num())


def test_random_sample_draws_what_the_cpu_draws():
    for num_points, count in ((400_000, 100_000), (65, 65), (1, 1)):
        expected = avatar_ops.random_sample(num_points, count, seed=7)
        assert torch.equal(avatar_ops.random_sample(num_points, count, seed=7, device="cuda").cpu(), expected)


TRAPS = [(case, rejection) for case in MAIN for rejection in case.rejections if rejection.of_data]


@pytest.mark.parametrize(("case", "rejection"), TRAPS, ids=[f"{c.op}-{r.id}" for c, r in TRAPS])
def test_bad_data_traps(case, rejection):
    """In a process of its own: after a trap its device cannot be used."""
    program = f"""
import torch
from avatar_ops.testing import on_device, op_cases
case = next(case for case in op_cases() if str(case) == {str(case)!r})
rejection = next(rejection for rejection in case.rejections if rejection.id == {rejection.id!r})
inputs = rejection.change(case.make(torch.Generator().manual_seed(1234), case.dtypes[0]))
case.function(**on_device(inputs, torch.device("cuda")))
try:
    torch.cuda.synchronize()
except RuntimeError as error:
    print("trapped", error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "trapped" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("case", QUIET, ids=str)
def test_runs_where_the_inputs_are(case):
    inputs = inputs_of(case, device="cuda:1")
    with torch.cuda.device(0):
        outputs = list(tensors_of(case.function(**inputs)))
    assert all(t.device == torch.device("cuda:1") for t in outputs)
