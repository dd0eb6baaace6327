import pytest
import torch

from avatar.config import DiscriminatorConfig
from avatar.models.discriminator import Discriminator, group_deviation

TINY = DiscriminatorConfig(channel_base=64, channel_max=8)
PUBLISHED = {
    (256, 16384): (24_001_089, 15.6),
    (256, 32768): (28_864_129, 47.0),
    (512, 16384): (24_030_753, 19.7),
    (512, 32768): (28_982_849, 62.6),
}


@pytest.mark.parametrize(("size", "base"), PUBLISHED)
def test_published_sizes(size, base):
    with torch.device("meta"):
        discriminator = Discriminator(DiscriminatorConfig(channel_base=base), size)
    parameters, giga_macs = PUBLISHED[size, base]
    assert sum(parameter.numel() for parameter in discriminator.parameters()) == parameters
    assert round(discriminator.macs() / 1e9, 1) == giga_macs


@pytest.mark.parametrize("size", [4, 8, 16, 32])
@pytest.mark.parametrize("batch", [1, 3, 5, 6])
def test_shapes(size, batch):
    logits = Discriminator(TINY, size)(torch.rand(batch, 3, size, size))
    assert logits.shape == (batch, 1)
    assert logits.isfinite().all()


def test_gradient_reaches_every_parameter():
    discriminator = Discriminator(TINY, 16)
    images = torch.rand(3, 3, 16, 16, requires_grad=True)
    discriminator(images).square().sum().backward()
    for name, parameter in [("images", images), *discriminator.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.parametrize(("batch", "count"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 1), (6, 3), (8, 4)])
def test_deviation_is_that_of_the_largest_group_that_divides_the_batch(batch, count):
    x = torch.randn(batch, 3, 2, 2, dtype=torch.float64)
    result = group_deviation(x, 4)
    assert result.shape == (batch, 1, 2, 2)
    groups = batch // count
    for index in range(batch):
        members = x[index % groups :: groups]
        assert len(members) == count
        expected = (members.var(0, correction=0) + 1e-8).sqrt().mean()
        torch.testing.assert_close(result[index], expected.expand(1, 2, 2))


def test_skip_branch_keeps_a_constant():
    """Filters sum to 1; either branch is scaled by sqrt(1/2)."""
    block = Discriminator(TINY, 16).blocks[0]
    torch.nn.init.zeros_(block.second.weight)
    torch.nn.init.ones_(block.skip.weight)  # 4 inputs, so 1/2 each when used
    result = block(torch.ones(1, 4, 16, 16))
    assert result.shape == (1, 8, 8, 8)
    inside = result[..., 1:-1, 1:-1]
    torch.testing.assert_close(inside, torch.full_like(inside, 4 / 2 * 0.5**0.5))


def test_compile_and_export():
    discriminator = Discriminator(TINY, 8)
    images = torch.rand(4, 3, 8, 8)
    compiled = torch.compile(discriminator, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected = discriminator(images)
        torch.testing.assert_close(compiled(images), expected)
        exported = torch.export.export(discriminator, (images,)).module()
        torch.testing.assert_close(exported(images), expected)
    parameters = list(discriminator.parameters())

    def gradients(network):
        return torch.autograd.grad(network(images).square().sum(), parameters)

    torch.testing.assert_close(gradients(compiled), gradients(discriminator))


@pytest.mark.parametrize("size", [2, 12, 0])
def test_rejects_sizes(size):
    with pytest.raises(ValueError, match=f"size: got {size}, expected 4"):
        Discriminator(TINY, size)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 16, 16), (3, 16, 16)])
def test_rejects_images(shape):
    with pytest.raises(ValueError, match=r"images: got shape .* expected \(B, 3, 16, 16\)"):
        Discriminator(TINY, 16)(torch.rand(shape))
