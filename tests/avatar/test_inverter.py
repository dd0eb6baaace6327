import pytest
import torch
from test_generator import make_inputs, tiny_config, tiny_generator

from avatar.config import GeneratorConfig, InverterConfig
from avatar.models.inverter import Inverter

TINY = InverterConfig(mapping_layers=2, mapping_width=16)
SIZES = {
    (256, 16384): 23_237_696,
    (256, 32768): 28_305_536,
    (512, 16384): 23_298_080,
    (512, 32768): 28_481_600,
}


@pytest.mark.parametrize(("size", "base"), SIZES)
def test_sizes(size, base):
    with torch.device("meta"):
        inverter = Inverter(InverterConfig(), GeneratorConfig(channel_base=base, condition="none"), size)
    assert sum(parameter.numel() for parameter in inverter.parameters()) == SIZES[size, base]


def test_macs():
    """Counted by hand for two resolutions of 8 channels at 4 and 4 at 8."""
    config = GeneratorConfig(channel_base=32, channel_max=8, latent_size=5, condition="none")
    inverter = Inverter(TINY, config, 8)
    convolutions = 3 * 4 * 64 + 4 * 4 * 9 * 64 + 4 * 8 * 9 * 16 + 8 * 8 * 9 * 16
    assert inverter.macs() == convolutions + 2 * 12 * 16 + 16 * 5


@pytest.mark.parametrize("options", [{}, {"condition": "none"}, {"start": 8}, {"start_input": "buffer"}])
@pytest.mark.parametrize("size", [16, 32])
def test_maps_are_as_the_generators(options, size):
    generator = tiny_generator(size, **options)
    z, buffers = make_inputs(generator, 3)
    synthesis = generator(z, buffers)
    inversion = Inverter(TINY, generator.config, size)(synthesis.image)
    assert [f.shape for f in inversion.features] == [f.shape for f in synthesis.features]
    assert inversion.z.shape == z.shape
    torch.testing.assert_close(inversion.z.square().mean(1), torch.ones(3))


def test_gradient_reaches_every_parameter():
    inverter = Inverter(TINY, tiny_config(), 16)
    images = torch.rand(2, 3, 16, 16, requires_grad=True)
    (inverter(images).z * torch.randn(8)).sum().backward()
    for name, parameter in [("images", images), *inverter.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_gradient_is_finite_on_uniform_images():
    images = torch.full((1, 3, 16, 16), 0.5, requires_grad=True)
    Inverter(TINY, tiny_config(), 16)(images).z[:, 0].sum().backward()
    assert images.grad.isfinite().all()


def test_rejects():
    inverter = Inverter(TINY, tiny_config(), 16)
    with pytest.raises(ValueError, match=r"images: got shape .* expected \(B, 3, 16, 16\)"):
        inverter(torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match="size: got 20, expected 4"):
        Inverter(TINY, tiny_config(condition="none"), 20)
