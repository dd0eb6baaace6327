"""StyleGAN2's networks for 256 x 256 images, and its regularisers' steps, against the same in plain torch."""

import pytest
import torch
from peers_generator import PlainDiscriminator, PlainGenerator, generator_peers
from peers_modulated_conv2d import grouped, scaled

import avatar_ops
from avatar.config import DiscriminatorConfig, GeneratorConfig
from avatar.gan import PathLength, r1_penalty
from avatar.models.discriminator import Discriminator
from avatar.models.generator import Generator

SIZE = 256
STEP_BATCH = 2


def make_generator():
    generator = Generator(GeneratorConfig(condition="none"), SIZE)
    for name, parameter in generator.named_parameters():
        if name.endswith("noise_strength"):
            torch.nn.init.constant_(parameter, 0.1)
    return generator


def assert_agree(ours, peers):
    """Checks that all calls give the same tensors."""
    expected = ours()
    for call in peers.values():
        torch.testing.assert_close(call(), expected, rtol=1e-3, atol=1e-4)


def run_case(compare, name, ours, peers, **options):
    assert_agree(ours, peers)
    compare(name, ours=ours, peers=peers, **options)


@pytest.mark.parametrize("batch", [1, 4])
def test_generator_inference(compare, batch):
    generator = make_generator()
    z = torch.randn(batch, generator.config.latent_size)

    def run(network, *arguments, **options):
        with torch.no_grad():
            return network(*arguments, **options)

    run_case(
        compare,
        f"generator {SIZE} B={batch}",
        lambda: run(generator, z, noise="constant").image,
        {name: lambda peer=peer: run(peer, z) for name, peer in generator_peers(generator).items()},
        memory=True,
    )


def r1_step(discriminator, images):
    """The penalty and the gradient in the first weight."""
    discriminator.zero_grad()
    penalty = r1_penalty(discriminator, images, 1.0)
    penalty.backward()
    return penalty.detach(), discriminator.from_rgb.weight.grad


def test_r1_step(compare):
    discriminator = Discriminator(DiscriminatorConfig(), SIZE)
    plain = PlainDiscriminator(discriminator)
    images = torch.rand(STEP_BATCH, 3, SIZE, SIZE)
    run_case(
        compare,
        f"R1 step of the discriminator {SIZE} B={STEP_BATCH}",
        lambda: r1_step(discriminator, images),
        {"torch eager": lambda: r1_step(plain, images)},
        memory=True,
    )


def path_length_step(network, mapping, synthesize, z, seed=0):
    """The penalty and the gradient in the constant."""
    network.zero_grad()
    styles = mapping(z)
    penalty = PathLength()(synthesize(styles), styles, torch.Generator().manual_seed(seed))
    penalty.backward()
    return penalty.detach(), network.constant.grad


def test_path_length_step(compare):
    generator = make_generator()
    z = torch.randn(STEP_BATCH, generator.config.latent_size)

    def synthesize(styles):
        return generator.synthesize(styles, noise="constant").image

    # The faster form by far, as both images and weights have second derivatives.
    plain = PlainGenerator(generator, scaled)
    run_case(
        compare,
        f"path-length step of the generator {SIZE} B={STEP_BATCH}",
        lambda: path_length_step(generator, generator.mapping, synthesize, z),
        {"scaled": lambda: path_length_step(plain, plain.map, plain.synthesize, z)},
        memory=True,
    )


@pytest.mark.parametrize("size", [16, 32])
def test_layer_memory(compare, size):
    """The large batch whose weights per sample the grouped form holds."""
    channels, batch = 512, 16
    x = torch.randn(batch, channels, size, size)
    weight, styles = torch.randn(channels, channels, 3, 3), torch.randn(batch, channels) + 1
    noise, bias = torch.randn(batch, 1, size, size), torch.randn(channels)

    def ours():
        return avatar_ops.modulated_conv2d(x, weight, styles, noise=noise, bias=bias, activation="lrelu")

    def peer(form):
        with torch.no_grad():
            return form(x, weight, styles, noise, bias, None)

    run_case(
        compare,
        f"modulated_conv2d {channels}@{size} B={batch}",
        ours,
        {"grouped": lambda: peer(grouped), "scaled": lambda: peer(scaled)},
        memory=True,
    )
