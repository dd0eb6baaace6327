"""nn.EdgeConv against the literal network: all edges formed, BatchNorm2d over (B, C, N, K)."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from avatar_ops.nn import EdgeConv
from avatar_ops.testing import neighbors_for, normal

WIDTHS = pytest.mark.parametrize("widths", [20, [16, 8], [12, 9, 21]], ids=str)


class Literal(nn.Module):
    """The same network over (B, N, K, 2C) edges; without -1."""

    def __init__(self, module: EdgeConv):
        super().__init__()
        module = copy.deepcopy(module)
        self.linears, self.norms, self.slope = module.linears, module.norms, module.negative_slope

    def forward(self, x, neighbors):
        neighbor = x[torch.arange(x.shape[0]).view(-1, 1, 1), neighbors]
        center = x.unsqueeze(2).expand_as(neighbor)
        hidden = torch.cat([center, center - neighbor], -1).permute(0, 3, 1, 2)
        for depth, linear in enumerate(self.linears):
            hidden = F.conv2d(hidden, linear.weight[:, :, None, None], linear.bias)
            if self.norms is not None:
                hidden = self.norms[depth](hidden)
            hidden = F.leaky_relu(hidden, self.slope)
        return hidden.amax(3).transpose(1, 2)


def inputs(seed=3, dtype=torch.float64, missing=0.0, points=30):
    generator = torch.Generator().manual_seed(seed)
    x = normal(generator, dtype, 2, points, 5) + 2
    return x, neighbors_for(generator, 2, points, 4, points, missing)


def build(widths, norm="batch", dtype=torch.float64, **options):
    module = EdgeConv(5, widths, norm=norm, **options).to(dtype)
    for layer in module.norms or ():
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    return module


def assert_same_network(module, literal, tolerance=1e-9):
    for part in ("named_parameters", "named_buffers"):
        for (name, a), (_, e) in zip(getattr(module, part)(), getattr(literal, part)(), strict=True):
            torch.testing.assert_close(
                a, e, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )
            if a.grad is not None:
                torch.testing.assert_close(a.grad, e.grad, rtol=tolerance, atol=tolerance)


@WIDTHS
@pytest.mark.parametrize("norm", ["batch", None])
@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_trains_as_the_literal_network_does(widths, norm, momentum):
    module = build(widths, norm)
    for layer in module.norms or ():
        layer.momentum = momentum
    literal = Literal(module)
    for step in range(3):
        x, neighbors = inputs(step)
        leaves = x.clone().requires_grad_(), x.clone().requires_grad_()
        outputs = module(leaves[0], neighbors), literal(leaves[1], neighbors)
        torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)
        weights = torch.randn_like(x[..., :1]) * torch.ones_like(outputs[0])
        for output in outputs:
            (output * weights).sum().backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-9, atol=1e-9)
    assert_same_network(module, literal)
    x, neighbors = inputs(9)
    torch.testing.assert_close(
        module.eval()(x, neighbors), literal.eval()(x, neighbors), rtol=1e-9, atol=1e-9
    )


@WIDTHS
def test_missing_edges_count_in_no_statistic(widths):
    """Rows whose -1 are padding give what the same rows cut to their edges give, all of one length."""
    module = build(widths)
    short = copy.deepcopy(module)
    x, neighbors = inputs()
    padded = F.pad(neighbors, (2, 3), value=-1)
    leaves = x.clone().requires_grad_(), x.clone().requires_grad_()
    a, e = module(leaves[0], padded), short(leaves[1], neighbors)
    torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
    a.square().sum().backward()
    e.square().sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-9, atol=1e-9)
    assert_same_network(module, short)


@pytest.mark.parametrize("widths", [3, [3, 2]], ids=str)
@pytest.mark.parametrize("norm", ["batch", None])
def test_gradcheck_in_training(widths, norm):
    module = build(widths, norm)
    x, neighbors = inputs(missing=0.3, points=6)
    names, values = zip(*module.named_parameters(), strict=True)

    def run(x, *parameters):
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(module, named, (x, neighbors))

    leaves = [v.detach().clone().requires_grad_() for v in (x, *values)]
    assert torch.autograd.gradcheck(run, leaves)


@WIDTHS
@pytest.mark.parametrize("kind", ["all-missing", "no-neighbors", "no-points", "no-clouds"])
def test_without_edges_it_gives_zeros_and_learns_no_statistics(widths, kind):
    module = build(widths)
    x, neighbors = inputs(missing=1.0)
    if kind == "no-neighbors":
        neighbors = neighbors[:, :, :0]
    elif kind == "no-points":
        x, neighbors = x[:, :0], neighbors[:, :0]
    elif kind == "no-clouds":
        x, neighbors = x[:0], neighbors[:0]
    before = {name: value.clone() for name, value in module.named_buffers()}
    output = module(x.requires_grad_(), neighbors)
    assert output.shape == (*x.shape[:2], module.out_channels)
    assert (output == 0).all()
    output.sum().backward()
    assert all((p.grad == 0).all() for p in [x, *module.parameters()])
    for name, value in module.named_buffers():
        assert torch.equal(value, before[name])


def test_one_edge_keeps_running_statistics_finite():
    module = build(4)
    x, neighbors = inputs(missing=1.0)
    neighbors[0, 0, 0] = 1
    assert module(x, neighbors).isfinite().all()
    assert all(value.isfinite().all() for value in module.buffers())


@pytest.mark.parametrize("widths", [20, [16, 8]], ids=str)
@pytest.mark.parametrize(
    ("training", "backend"), [(True, "inductor"), (True, "aot_eager"), (False, "aot_eager")]
)
def test_compile_fullgraph(widths, training, backend):
    torch._dynamo.reset()
    module = build(widths, dtype=torch.float32).train(training)
    twin = copy.deepcopy(module)
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    for step in range(2):
        x, neighbors = inputs(step, torch.float32, missing=0.2)
        a, e = compiled(x, neighbors), twin(x, neighbors)
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
        a.square().sum().backward()
        e.square().sum().backward()
    assert_same_network(module, twin, 1e-4)


@pytest.mark.parametrize("widths", [20, [16, 8]], ids=str)
def test_export_save_load_in_evaluation(widths):
    module = build(widths, dtype=torch.float32).eval()
    x, neighbors = inputs(dtype=torch.float32, missing=0.2)
    points = torch.export.Dim("points", min=2)
    program = torch.export.export(
        module, (x, neighbors), dynamic_shapes={"x": {1: points}, "neighbors": {1: points}}
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    torch.testing.assert_close(loaded(x, neighbors), module(x, neighbors))
    x, neighbors = inputs(dtype=torch.float32, missing=0.2, points=17)
    torch.testing.assert_close(loaded(x, neighbors), module(x, neighbors))


@WIDTHS
def test_unbatched_equals_batched(widths):
    module = build(widths)
    x, neighbors = inputs()
    alone = copy.deepcopy(module)(x[0], neighbors[0])
    torch.testing.assert_close(alone, module(x[:1], neighbors[:1])[0], rtol=0, atol=0)


@WIDTHS
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_autocast_runs_in_bfloat16(widths, training):
    module = build(widths, dtype=torch.float32).train(training)
    twin = copy.deepcopy(module)
    x, neighbors = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = module(x, neighbors)
    assert output.dtype == torch.bfloat16
    expected = twin(x, neighbors)
    assert (output.float() - expected).abs().max() < 0.05 * expected.abs().max()
    if training:
        output.sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in module.parameters())


@WIDTHS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_inference_is_as_accurate_as_eager(widths, dtype):
    module = build(widths)
    x, neighbors = inputs()
    module(x, neighbors)
    module = module.to(dtype).eval()
    x = x.to(dtype)
    exact = Literal(module).double()(x.double(), neighbors)
    eager = Literal(module)(x, neighbors)
    output = module(x, neighbors)
    assert output.dtype == dtype
    allowed = 2 * (eager - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    assert (output - exact).abs().max() <= allowed


def test_a_norm_left_in_evaluation_keeps_its_statistics():
    module = build(20)
    module.norms.eval()
    before = module.norms[0].running_mean.clone()
    x, neighbors = inputs()
    output = module(x, neighbors)
    assert torch.equal(module.norms[0].running_mean, before)
    torch.testing.assert_close(output, Literal(module)(x, neighbors))


def test_state_names_are_the_documented_ones():
    assert list(EdgeConv(3, [8, 4]).state_dict()) == [
        "linears.0.weight",
        "linears.1.weight",
        *(
            f"norms.{layer}.{name}"
            for layer in (0, 1)
            for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        ),
    ]
    assert list(EdgeConv(3, 8, norm=None).state_dict()) == ["linears.0.weight", "linears.0.bias"]


@pytest.mark.parametrize(
    ("arguments", "options", "name"),
    [
        ((0, 4), {}, "in_channels"),
        ((3, []), {}, "out_channels"),
        ((3, [4, -1]), {}, "out_channels"),
        ((3, 4), {"norm": "layer"}, "norm"),
        ((3, 4), {"negative_slope": 2}, "negative_slope"),
    ],
)
def test_rejects(arguments, options, name):
    with pytest.raises(ValueError, match=name):
        EdgeConv(*arguments, **options)


def test_rejects_other_channels():
    x, neighbors = inputs()
    with pytest.raises(ValueError, match=r"x: got shape .* with C = 4"):
        EdgeConv(4, 8)(x.float(), neighbors)


@pytest.mark.parametrize("norm", ["batch", None])
@pytest.mark.parametrize("widths", [6, [6, 6]])
def test_layers_stack_under_autocast(norm, widths):
    layer = EdgeConv(6, widths, norm=norm)
    x, neighbors = torch.randn(2, 10, 6), torch.randint(10, (2, 10, 3))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(layer(x, neighbors), neighbors)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


@pytest.mark.parametrize("widths", [2.0, None, True, [], [4, 0], "4"])
def test_widths_that_are_no_sizes_are_named(widths):
    with pytest.raises(ValueError, match="out_channels: got"):
        EdgeConv(4, widths)


@pytest.mark.parametrize("slope", ["a", None, -0.1, 1.5, float("nan")])
def test_slopes_outside_their_range_are_named(slope):
    with pytest.raises(ValueError, match="negative_slope: got"):
        EdgeConv(4, 4, negative_slope=slope)
