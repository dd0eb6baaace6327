import pytest
import torch

from avatar.config import GeneratorConfig
from avatar.models.generator import Generator, MappingNetwork

SIZE = 16
BUFFERS = 15


def tiny_config(**changes):
    options = {
        "channel_base": 128,
        "channel_max": 12,
        "latent_size": 8,
        "style_size": 10,
        "mapping_layers": 2,
    }
    return GeneratorConfig(**(options | changes))


def tiny_generator(size=SIZE, **changes):
    return Generator(tiny_config(**changes), size)


def make_inputs(generator, batch=2):
    """A code and, for a conditioned generator, buffers."""
    z = torch.randn(batch, generator.config.latent_size)
    if not generator.is_conditioned:
        return z, None
    return z, torch.rand(batch, BUFFERS, generator.size, generator.size)


def set_noise_strengths(generator, value):
    for name, parameter in generator.named_parameters():
        if name.endswith("noise_strength"):
            torch.nn.init.constant_(parameter, value)


def parameter_count(module):
    return sum(parameter.numel() for parameter in module.parameters())


PUBLISHED = {
    (256, 16384): (24_767_458, 15.0),
    (256, 32768): (30_034_338, 45.4),
    (512, 16384): (24_860_935, 18.8),
    (512, 32768): (30_276_583, 60.2),
}


@pytest.mark.parametrize(("size", "base"), PUBLISHED)
def test_published_sizes(size, base):
    with torch.device("meta"):
        generator = Generator(GeneratorConfig(channel_base=base, condition="none"), size)
    parameters, giga_macs = PUBLISHED[size, base]
    assert parameter_count(generator) == parameters
    assert round(generator.macs() / 1e9, 1) == giga_macs


def test_conditioned_sizes():
    """Starting at a quarter of the size leaves out most of StyleGAN2's weights."""
    with torch.device("meta"):
        generator = Generator(GeneratorConfig(), 512)
    assert generator.resolutions == (128, 256, 512)
    assert parameter_count(generator) == 4_843_662
    assert round(generator.macs() / 1e9, 1) == 11.9


def test_mapping_size():
    assert parameter_count(MappingNetwork(GeneratorConfig())) == 2_101_248


def test_learning_rate_of_the_mapping():
    """Layers of any rate start alike; Adam's step, the same for every weight, moves them by their rate."""
    config = tiny_config(mapping_layers=1, latent_size=400, style_size=400)
    layer = MappingNetwork(config).layers[0]
    x = torch.randn(64, 400)
    assert torch.nn.functional.linear(x, layer.weight / 100 / 20).std().item() == pytest.approx(1, abs=0.05)
    before = layer(x)
    with torch.no_grad():
        layer.bias += 1
    expected = torch.where(before < 0, 0.2, 1.0) * 2**0.5 * 0.01
    assert ((layer(x) - before - expected).abs() < 1e-5).float().mean() > 0.98  # but where the sign turned


def test_mapping_ignores_the_length_of_a_code():
    mapping = MappingNetwork(tiny_config())
    z = torch.randn(3, 8)
    torch.testing.assert_close(mapping(5 * z), mapping(z))
    assert mapping(torch.zeros(1, 8)).isfinite().all()


@pytest.mark.parametrize("condition", ["splat", "none"])
@pytest.mark.parametrize("batch", [1, 3])
def test_shapes(condition, batch):
    generator = tiny_generator(condition=condition)
    image, features = generator(*make_inputs(generator, batch))
    assert image.shape == (batch, 3, SIZE, SIZE)
    assert generator.resolutions == (4, 8, 16)
    assert [tuple(f.shape) for f in features] == [(batch, 12, 4, 4), (batch, 12, 8, 8), (batch, 8, 16, 16)]


def test_starts_where_told():
    assert tiny_generator(start=8).resolutions == (8, 16)
    assert tiny_generator(start=SIZE).resolutions == (SIZE,)
    assert tiny_generator(size=24, start=6, condition="none").resolutions == (6, 12, 24)


@pytest.mark.parametrize("start_input", ["constant", "buffer"])
def test_paints_the_splatted_colours_at_first(start_input):
    generator = tiny_generator(start_input=start_input)
    z, buffers = make_inputs(generator)
    assert torch.equal(generator(z, buffers).image, buffers[:, :3])


def test_filters_have_unit_norm():
    """The response to an impulse in each channel is the filter as it is applied."""
    layer = tiny_generator().blocks[0].first
    impulses = torch.zeros(12, 12, 5, 5)
    impulses[range(12), range(12), 2, 2] = 1
    styles = torch.randn(1, 10).expand(12, -1)
    filters = layer(impulses, styles, torch.zeros(1))  # input channel, output channel, rows, columns
    torch.testing.assert_close(filters.square().sum((0, 2, 3)), torch.ones(12))


def test_injects_before_bias_and_activation():
    """With no convolution left, a first feature map is the activated convolution of the averaged buffers."""
    generator = tiny_generator()
    block = generator.blocks[1]
    torch.nn.init.zeros_(block.first.weight)
    torch.nn.init.normal_(block.first.bias)
    z, buffers = make_inputs(generator)
    seen = []
    block.second.register_forward_hook(lambda _, arguments, __: seen.append(arguments[0]))
    generator(z, buffers, noise="none")
    averaged = buffers.unflatten(3, (8, 2)).unflatten(2, (8, 2)).mean((3, 5))
    scale = (BUFFERS * 9) ** -0.5
    expected = torch.conv2d(averaged, block.inject.weight * scale, block.first.bias, padding=1)
    torch.testing.assert_close(seen[0], torch.nn.functional.leaky_relu(expected, 0.2) * 2**0.5)


@pytest.mark.parametrize("options", [{"condition": "none"}, {}, {"start_input": "buffer"}])
def test_gradient_reaches_every_parameter(options):
    """Where what is painted starts at zero, from the second step on."""
    generator = tiny_generator(**options)
    z, buffers = make_inputs(generator)
    target = torch.rand(2, 3, SIZE, SIZE)
    optimizer = torch.optim.SGD(generator.parameters(), 0.1)
    for _ in range(2 if generator.is_conditioned else 1):
        optimizer.zero_grad()
        (generator(z, buffers).image - target).square().mean().backward()
        gradients = {name: parameter.grad for name, parameter in generator.named_parameters()}
        optimizer.step()
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.any()] == []


def test_gradient_reaches_code_and_buffers():
    generator = tiny_generator()
    for block in generator.blocks:
        torch.nn.init.normal_(block.to_rgb.weight)
    z, buffers = (x.requires_grad_() for x in make_inputs(generator))
    generator(z, buffers).image.square().sum().backward()
    assert z.grad.any()
    assert buffers.grad.abs().amax((2, 3)).all()


def test_noise_follows_its_generator():
    generator = tiny_generator(condition="none")
    set_noise_strengths(generator, 1.0)
    z, _ = make_inputs(generator)

    def paint(seed):
        return generator(z, noise="random", generator=torch.Generator().manual_seed(seed)).image

    state = torch.get_rng_state()
    first = paint(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(paint(0), first)
    assert not torch.equal(paint(1), first)
    assert not torch.equal(generator(z).image, generator(z).image)


def test_constant_and_absent_noise():
    generator = tiny_generator(condition="none")
    z, _ = make_inputs(generator)
    without = generator(z, noise="none").image
    assert torch.equal(generator(z, noise="constant").image, without)
    set_noise_strengths(generator, 1.0)
    constant = generator(z, noise="constant").image
    assert torch.equal(generator(z, noise="constant").image, constant)
    assert not torch.equal(constant, without)
    assert torch.equal(generator(z, noise="none").image, without)
    copy = tiny_generator(condition="none")
    copy.load_state_dict(generator.state_dict())
    assert torch.equal(copy(z, noise="constant").image, constant)


def test_images_do_not_depend_on_their_batch():
    generator = tiny_generator(condition="none")
    z, _ = make_inputs(generator, 3)
    alone = torch.cat([generator(row[None], noise="constant").image for row in z])
    torch.testing.assert_close(generator(z, noise="constant").image, alone)


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (18, {}, "size: got 18, expected 4"),
        (20, {"condition": "none"}, "size: got 20, expected 4"),
        (16, {"start": 5}, "size: got 16, expected 5"),
        (16, {"start": 32}, "size: got 16, expected 32"),
        (0, {}, "size: got 0"),
        (16, {"start": 0}, "size: got 16"),
        (16, {"channel_base": 8}, "channel_base: got 8"),
        (16, {"condition": "none", "start_input": "buffer"}, "start_input: got 'buffer'"),
    ],
)
def test_rejects_sizes_and_options(size, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_generator(size, **options)


def test_rejects_inputs():
    generator, alone = tiny_generator(), tiny_generator(condition="none")
    z, buffers = make_inputs(generator)
    for arguments, message in [
        ((z,), r"buffers: got None, expected \(2, 15, 16, 16\)"),
        ((z, buffers[:, :-1]), r"buffers: got shape \(2, 14, 16, 16\), expected \(B, 15, 16, 16\)"),
        ((z, buffers[..., :-1]), r"buffers: got shape \(2, 15, 16, 15\)"),
        ((z, buffers[:1]), "buffers: got 1 images, expected 2"),
        ((z[0], buffers), r"z: got shape \(8,\), expected \(B, 8\)"),
        ((z[:, 1:], buffers), r"z: got shape \(2, 7\), expected \(B, 8\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            generator(*arguments)
    with pytest.raises(ValueError, match="buffers: got a tensor, expected None"):
        alone(z, buffers)
    with pytest.raises(ValueError, match="noise: got 'white', expected 'random', 'constant' or 'none'"):
        alone(z, noise="white")


@pytest.mark.parametrize("condition", ["splat", "none"])
def test_compile_and_export(condition):
    generator = tiny_generator(8, channel_max=4, mapping_layers=1, start=4, condition=condition)
    for block in generator.blocks:
        torch.nn.init.normal_(block.to_rgb.weight)
    inputs = make_inputs(generator)
    options = {"noise": "constant"}
    with torch.no_grad():
        expected = generator(*inputs, **options)
        compiled = torch.compile(generator, backend="aot_eager", fullgraph=True)(*inputs, **options)
        exported = torch.export.export(generator, inputs, options).module()(*inputs, **options)
    for result in (compiled, exported):
        torch.testing.assert_close(result.image, expected.image)
        torch.testing.assert_close(result.features, expected.features)


def test_compiles_with_its_backward_pass():
    generator = tiny_generator(8, channel_max=4, mapping_layers=1, condition="none")
    set_noise_strengths(generator, 0.5)
    z, _ = make_inputs(generator)
    parameters = list(generator.parameters())
    compiled = torch.compile(generator, backend="aot_eager", fullgraph=True)

    def gradients(network):
        return torch.autograd.grad(network(z, noise="constant").image.square().sum(), parameters)

    torch.testing.assert_close(gradients(compiled), gradients(generator))
