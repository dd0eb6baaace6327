import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from avatar.config import PointFeaturesConfig
from avatar.errors import AvatarError
from avatar.models.mlp import parameter_count
from avatar.models.point_features import (
    PointFeatures,
    PointGcn,
    Pyramid,
    RandLANet,
    build_pyramid,
    level_sizes,
)

PAPER_POINTS = 400_000
SMALL = PointFeaturesConfig(
    randla_widths=(4, 6, 8),
    randla_neighbors=5,
    gcn_widths=(6, 10),
    gcn_neighbors=4,
    gcn_output=12,
    gcn_level=1,
)


def cloud(points=200, frames=2, dtype=torch.float64):
    """Canonical points, posed points and colours."""
    generator = torch.Generator().manual_seed(1)
    canonical = torch.randn(points, 3, generator=generator, dtype=dtype)
    posed = canonical + 0.1 * torch.randn(frames, points, 3, generator=generator, dtype=dtype)
    return canonical, posed, torch.rand(frames, points, 3, generator=generator, dtype=dtype)


def randomise_norms(module):
    """Scales of both signs and running statistics, so that nothing about them can be left out unseen."""
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
                layer.weight.copy_(1 + torch.randn_like(layer.weight))
                layer.bias.copy_(torch.randn_like(layer.bias))
                layer.running_mean.copy_(torch.randn_like(layer.running_mean))
                layer.running_var.copy_(0.5 + torch.rand_like(layer.running_var))
    return module


def literal_layer(layer, x):
    """Linear map, batch normalisation over all rows, LeakyReLU 0.2."""
    y = layer.linear(x)
    return F.leaky_relu(layer.norm(y.reshape(-1, y.shape[-1])).view(y.shape), 0.2)


def literal_block(block, points, features, neighbors):
    center = points[:, :, None].expand(-1, -1, neighbors.shape[1], -1)
    neighbor = points[:, neighbors]
    distance = (center - neighbor).norm(dim=-1, keepdim=True)
    position = literal_layer(block.encode[0], torch.cat([center, neighbor, center - neighbor, distance], -1))
    x = literal_layer(block.reduce, features)
    for step in range(2):
        if step == 1:
            position = literal_layer(block.encode[1], position)
        edges = torch.cat([x[:, neighbors], position], -1)
        attention = torch.softmax(block.scores[step](edges), 2)
        x = literal_layer(block.attend[step], (attention * edges).sum(2))
    paths = []
    for layer, inputs in ((block.expand, x), (block.shortcut, features)):
        y = layer.linear(inputs)
        paths.append(layer.norm(y.flatten(0, 1)).view(y.shape))
    return F.leaky_relu(paths[0] + paths[1], 0.2)


def literal_randla(network, points, features, pyramid):
    """Figure 7 of the paper by torch's own operations, every edge formed."""
    places = pyramid.order.argsort()
    points, features = points[:, pyramid.order], features[:, pyramid.order]
    x = literal_layer(network.input, features)
    finer = []
    for level, block in enumerate(network.encoder):
        neighbors = pyramid.neighbors[level]
        x = literal_block(block, points, x, neighbors)
        if level == 0:
            finer.append(x)
        keep = pyramid.samples[level]
        x = x[:, neighbors[keep]].amax(2)
        points = points[:, keep]
        if level < len(network.encoder) - 1:
            finer.append(x)
    x = literal_layer(network.middle, x)
    for step, layer in enumerate(network.decoder):
        up = x[:, pyramid.nearest[-1 - step]]
        x = literal_layer(layer, torch.cat([finer[-1 - step], up], -1))
    if network.head is None:
        return x[:, places]
    for layer in network.head:
        x = literal_layer(layer, x)
    return network.classifier(x)[:, places]


@pytest.mark.parametrize("classes", [None, 3], ids=["features", "classes"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_randla_equals_the_literal_formulation(training, classes):
    """Outputs, gradients and running statistics."""
    torch.manual_seed(0)
    canonical, posed, colors = cloud()
    pyramid = build_pyramid(canonical, SMALL, 3)
    network = randomise_norms(RandLANet(6, widths=SMALL.randla_widths, classes=classes, dropout=0.0).double())
    network.train(training)
    other = copy.deepcopy(network)
    results = []
    for module, function in ((network, network), (other, lambda *inputs: literal_randla(other, *inputs))):
        points = posed.clone().requires_grad_()
        output = function(points, torch.cat([points, colors], -1), pyramid)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        gradients = torch.autograd.grad((output * weights).sum(), [points, *module.parameters()])
        results.append((output, gradients))
    (output, gradients), (expected, expected_gradients) = results
    assert output.shape == (2, 200, 8 if classes is None else 3)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    scale = max(gradient.abs().max() for gradient in expected_gradients)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert (gradient - wanted).abs().max() <= 1e-9 * scale
    for buffer, wanted in zip(network.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(buffer, wanted, rtol=1e-9, atol=1e-9)


def test_randla_in_float32_is_close_to_float64():
    torch.manual_seed(0)
    canonical, posed, colors = cloud()
    pyramid = build_pyramid(canonical, SMALL, 3)
    network = RandLANet(6, widths=SMALL.randla_widths).double()
    exact = literal_randla(copy.deepcopy(network), posed, torch.cat([posed, colors], -1), pyramid)
    posed, colors = posed.float(), colors.float()
    single = network.float()(posed, torch.cat([posed, colors], -1), pyramid)
    torch.testing.assert_close(single.double(), exact, rtol=1e-3, atol=1e-4)


def test_randla_has_the_published_sizes():
    with torch.device("meta"):
        assert parameter_count(RandLANet(3, classes=19)) == 1_241_379
        assert parameter_count(RandLANet(6, classes=19)) == 1_241_403
        assert parameter_count(RandLANet(6)) == 1_236_392
        five = RandLANet(6, widths=(16, 64, 128, 256, 512), classes=13, ratio=(4, 4, 4, 4, 2))
        assert parameter_count(five) == 4_993_141


def test_randla_counts_the_published_multiply_accumulates():
    with torch.device("meta"):
        counts = RandLANet(3, classes=19).macs(PAPER_POINTS)
        without_head = RandLANet(6).macs(PAPER_POINTS)
    assert round(sum(counts.values()) / 1e12, 4) == 0.0628
    assert round(sum(without_head.values()) / 1e12, 4) == 0.0609
    blocks = [round(counts[f"encoder.{level}"] / 1e12, 4) for level in range(4)]
    assert blocks == [0.0047, 0.0172, 0.0175, 0.0173]


def test_edge_conv_layers_count_once_per_edge():
    with torch.device("meta"):
        features = PointFeatures(PointFeaturesConfig())
    assert features.out_channels == 288
    assert parameter_count(features.gcn) == 92_160
    per_edge, per_point = 12 * 64 + 128 * 64 + 128 * 128, 256 * 256
    assert features.macs(PAPER_POINTS) == {
        "randla": sum(features.randla.macs(PAPER_POINTS).values()),
        "gcn": PAPER_POINTS * (20 * per_edge + per_point),
    }


def test_gcn_equals_the_literal_formulation():
    torch.manual_seed(0)
    canonical, posed, colors = cloud()
    graph = build_pyramid(canonical, replace(SMALL, gcn_level=0), 0).graph
    gcn = randomise_norms(PointGcn(6, (6, 10), 12).double()).eval()
    x = torch.cat([posed, colors], -1)
    found = gcn(x, graph)
    outputs = []
    for layer in gcn.layers:
        center = x[:, :, None].expand(-1, -1, graph.shape[1], -1)
        edges = layer.linears[0](torch.cat([center, center - x[:, graph]], -1))
        x = F.leaky_relu(layer.norms[0](edges.permute(0, 3, 1, 2)), 0.2).amax(3).mT
        outputs.append(x)
    torch.testing.assert_close(found, literal_layer(gcn.output, torch.cat(outputs, -1)))
    assert PointGcn(6, (6, 10)).out_channels == 16


@pytest.mark.parametrize("level", [0, 1, 2])
def test_features_join_randla_with_copies_from_the_level_of_the_gcn(level):
    torch.manual_seed(0)
    config = replace(SMALL, gcn_level=level)
    canonical, posed, colors = cloud(dtype=torch.float32)
    pyramid = build_pyramid(canonical, config, 0)
    features = PointFeatures(config).eval()
    joined = features(posed, colors, pyramid)
    assert joined.shape == (2, 200, features.out_channels)
    inputs = torch.cat([posed, colors], -1)
    torch.testing.assert_close(joined[..., :8], features.randla(posed, inputs, pyramid))
    kept, copied = pyramid.order, pyramid.order.argsort()
    for step in range(level):
        kept, copied = kept[pyramid.samples[step]], pyramid.nearest[step][copied]
    coarse = features.gcn(inputs[:, kept], pyramid.graph)
    torch.testing.assert_close(joined[..., 8:], coarse[:, copied])


def test_every_parameter_of_the_features_gets_a_gradient():
    torch.manual_seed(0)
    canonical, posed, colors = cloud(dtype=torch.float32)
    features = PointFeatures(SMALL).eval()
    posed.requires_grad_()
    colors.requires_grad_()
    output = features(posed, colors, build_pyramid(canonical, SMALL, 0))
    (output * torch.randn_like(output)).sum().backward()
    for name, value in [*features.named_parameters(), ("posed", posed), ("colors", colors)]:
        assert value.grad is not None, name
        assert value.grad.isfinite().all(), name
        assert value.grad.any(), name


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_frames_may_come_in_any_order(training):
    torch.manual_seed(0)
    canonical, posed, colors = cloud(frames=3)
    pyramid = build_pyramid(canonical, SMALL, 0)
    features = PointFeatures(SMALL).double().train(training)
    order = torch.tensor([2, 0, 1])
    together = features(posed, colors, pyramid)
    torch.testing.assert_close(features(posed[order], colors[order], pyramid), together[order])
    if not training:
        torch.testing.assert_close(features(posed[:1], colors[:1], pyramid), together[:1])


def test_pyramid_holds_samples_neighbors_and_nearest_points():
    canonical = cloud(300)[0]
    pyramid = build_pyramid(canonical, SMALL, 0)
    sizes = level_sizes(300, SMALL.randla_ratios())
    assert sizes == [300, 75, 18, 4]
    assert [len(sample) for sample in pyramid.samples] == sizes[1:]
    assert [tuple(level.shape) for level in pyramid.neighbors] == [(size, 5) for size in sizes[:3]]
    assert pyramid.graph.shape == (75, 4)
    assert torch.equal(pyramid.order.sort().values, torch.arange(300))
    points = canonical[pyramid.order]
    for level, sample in enumerate(pyramid.samples):
        assert len(sample.unique()) == len(sample)
        distances = torch.cdist(points, points)
        wanted = distances.argsort(1)[:, :5]
        assert torch.equal(pyramid.neighbors[level], wanted)
        assert torch.equal(pyramid.nearest[level], distances[:, sample].argmin(1))
        points = points[sample]
        if level == 0:
            assert torch.equal(pyramid.graph, torch.cdist(points, points).argsort(1)[:, :4])


def test_pyramid_is_a_function_of_points_options_and_seed():
    canonical = cloud(300)[0].requires_grad_()
    first, again, other = (build_pyramid(canonical, SMALL, seed).tensors() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["samples.0"], other["samples.0"])
    assert torch.equal(first["neighbors.0"], other["neighbors.0"])


def test_pyramid_goes_through_named_tensors():
    pyramid = build_pyramid(cloud(100)[0], SMALL, 0)
    names = [
        "order",
        "graph",
        *(f"{kind}.{level}" for kind in ("samples", "neighbors", "nearest") for level in range(3)),
    ]
    assert list(pyramid.tensors()) == names
    restored = Pyramid.from_tensors(pyramid.tensors() | {"points": torch.zeros(1)}).to("cpu")
    for name, tensor in restored.tensors().items():
        assert torch.equal(tensor, pyramid.tensors()[name])
    assert restored.num_points == 100


def test_last_ratio_may_differ():
    config = replace(SMALL, randla_last_ratio=2)
    assert config.randla_ratios() == (4, 4, 2)
    pyramid = build_pyramid(cloud(320)[0], config, 0)
    assert [len(sample) for sample in pyramid.samples] == [80, 20, 10]


@pytest.mark.parametrize("points", [1, 2, 3, 7, 40])
def test_tiny_clouds(points):
    """Fewer points than neighbours or than the product of the ratios."""
    torch.manual_seed(0)
    canonical, posed, colors = cloud(points, frames=2 if points == 1 else 1, dtype=torch.float32)
    pyramid = build_pyramid(canonical, SMALL, 0)
    assert all(len(sample) >= 1 for sample in pyramid.samples)
    features = PointFeatures(SMALL)
    for training in (True, False):
        output = features.train(training)(posed, colors, pyramid)
        assert output.shape == (len(posed), points, features.out_channels)
        assert output.isfinite().all()
        output.square().sum().backward()
        assert all(value.grad.isfinite().all() for value in features.parameters())


def test_features_are_restored_from_their_state():
    canonical, posed, colors = cloud(dtype=torch.float32)
    pyramid = build_pyramid(canonical, SMALL, 0)
    torch.manual_seed(0)
    features = PointFeatures(SMALL)
    features(posed, colors, pyramid)
    other = PointFeatures(SMALL)
    other.load_state_dict(features.state_dict())
    assert torch.equal(other.eval()(posed, colors, pyramid), features.eval()(posed, colors, pyramid))


def test_rejects():
    canonical, posed, colors = cloud(dtype=torch.float32)
    with pytest.raises(AvatarError, match="points: got shape"):
        build_pyramid(posed, SMALL, 0)
    with pytest.raises(AvatarError, match="points: got some that are not finite"):
        build_pyramid(canonical / 0, SMALL, 0)
    with pytest.raises(AvatarError, match="gcn_level: got 4, wants a level from 0 to 3"):
        build_pyramid(canonical, replace(SMALL, gcn_level=4), 0)
    with pytest.raises(AvatarError, match="ratio: got 2 numbers, wants one for each of 4 levels"):
        RandLANet(6, ratio=(4, 2))
    features = PointFeatures(SMALL)
    with pytest.raises(AvatarError, match="pyramid: got one of 50 points, wants 200"):
        features(posed, colors, build_pyramid(canonical[:50], SMALL, 0))
    with pytest.raises(AvatarError, match="pyramid: got 2 levels, wants 3"):
        features(posed, colors, build_pyramid(canonical, replace(SMALL, randla_widths=(4, 6)), 0))
