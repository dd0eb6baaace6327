"""LocalFeatureAggregation against a literal float64 formulation that forms every edge."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F

from avatar_ops.nn import LocalFeatureAggregation
from avatar_ops.testing import neighbors_for, normal

NORMS = ("reduce", "encode.0", "encode.1", "attend.0", "attend.1", "expand", "shortcut")


def make(in_channels=5, out_channels=16, dtype=torch.float64, **options):
    torch.manual_seed(0)
    module = LocalFeatureAggregation(in_channels, out_channels, **options).to(dtype)
    with torch.no_grad():
        for name in NORMS:
            norm = module.get_submodule(name).norm
            norm.weight.copy_(torch.randn(norm.weight.shape) + 1)
            norm.bias.copy_(torch.randn(norm.bias.shape))
    return module


def inputs(missing, batch=2, points=30, channels=5, k=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    neighbors = neighbors_for(generator, batch, points, k, points, missing)
    if missing:
        neighbors[:, 4] = -1
    positions, features = (
        normal(generator, dtype, batch, points, 3),
        normal(generator, dtype, batch, points, channels),
    )
    return positions.requires_grad_(), features.requires_grad_(), neighbors


def literal(module, points, features, neighbors):
    """The block by torch's own layers; normalisation sees exactly the edges that exist."""
    slope = module.negative_slope

    def normalised(layer, x, valid=None):
        y = layer.linear(x)
        if valid is None:
            return layer.norm(y.flatten(0, 1)).view_as(y)
        if valid.all():
            # As BatchNorm2d over (B, C, N, K).
            norm = layer.norm
            y = F.batch_norm(
                y.permute(0, 3, 1, 2),
                norm.running_mean,
                norm.running_var,
                norm.weight,
                norm.bias,
                norm.training,
                norm.momentum,
                norm.eps,
            )
            return y.permute(0, 2, 3, 1)
        return torch.zeros_like(y).index_put((valid,), layer.norm(y[valid]))

    def act(x):
        return F.leaky_relu(x, slope)

    valid = neighbors >= 0
    batch = torch.arange(points.shape[0]).view(-1, 1, 1)
    index = neighbors.clamp(min=0)
    neighbor = points[batch, index]
    center = points.unsqueeze(2).expand_as(neighbor)
    difference = center - neighbor
    squared = difference.square().sum(-1, keepdim=True)
    distance = torch.where(squared > 0, squared.where(squared > 0, 1).sqrt(), 0)
    code = torch.cat([center, neighbor, difference, distance], -1)
    first = act(normalised(module.encode[0], code, valid))
    second = act(normalised(module.encode[1], first, valid))
    x = act(normalised(module.reduce, features))
    for position, score, attend in zip((first, second), module.scores, module.attend, strict=True):
        hidden = torch.cat([x[batch, index], position], -1)
        scores = score(hidden).masked_fill(~valid.unsqueeze(-1), float("-inf"))
        attention = scores.where(valid.any(2)[..., None, None], 0).softmax(2) * valid.unsqueeze(-1)
        x = act(normalised(attend, (attention * hidden).sum(2)))
    return act(normalised(module.expand, x) + normalised(module.shortcut, features))


def gradients(module, function, points, features, neighbors):
    output = function(points, features, neighbors)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    total = (output * weights).sum()
    return output, torch.autograd.grad(total, [points, features, *module.parameters()])


@pytest.mark.parametrize("missing", [0.0, 0.3])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_block_equals_the_literal_formulation(missing, training, isa):
    """Outputs, gradients and, in training, running statistics after two steps."""
    module = make().train(training)
    other = copy.deepcopy(module)
    for step in range(2):
        points, features, neighbors = inputs(missing, points=30 + step)
        output, grads = gradients(module, module, points, features, neighbors)
        expected, expected_grads = gradients(
            other, lambda *args: literal(other, *args), points, features, neighbors
        )
        torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
        scale = max(g.abs().max() for g in expected_grads)
        for a, e in zip(grads, expected_grads, strict=True):
            assert (a - e).abs().max() <= 1e-10 * scale
    for (name, a), (_, e) in zip(module.named_buffers(), other.named_buffers(), strict=True):
        # The literal edge norms without -1 bypass their counter.
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)
    assert module.encode[0].norm.num_batches_tracked == (2 if training else 0)


def test_block_in_float32_is_as_accurate_as_the_literal_formulation(isa):
    points, features, neighbors = inputs(0.2, points=400)
    exact = literal(make(), points, features, neighbors)
    single = make(dtype=torch.float32)
    literal_single = literal(copy.deepcopy(single), points.float(), features.float(), neighbors)
    ours = single(points.float(), features.float(), neighbors)
    assert (ours - exact).abs().max() <= 2 * (literal_single - exact).abs().max() + 1e-6


def test_block_normalises_exactly_far_from_the_origin(isa):
    """Statistics over points of size 1000 +- 1 are those of the centred cloud."""
    points, features, neighbors = inputs(0.2, points=500)
    far = ((points.detach() * 512).round() / 512 + 1000).double()
    exact = literal(make(), far, features, neighbors)
    ours = make(dtype=torch.float32)(far.float(), features.float(), neighbors)
    literally = literal(make(dtype=torch.float32), far.float(), features.float(), neighbors)
    assert (ours - exact).abs().max() <= 2 * (literally - exact).abs().max() + 1e-5


@pytest.mark.parametrize(
    ("in_channels", "out_channels", "expected"),
    [(8, 32, 2208), (32, 128, 30336), (128, 256, 138496), (256, 512, 547328)],
)
def test_block_has_the_published_number_of_parameters(in_channels, out_channels, expected):
    module = LocalFeatureAggregation(in_channels, out_channels)
    assert sum(p.numel() for p in module.parameters()) == expected


def test_blocks_leave_the_rest_of_the_published_network_its_parameters():
    """1,241,379 with 3 input channels and 19 classes: four blocks, and the layers around them."""

    def layer(inputs, outputs):
        return inputs * outputs + 3 * outputs

    blocks, channels = 0, 8
    for out_channels in (32, 128, 256, 512):
        block = LocalFeatureAggregation(channels, out_channels)
        blocks += sum(p.numel() for p in block.parameters())
        channels = out_channels
    encoder = layer(3, 8) + layer(512, 512)
    decoder = layer(512 + 256, 256) + layer(256 + 128, 128) + layer(128 + 32, 32) + layer(32 + 32, 32)
    head = layer(32, 64) + layer(64, 32) + 32 * 19 + 19
    assert blocks + encoder + decoder + head == 1_241_379


def test_block_unbatched_equals_batched():
    module = make().eval()
    points, features, neighbors = inputs(0.2, batch=1)
    torch.testing.assert_close(
        module(points[0], features[0], neighbors[0]), module(points, features, neighbors)[0]
    )


def test_block_without_edges_keeps_running_statistics():
    module = make()
    points, features, neighbors = inputs(0.2)
    module(points, features, torch.full_like(neighbors, -1))
    for layer in module.encode:
        assert layer.norm.num_batches_tracked == 0
        assert (layer.norm.running_mean == 0).all()
        assert (layer.norm.running_var == 1).all()


def test_block_averages_all_batches_with_momentum_none():
    module = make(momentum=None)
    means = []
    for step in range(3):
        points, features, neighbors = inputs(0.2, points=20 + step)
        module(points, features, neighbors)
        alone = make(momentum=1.0)
        alone(points, features, neighbors)
        means.append(alone.encode[1].norm.running_mean)
    torch.testing.assert_close(module.encode[1].norm.running_mean, torch.stack(means).mean(0))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_block_compiles_in_one_graph(training):
    torch._dynamo.reset()
    module, other = make().train(training), make().train(training)
    points, features, neighbors = inputs(0.2)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    output, grads = gradients(module, compiled, points, features, neighbors)
    expected, expected_grads = gradients(other, other, points, features, neighbors)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    for a, e in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-8)
    for a, e in zip(module.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, e)


def block_operands(module):
    layers = [module.get_submodule(name) for name in NORMS]
    parts = [
        part.detach()
        for layer in layers
        for part in layer.normed(layer.norm.running_mean, layer.norm.running_var)
    ]
    return parts, [layer.norm.eps for layer in layers], [score.weight.detach() for score in module.scores]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("channels", "width", "points"), [(5, 16, 30), (3, 4, 8), (20, 96, 700), (64, 200, 90)]
)
def test_block_without_gradient_equals_its_steps(channels, width, points, dtype, isa):
    """In evaluation the block is one op; where a gradient is wanted it goes step by step."""
    module = make(channels, width)
    module(*inputs(0.2, channels=channels, points=50))  # Other statistics than at the start.
    module.eval().to(dtype)
    operands = [t.detach() for t in inputs(0.2, channels=channels, points=points, dtype=dtype)]
    with torch.no_grad():
        output = module(*operands)
        alone = module(*(t[1] for t in operands))
    steps = module(*operands)
    assert not output.requires_grad
    assert steps.requires_grad
    assert output.dtype == dtype
    tolerance = {"rtol": 0.05, "atol": 0.2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(output, steps.detach(), **tolerance)
    torch.testing.assert_close(alone, output[1], **tolerance)


@torch.no_grad()
def test_block_without_gradient_has_the_same_bits_for_any_threads_and_strides(isa):
    module = make(20, 96, dtype=torch.float32).eval()
    operands = [t.detach() for t in inputs(0.2, channels=20, points=3000, dtype=torch.float32)]
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in operands]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = module(*operands)
        torch.set_num_threads(3)
        assert torch.equal(module(*operands), expected)
        assert torch.equal(module(*strided), expected)
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def test_block_of_no_points():
    module = make().eval()
    points, features, neighbors = torch.zeros(2, 0, 3), torch.zeros(2, 0, 5), torch.zeros(2, 0, 6)
    assert module(points.double(), features.double(), neighbors.long()).shape == (2, 0, 16)


def test_block_without_gradient_compiles_in_one_graph():
    torch._dynamo.reset()
    module = make().eval()
    operands = [t.detach() for t in inputs(0.2)]
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*operands), module(*operands))


def test_block_without_gradient_runs_under_autocast():
    module = make(dtype=torch.float32).eval()
    operands = [t.detach() for t in inputs(0.2, dtype=torch.float32)]
    with torch.no_grad():
        expected = module(*operands)
        with torch.autocast("cpu", torch.bfloat16):
            output = module(*operands)
    assert (output.float() - expected).abs().max() <= 0.1 * expected.abs().max()


def test_block_op_passes_opcheck():
    module = make(dtype=torch.float32).eval()
    operands = [t.detach() for t in inputs(0.2, dtype=torch.float32)]
    op = torch.ops.avatar_ops.local_attention_pool_block.default
    torch.library.opcheck(op, (*operands, *block_operands(module), 0.2))


@torch.no_grad()
def test_block_without_gradient_rejects_other_shapes():
    module = make().eval()
    points, features, neighbors = inputs(0.2)
    with pytest.raises(ValueError, match="features: got shape"):
        module(points, features[:, 1:], neighbors)
    with pytest.raises(ValueError, match="neighbors: got shape"):
        module(points, features, neighbors[:, 1:])
    neighbors[1, 3, 2] = 30
    with pytest.raises(IndexError, match=r"neighbors\[1, 3, 2\] = 30; expected -1"):
        module(points, features, neighbors)
    neighbors[1, 3, 2] = 0
    module.scores[1] = torch.nn.Linear(8, 7, bias=False, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"scores: got shape \(7, 8\), expected \(8, 8\)"):
        module(points, features, neighbors)
    module = make().eval()
    module.encode[1].linear = torch.nn.Linear(5, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"layers\[2\]: got shape \(4, 5\), expected \(4, 4\)"):
        module(points, features, neighbors)
    module = make().eval()
    module.expand.norm = torch.nn.BatchNorm1d(17, dtype=torch.float64).eval()
    with pytest.raises(ValueError, match="got 17 numbers in a layer of 16 outputs"):
        module(points, features, neighbors)


def test_block_exports_and_loads():
    module = make(dtype=torch.float32).eval()
    points, features, neighbors = inputs(0.2, dtype=torch.float32)
    arguments = points.detach(), features.detach(), neighbors
    file = io.BytesIO()
    torch.export.save(torch.export.export(module, arguments), file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(*arguments), module(*arguments))


def test_block_runs_under_autocast():
    module = make(dtype=torch.float32)
    points, features, neighbors = inputs(0.2, dtype=torch.float32)
    expected = make(dtype=torch.float32)(points, features, neighbors)
    with torch.autocast("cpu", torch.bfloat16):
        output = module(points, features, neighbors)
    assert (output.float() - expected).abs().max() <= 0.1 * expected.abs().max()
    output.sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"in_channels": 0, "out_channels": 16}, "in_channels: got 0"),
        ({"in_channels": 4, "out_channels": 18}, "out_channels: got 18, expected a multiple of 4"),
        ({"in_channels": 4, "out_channels": 16, "dims": 0}, "dims: got 0"),
        ({"in_channels": 4, "out_channels": 16, "negative_slope": -1.0}, "negative_slope"),
    ],
)
def test_block_rejects(options, match):
    with pytest.raises(ValueError, match=match):
        LocalFeatureAggregation(**options)


def test_block_rejects_other_widths():
    points, features, neighbors = inputs(0.2)
    with pytest.raises(ValueError, match="features: got shape"):
        make()(points, features[..., 1:], neighbors)
    with pytest.raises(ValueError, match="points: got shape"):
        make()(points[..., 1:], features, neighbors)
