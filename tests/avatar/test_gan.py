import copy
import math

import pytest
import torch
from test_generator import make_inputs, tiny_generator

from avatar import gan
from avatar.config import DiscriminatorConfig, InverterConfig
from avatar.models.discriminator import Discriminator
from avatar.models.inverter import Inverter
from avatar.models.pyramid import normalize_rms


def tiny_discriminator(size=8):
    return Discriminator(DiscriminatorConfig(channel_base=32, channel_max=4), size)


def randomize(module):
    """Leave no parameter at a value that hides a term."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.7)


def gradient(loss, module):
    return torch.autograd.grad(loss, list(module.parameters()), materialize_grads=True)


def directional(module, loss, step=1e-6):
    """A random direction in parameter space: the gradient's share along it, and that by central differences."""
    parameters = list(module.parameters())
    direction = [torch.randn_like(parameter) for parameter in parameters]
    analytic = sum((g * d).sum() for g, d in zip(gradient(loss(), module), direction, strict=True))
    values = []
    for sign in (1, -1):
        for parameter, d in zip(parameters, direction, strict=True):
            parameter.data.add_(d, alpha=sign * step)
        values.append(loss().detach())
        for parameter, d in zip(parameters, direction, strict=True):
            parameter.data.sub_(d, alpha=sign * step)
    return analytic, (values[0] - values[1]) / (2 * step)


def relative_error(gradients, expected):
    difference = sum((g.double() - e).square().sum() for g, e in zip(gradients, expected, strict=True))
    return (difference / sum(e.square().sum() for e in expected)).sqrt()


def test_logistic_losses():
    real, fake = torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [-1.0]])
    softplus = [math.log1p(math.exp(x)) for x in (0, -2, -1, 1)]
    assert gan.generator_loss(fake).item() == pytest.approx((softplus[0] + softplus[3]) / 2)
    expected = (softplus[0] + softplus[1]) / 2 + (softplus[0] + softplus[2]) / 2
    assert gan.discriminator_loss(real, fake).item() == pytest.approx(expected)


def test_r1_is_the_squared_slope():
    discriminator = tiny_discriminator().double()
    randomize(discriminator)
    real = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    step = 1e-6
    slopes = torch.zeros(2, real[0].numel(), dtype=torch.float64)
    with torch.no_grad():
        for image in range(2):
            for pixel in range(real[0].numel()):
                moved = real.repeat(2, 1, 1, 1).reshape(2, 2, -1)
                moved[0, image, pixel] += step
                moved[1, image, pixel] -= step
                up, down = (discriminator(side.reshape(real.shape)).sum() for side in moved)
                slopes[image, pixel] = (up - down) / (2 * step)
    penalty = gan.r1_penalty(discriminator, real, gamma=3.0)
    torch.testing.assert_close(penalty, 1.5 * slopes.square().sum(1).mean(), rtol=1e-6, atol=0)
    assert real.grad is None


def test_r1_differentiates():
    discriminator = tiny_discriminator()
    randomize(discriminator)
    real = torch.rand(3, 3, 8, 8)
    double = copy.deepcopy(discriminator).double()
    analytic, numeric = directional(double, lambda: gan.r1_penalty(double, real.double(), 2.0))
    torch.testing.assert_close(analytic, numeric, rtol=1e-5, atol=0)
    gradients = gradient(gan.r1_penalty(discriminator, real, 2.0), discriminator)
    assert relative_error(gradients, gradient(gan.r1_penalty(double, real.double(), 2.0), double)) < 1e-4


@pytest.mark.parametrize("condition", ["splat", "none"])
def test_path_length_differentiates(condition):
    generator = tiny_generator(8, condition=condition, channel_max=4)
    randomize(generator)
    z, buffers = make_inputs(generator)

    def penalty(network):
        dtype = network.filter.dtype
        styles = network.mapping(z.to(dtype))
        image = network.synthesize(
            styles, buffers if buffers is None else buffers.to(dtype), noise="none"
        ).image
        path_length = gan.PathLength(decay=0.0)
        path_length.mean.fill_(0.3)
        return path_length(image, styles, torch.Generator().manual_seed(1))

    double = copy.deepcopy(generator).double()
    analytic, numeric = directional(double, lambda: penalty(double))
    torch.testing.assert_close(analytic, numeric, rtol=1e-5, atol=0)
    gradients = gradient(penalty(generator), generator)
    assert relative_error(gradients, gradient(penalty(double), double)) < 1e-4


def test_path_length_of_a_linear_map():
    """|J^T y| of images that are styles themselves is |y|, and the running mean follows it."""
    styles = torch.randn(5, 12, requires_grad=True)
    images = 3 * styles.view(5, 3, 2, 2)
    path_length = gan.PathLength(decay=0.1)
    y = torch.randn(5, 12, generator=torch.Generator().manual_seed(2)) / 2
    lengths = 3 * y.norm(dim=1)
    penalty = path_length(images, styles, torch.Generator().manual_seed(2))
    torch.testing.assert_close(path_length.mean, 0.1 * lengths.mean())
    torch.testing.assert_close(penalty, (lengths - path_length.mean).square().mean())
    path_length(images, styles, torch.Generator().manual_seed(2))
    torch.testing.assert_close(path_length.mean, 0.19 * lengths.mean())


def test_path_length_of_a_generator_that_does_not_paint_yet():
    generator = tiny_generator()
    z, buffers = make_inputs(generator)
    styles = generator.mapping(z)
    penalty = gan.PathLength()(generator.synthesize(styles, buffers).image, styles)
    assert all(g.isfinite().all() for g in gradient(penalty, generator))


@pytest.mark.parametrize("condition", ["splat", "none"])
def test_inversion_loss(condition):
    """Eq. 9 term by term; its gradient reaches the inverter alone."""
    generator = tiny_generator(condition=condition)
    inverter = Inverter(InverterConfig(2, 16), generator.config, generator.size)
    z, buffers = make_inputs(generator)
    inputs = [z.requires_grad_()] + ([] if buffers is None else [buffers.requires_grad_()])
    synthesis = generator(*inputs)
    loss = gan.inversion_loss(inverter, z, synthesis)
    inversion = inverter(synthesis.image)
    expected = (inversion.z - normalize_rms(z)).square().mean()
    for ours, theirs in zip(inversion.features, synthesis.features, strict=True):
        expected = expected + (ours - theirs).abs().mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(value.grad is None for value in [*inputs, *generator.parameters()])
    assert all(value.grad.any() for value in inverter.parameters())


def test_cosine_distance():
    a = torch.randn(4, 7)
    for b, expected in ((2 * a, 0.0), (-a, 2.0)):
        torch.testing.assert_close(gan.cosine_distance(a, b), torch.tensor(expected))
    a, b = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 3.0], [1.0, 1.0]])
    assert gan.cosine_distance(a, b).item() == pytest.approx(1 - 0.5 * 0.5**0.5)


@pytest.mark.parametrize("batch", [1, 5, 100])
def test_ema_half_life(batch):
    model = torch.nn.Linear(2, 2)
    torch.nn.init.ones_(model.weight)
    ema = gan.Ema(model, half_life=100)
    torch.nn.init.zeros_(model.weight)
    for _ in range(100 // batch):
        ema.update(model, batch)
    torch.testing.assert_close(ema.model.weight, torch.full((2, 2), 0.5))
    assert not any(parameter.requires_grad for parameter in ema.parameters())


def test_ema_goes_on_from_its_state():
    generator = tiny_generator(condition="none")
    ema = gan.Ema(generator, half_life=10)

    def train(ema, seed):
        torch.manual_seed(seed)
        randomize(generator)
        generator.noise_0.normal_()
        ema.update(generator, 3)

    train(ema, 1)
    other = gan.Ema(tiny_generator(condition="none"), half_life=10)
    other.load_state_dict(ema.state_dict())
    for each in (ema, other):
        train(each, 2)
    assert all(
        torch.equal(a, b) for a, b in zip(ema.state_dict().values(), other.state_dict().values(), strict=True)
    )
    assert torch.equal(other.model.noise_0, generator.noise_0)
