import pytest
import torch
from torch import nn
from torch.nn import functional

from avatar import imagenet_weights, perceptual
from avatar.imagenet_weights import VGG16
from avatar.perceptual import VggLoss, vgg16_features


@pytest.fixture
def random_vgg(monkeypatch):
    """VGG16 with random weights in place of the published ones, and a copy to compare with."""
    torch.manual_seed(0)
    layers = VGG16.build()
    monkeypatch.setattr(imagenet_weights, "load_convolutions", lambda network, archive: layers.state_dict())
    return layers


def test_vgg_features_are_the_activations_at_the_taps(random_vgg):
    images = torch.rand(2, 3, 32, 40)
    found = vgg16_features()(images)
    assert [tuple(feature.shape) for feature in found] == [
        (2, 64, 32, 40),
        (2, 128, 16, 20),
        (2, 256, 8, 10),
        (2, 512, 4, 5),
    ]
    mean, std = torch.tensor(perceptual.IMAGENET_MEAN), torch.tensor(perceptual.IMAGENET_STD)
    normalised = ((images.movedim(1, -1) - mean) / std).movedim(-1, 1)
    for feature, end in zip(found, (4, 9, 16, 23), strict=True):
        torch.testing.assert_close(feature, random_vgg[:end](normalised))


def test_vgg_taps_keep_the_callers_order_and_cut_the_rest(random_vgg):
    images = torch.rand(1, 3, 16, 16)
    network = vgg16_features(("relu2_1", "relu1_1"))
    found = network(images)
    assert [feature.shape[1] for feature in found] == [128, 64]
    assert sum(isinstance(layer, nn.Conv2d) for layer in network.layers) == 3


@pytest.mark.usefixtures("random_vgg")
def test_vgg_loss_is_the_sum_of_l1_means():
    image, target = torch.rand(2, 3, 24, 24), torch.rand(2, 3, 24, 24)
    loss = VggLoss(size=None)
    pairs = zip(loss.network(image), loss.network(target), strict=True)
    torch.testing.assert_close(loss(image, target), sum((a - b).abs().mean() for a, b in pairs))
    assert loss(image, image).item() == 0


@pytest.mark.usefixtures("random_vgg")
def test_vgg_loss_resizes_bilinearly():
    image, target = torch.rand(1, 3, 20, 28), torch.rand(1, 3, 20, 28)
    resized = [functional.interpolate(x, size=(32, 32), mode="bilinear") for x in (image, target)]
    torch.testing.assert_close(VggLoss(size=32)(image, target), VggLoss(size=None)(*resized))
    assert VggLoss().features(image)[0].shape[-2:] == (224, 224)


@pytest.mark.usefixtures("random_vgg")
def test_vgg_loss_takes_cached_target_features_and_differentiates_only_the_image():
    image = torch.rand(1, 3, 16, 16, requires_grad=True)
    target = torch.rand(1, 3, 16, 16, requires_grad=True)
    loss = VggLoss(size=None)
    cached = loss.target_features(target)
    assert not any(feature.requires_grad for feature in cached)
    value = loss(image, cached)
    assert torch.equal(value, loss(image, target))
    loss(image, target).backward()
    assert image.grad.abs().sum() > 0
    assert target.grad is None
    assert not any(parameter.requires_grad for parameter in loss.parameters())


@pytest.mark.usefixtures("random_vgg")
def test_vgg_rejects():
    loss = VggLoss(size=None)
    image = torch.rand(1, 3, 16, 16)
    with pytest.raises(TypeError, match=r"images is torch.uint8"):
        loss(image.to(torch.uint8), image)
    with pytest.raises(ValueError, match=r"images has shape \(1, 1, 16, 16\)"):
        loss(image, image[:, :1])
    with pytest.raises(ValueError, match="target has features"):
        loss(image, loss.target_features(image)[:2])
    with pytest.raises(ValueError, match="target has features"):
        loss(image, image.expand(2, -1, -1, -1))
    with pytest.raises(ValueError, match=r"taps is \('relu9_1',\)"):
        vgg16_features(("relu9_1",))
    with pytest.raises(ValueError, match="taps is"):
        vgg16_features(())
    with pytest.raises(ValueError, match="size is 0"):
        VggLoss(size=0)
