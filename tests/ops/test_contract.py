"""What the library promises of every op, on every OpCase."""

import io

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from avatar_ops.testing import map_tensors, on_device, op_cases, require_grad, tensors_of

CASES = op_cases()
MAIN = list({case.op: case for case in reversed(CASES)}.values())[::-1]
DEVICE = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def _device(pytestconfig):
    global DEVICE
    DEVICE = torch.device(pytestconfig.getoption("device"))
    # What is compared is float32, which torch's convolutions on a GPU round unless told not to.
    torch.backends.cudnn.allow_tf32 = False


def ids(case):
    return str(case)


def with_dtypes(*dtypes):
    """Every case in those of the dtypes that it takes, for parametrize."""
    pairs = [(case, dtype) for case in CASES for dtype in dtypes if dtype in case.dtypes]
    return {"argvalues": pairs, "ids": [f"{case}-{str(dtype)[6:]}" for case, dtype in pairs]}


def generator():
    return torch.Generator().manual_seed(1234)


def make(case, dtype=torch.float64, small=False):
    """Inputs on the device under test, of the same values on each."""
    return on_device((case.small if small else case.make)(generator(), dtype), DEVICE)


def outputs_and_gradients(case, function, inputs):
    """Floating and integer outputs, and gradients of a fixed weighting of the floating outputs."""
    inputs, leaves = require_grad(case, inputs)
    outputs = list(tensors_of(function(**inputs)))
    if not leaves:
        return outputs, []
    weigh = generator()
    total = 0
    for output in outputs:
        if output.is_floating_point() and output.requires_grad:
            weights = torch.randn(output.shape, generator=weigh, dtype=torch.float64).to(output)
            total = total + (weights * output.where(output.isfinite(), 0)).sum()
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    zeros = map(torch.zeros_like, leaves)
    return outputs, [z if g is None else g for g, z in zip(gradients, zeros, strict=True)]


def error(actual, expected):
    """Largest error relative to the size of what is expected."""
    difference = (actual.double() - expected.double()).abs()
    difference = difference.where(actual.double() != expected.double(), 0)
    return (
        difference.max() / expected.double().abs().where(expected.isfinite(), 0).max().clamp(min=1e-3)
    ).item()


def assert_close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    if not actual.is_floating_point():
        assert torch.equal(actual, expected)
    elif actual.numel():
        assert torch.equal(actual.isnan(), expected.isnan())
        assert error(actual.nan_to_num(), expected.nan_to_num()) <= tolerance


@pytest.mark.parametrize(("case", "dtype"), **with_dtypes(torch.float32, torch.float64))
def test_matches_reference(case, dtype, isa):
    inputs = make(case, dtype)
    actual, actual_gradients = outputs_and_gradients(case, case.function, inputs)
    expected, expected_gradients = outputs_and_gradients(case, case.reference, inputs)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, case.tolerance[dtype])
    # Sums of gradients are ordered differently even where values are exact.
    allowed = max(case.tolerance[dtype], 1e-5 if dtype == torch.float32 else 1e-11)
    for a, e in zip(actual_gradients, expected_gradients, strict=True):
        assert_close(a, e, 4 * allowed)


@pytest.mark.parametrize(("case", "dtype"), **with_dtypes(torch.float16, torch.bfloat16))
def test_low_precision_is_as_accurate_as_eager(case, dtype):
    """The error against float64 is at most twice that of eager PyTorch in the same dtype."""
    inputs = make(case, dtype)
    wide = map_tensors(inputs, lambda t: t.double() if t.is_floating_point() else t)
    exact = list(tensors_of(case.reference(**wide)))
    eager = list(tensors_of(case.reference(**inputs)))
    actual = list(tensors_of(case.function(**inputs)))
    for a, e, x in zip(actual, eager, exact, strict=True):
        assert a.dtype == e.dtype
        assert a.shape == x.shape
        if a.is_floating_point() and a.numel():
            missing = x.isnan()
            assert torch.equal(a.isnan(), missing)
            a, e, x = (t.masked_fill(missing, 0) for t in (a, e, x))
            assert error(a, x) <= 2 * error(e, x) + torch.finfo(dtype).eps


@pytest.mark.parametrize("case", [c for c in MAIN if c.differentiable], ids=ids)
def test_gradcheck(case):
    inputs, leaves = require_grad(case, make(case, small=True))

    def run(*_):
        outputs = [t for t in tensors_of(case.function(**inputs)) if t.is_floating_point()]
        # Infinite distances of missing neighbours have no finite differences.
        return [t.where(t.isfinite(), 0) for t in outputs]

    # Finite differences write through the leaves, which inputs share.
    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("case", [c for c in MAIN if c.differentiable and c.second_order], ids=ids)
def test_gradgradcheck(case):
    inputs, leaves = require_grad(case, make(case, small=True))

    def run(*_):
        return [t for t in tensors_of(case.function(**inputs)) if t.is_floating_point()]

    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("case", [c for c in MAIN if c.differentiable and not c.second_order], ids=ids)
def test_second_derivative_raises(case):
    inputs, leaves = require_grad(case, make(case, small=True))
    outputs = [t for t in tensors_of(case.function(**inputs)) if t.requires_grad]
    first = torch.autograd.grad(sum(t.square().sum() for t in outputs), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not supported"):
        torch.autograd.grad(sum(g.square().sum() for g in first), leaves)


class CallRecorder(TorchDispatchMode):
    """Records the calls of this library's ops that reach the kernels."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "avatar_ops":
            self.calls.setdefault(function, (args, kwargs or {}))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", MAIN, ids=ids)
def test_opcheck(case):
    """Schema, fake kernel, autograd registration and AOT dispatch of the ops of a call and its backward."""
    with CallRecorder() as recorder:
        outputs_and_gradients(case, case.function, make(case, small=case.small is not None))
    assert recorder.calls
    for function, (args, kwargs) in recorder.calls.items():
        differentiable = bool(case.differentiable) and "backward" not in function.name()

        def prepare(t, differentiable=differentiable):
            return t.detach().clone().requires_grad_(differentiable and t.is_floating_point())

        # A backward op's own derivative raises by design, so it is checked without inputs that require grad.
        torch.library.opcheck(function, map_tensors(args, prepare), map_tensors(kwargs, prepare))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("case", MAIN, ids=ids)
def test_compile_fullgraph(case, backend):
    torch._dynamo.reset()
    inputs = make(case, torch.float32 if torch.float32 in case.dtypes else case.dtypes[0])
    compiled = torch.compile(case.function, backend=backend, fullgraph=True)
    actual, actual_gradients = outputs_and_gradients(case, compiled, inputs)
    expected, expected_gradients = outputs_and_gradients(case, case.function, inputs)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-5)
    for a, e in zip(actual_gradients, expected_gradients, strict=True):
        assert_close(a, e, 1e-5)


@pytest.mark.parametrize("case", [c for c in MAIN if torch.bfloat16 in c.dtypes], ids=ids)
def test_compile_fullgraph_under_autocast(case):
    torch._dynamo.reset()
    inputs = make(case, torch.float32)

    def run(function):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return outputs_and_gradients(case, function, inputs)

    actual, expected = (
        run(torch.compile(case.function, backend="aot_eager", fullgraph=True)),
        run(case.function),
    )
    for a, e in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
        assert_close(a, e, 1e-5 if case.autocast_dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("case", MAIN, ids=ids)
def test_export_save_load(case):
    inputs = make(case, torch.float32 if torch.float32 in case.dtypes else case.dtypes[0])
    tensors = {name: value for name, value in inputs.items() if list(tensors_of(value))}
    options = {name: value for name, value in inputs.items() if name not in tensors}

    class Module(torch.nn.Module):
        def forward(self, **kwargs):
            return case.function(**kwargs, **options)

    file = io.BytesIO()
    torch.export.save(torch.export.export(Module(), (), tensors), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for a, e in zip(tensors_of(loaded(**tensors)), tensors_of(case.function(**inputs)), strict=True):
        assert_close(a, e, 0 if not a.is_floating_point() else 1e-6)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_noncontiguous(case):
    def spread(t):
        return torch.stack([t, t], -1)[..., 0]

    inputs = make(case)
    actual = outputs_and_gradients(case, lambda **kw: case.function(**map_tensors(kw, spread)), inputs)
    expected = outputs_and_gradients(case, case.function, inputs)
    for a, e in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
        assert_close(a, e, 1e-12)


@pytest.mark.parametrize("case", [c for c in MAIN if c.batched], ids=ids)
def test_unbatched_equals_batched(case):
    inputs = make(case)
    one = {
        name: map_tensors(value, lambda t: t[:1]) if name in case.batched else value
        for name, value in inputs.items()
    }
    alone = {
        name: map_tensors(value, lambda t: t[0]) if name in case.batched else value
        for name, value in inputs.items()
    }
    batched = [t.squeeze(0) for t in tensors_of(case.function(**one))]
    for a, e in zip(tensors_of(case.function(**alone)), batched, strict=True):
        assert_close(a, e, 0)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_modifies_nothing(case):
    inputs = make(case)
    before = map_tensors(inputs, torch.clone)
    outputs_and_gradients(case, case.function, inputs)
    for a, b in zip(tensors_of(inputs), tensors_of(before), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("case", MAIN, ids=ids)
def test_same_bits_for_any_thread_count(case, isa):
    inputs = make(case, torch.float32 if torch.float32 in case.dtypes else case.dtypes[0])
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outputs, gradients = outputs_and_gradients(case, case.function, inputs)
            results.append([*outputs, *gradients])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, e in zip(other, results[0], strict=True):
            if case.composes_products:
                assert_close(a, e, 1e-5)
            else:
                assert torch.equal(a.nan_to_num(), e.nan_to_num())


@pytest.mark.parametrize("case", [c for c in MAIN if torch.bfloat16 in c.dtypes], ids=ids)
def test_autocast(case):
    inputs = make(case, torch.float32)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        outputs, gradients = outputs_and_gradients(case, case.function, inputs)
    for output in outputs:
        if output.is_floating_point():
            assert output.dtype == case.autocast_dtype
    expected, expected_gradients = outputs_and_gradients(case, case.function, inputs)
    exact = case.autocast_dtype == torch.float32
    for a, e in zip(outputs, expected, strict=True):
        if a.is_floating_point():
            assert_close(a.float(), e, 0 if exact else 0.05)
    for a, e in zip(gradients, expected_gradients, strict=True):
        assert a.dtype == torch.float32
        assert error(a, e) <= (1e-6 if exact else 0.1)


@pytest.mark.parametrize(
    "case", [c for c in MAIN if torch.bfloat16 in c.dtypes and c.differentiable], ids=ids
)
def test_autocast_brings_dtypes_together(case):
    """As where a layer's low-precision output meets the float32 parameters of the next."""
    inputs = make(case, torch.float32)
    name = case.differentiable[0]
    mixed = {**inputs, name: map_tensors(inputs[name], lambda t: t.bfloat16())}
    with torch.autocast(DEVICE.type, torch.bfloat16):
        outputs, gradients = outputs_and_gradients(case, case.function, mixed)
    assert all(t.isfinite().any() for t in outputs if t.is_floating_point() and t.numel())
    assert gradients[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "case", [c for c in MAIN if "neighbors" in c.make(generator(), torch.float32)], ids=ids
)
def test_accepts_int32_neighbors(case):
    inputs = make(case)
    narrow = {**inputs, "neighbors": inputs["neighbors"].int()}
    for a, e in zip(tensors_of(case.function(**narrow)), tensors_of(case.function(**inputs)), strict=True):
        assert_close(a, e, 0)


REJECTIONS = [(case, rejection) for case in MAIN for rejection in case.rejections]


@pytest.mark.parametrize(("case", "rejection"), REJECTIONS, ids=[f"{c.op}-{r.id}" for c, r in REJECTIONS])
def test_rejects(case, rejection):
    if rejection.of_data and DEVICE.type == "cuda":
        pytest.skip("traps: see tests/gpu")
    inputs = rejection.change(make(case, case.dtypes[0]))
    with pytest.raises(rejection.error, match=rejection.match) as caught:
        case.function(**inputs)
    assert type(caught.value) is rejection.error


@pytest.mark.parametrize("case", [c for c in MAIN if c.differentiable], ids=ids)
def test_forward_mode_derivative_raises(case):
    inputs = make(case)
    name = case.differentiable[0]

    def run(value):
        return next(t for t in tensors_of(case.function(**{**inputs, name: value})) if t.is_floating_point())

    with pytest.raises(RuntimeError, match=f"{name}: got a tangent, but forward-mode derivatives"):
        torch.func.jvp(run, (inputs[name],), (torch.ones_like(inputs[name]),))


BAD_VALUES = [(case, rejection) for case, rejection in REJECTIONS if rejection.error is IndexError]


@pytest.mark.parametrize(("case", "rejection"), BAD_VALUES, ids=[f"{c.op}-{r.id}" for c, r in BAD_VALUES])
def test_compiled_code_rejects_bad_values_too(case, rejection):
    if DEVICE.type == "cuda":
        pytest.skip("traps: see tests/gpu")
    torch._dynamo.reset()
    compiled = torch.compile(case.function, backend="aot_eager", fullgraph=True)
    inputs = rejection.change(make(case, case.dtypes[0]))
    with pytest.raises(IndexError, match=rejection.match):
        compiled(**inputs)
