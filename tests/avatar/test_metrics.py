import math

import numpy as np
import pytest
import torch

from avatar.imagenet_weights import WeightsUnavailable
from avatar.metrics import Lpips, image_metrics, l1, no_cloth_mask, psnr, ssim


def images(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(scope="module")
def lpips():
    try:
        return Lpips("alex")
    except WeightsUnavailable as error:
        pytest.skip(f"needs AlexNet's ImageNet weights: {error}")


def half_mask(batch, height, width, dtype=torch.float64):
    mask = torch.zeros(batch, 1, height, width, dtype=dtype)
    mask[..., : width // 2] = 1
    return mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_uniform_error_of_a_tenth_is_20_decibel(dtype):
    target = images(2, 3, 16, 20, dtype=dtype) * 0.9
    value = psnr(target + 0.1, target)
    assert value.dtype == dtype
    torch.testing.assert_close(value, torch.full((2,), 20.0, dtype=dtype), rtol=1e-5, atol=0)
    torch.testing.assert_close(l1(target + 0.1, target), torch.full((2,), 0.1, dtype=dtype))


def test_values_are_per_image_not_of_the_batch():
    a, b = images(3, 3, 24, 18), images(3, 3, 24, 18, seed=1)
    for metric in (l1, psnr, ssim):
        alone = torch.cat([metric(a[i : i + 1], b[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(metric(a, b), alone)
        assert metric(a, b).unique().numel() == 3


def test_equal_images():
    a = images(2, 3, 16, 16)
    assert l1(a, a).tolist() == [0, 0]
    assert psnr(a, a).tolist() == [math.inf, math.inf]
    torch.testing.assert_close(ssim(a, a), torch.ones(2, dtype=torch.float64))


def ssim_by_definition(a, b):
    """Window by window, with weighted moments about the mean, for one image (3, H, W)."""
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    windows_a = np.lib.stride_tricks.sliding_window_view(a, (11, 11), axis=(1, 2))
    windows_b = np.lib.stride_tricks.sliding_window_view(b, (11, 11), axis=(1, 2))
    mean_a = (windows_a * weights).sum((-1, -2), keepdims=True)
    mean_b = (windows_b * weights).sum((-1, -2), keepdims=True)
    variance_a = (weights * (windows_a - mean_a) ** 2).sum((-1, -2))
    variance_b = (weights * (windows_b - mean_b) ** 2).sum((-1, -2))
    covariance = (weights * (windows_a - mean_a) * (windows_b - mean_b)).sum((-1, -2))
    mean_a, mean_b = mean_a[..., 0, 0], mean_b[..., 0, 0]
    numerator = (2 * mean_a * mean_b + 0.01**2) * (2 * covariance + 0.03**2)
    denominator = (mean_a**2 + mean_b**2 + 0.01**2) * (variance_a + variance_b + 0.03**2)
    return (numerator / denominator).mean()


@pytest.mark.parametrize("size", [(11, 11), (11, 30), (33, 24)], ids=["smallest", "one-row", "general"])
def test_ssim_matches_its_definition(size):
    a = images(2, 3, *size)
    b = (a + 0.2 * images(2, 3, *size, seed=1)).clamp(0, 1)
    wanted = [ssim_by_definition(a[i].numpy(), b[i].numpy()) for i in range(2)]
    torch.testing.assert_close(ssim(a, b), torch.tensor(wanted, dtype=torch.float64), rtol=1e-10, atol=1e-12)
    single = ssim(a.float(), b.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), ssim(a, b), rtol=1e-4, atol=1e-5)


def test_ssim_of_flat_images_is_the_luminance_term():
    a, b = torch.full((1, 3, 12, 12), 0.25), torch.full((1, 3, 12, 12), 0.75)
    wanted = (2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4)
    torch.testing.assert_close(ssim(a, b), torch.tensor([wanted]), rtol=1e-3, atol=0)


def test_no_cloth_under_both_denominators():
    target = images(2, 3, 16, 20) * 0.9
    prediction = target + 0.1
    mask = half_mask(2, 16, 20)
    torch.testing.assert_close(l1(prediction, target, mask).tolist(), [0.05, 0.05])
    torch.testing.assert_close(l1(prediction, target, mask, denominator="mask").tolist(), [0.1, 0.1])
    higher = 20 + 10 * math.log10(2)
    torch.testing.assert_close(psnr(prediction, target, mask).tolist(), [higher, higher])
    torch.testing.assert_close(psnr(prediction, target, mask, denominator="mask").tolist(), [20.0, 20.0])


def test_a_soft_mask_weighs_the_errors():
    prediction, target, mask = (
        images(1, 3, 12, 14),
        images(1, 3, 12, 14, seed=1),
        images(1, 1, 12, 14, seed=2),
    )
    errors = (prediction - target).abs() * mask
    torch.testing.assert_close(l1(prediction, target, mask), errors.mean().view(1))
    by_mask = l1(prediction, target, mask, denominator="mask")
    torch.testing.assert_close(by_mask, (errors.sum() / (3 * mask.sum())).view(1))
    squares = (prediction - target).square() * mask
    torch.testing.assert_close(
        psnr(prediction, target, mask), 20 * torch.log10(1 / squares.mean().sqrt()).view(1)
    )


def test_a_full_mask_changes_nothing():
    a, b = images(2, 3, 16, 16), images(2, 3, 16, 16, seed=1)
    full = torch.ones(2, 1, 16, 16, dtype=torch.bool)
    for metric in (l1, psnr, ssim):
        torch.testing.assert_close(metric(a, b, full), metric(a, b))
    torch.testing.assert_close(l1(a, b, full, denominator="mask"), l1(a, b))


def test_ssim_zeroes_outside_the_mask_and_keeps_soft_pixels():
    a, b = images(1, 3, 20, 20), images(1, 3, 20, 20, seed=1)
    mask = half_mask(1, 20, 20) * 0.3
    torch.testing.assert_close(ssim(a, b, mask), ssim(a * (mask > 0), b * (mask > 0)))
    elsewhere = b.clone()
    elsewhere[..., 10:] = 0.5
    torch.testing.assert_close(ssim(a, elsewhere, mask), ssim(a, b, mask))


def test_no_cloth_mask_drops_necklace_and_cloth():
    labels = torch.arange(19).view(1, 1, 1, 19)
    matte = torch.full((1, 1, 1, 19), 0.7)
    mask = no_cloth_mask(matte, labels)
    assert (mask == 0).nonzero()[:, 3].tolist() == [15, 16]
    assert (mask[mask > 0] == 0.7).all()
    torch.testing.assert_close(no_cloth_mask(matte, labels.to(torch.uint8)), mask)
    assert (matte == 0.7).all()


def test_differentiable():
    a, b = images(1, 3, 12, 12).requires_grad_(), images(1, 3, 12, 12, seed=1)
    for metric in (l1, psnr, ssim):
        assert torch.autograd.gradcheck(lambda x, metric=metric: metric(x, b), a, fast_mode=True)


def test_image_metrics_gives_all_four_without_gradient():
    a, b, mask = images(2, 3, 12, 12).requires_grad_(), images(2, 3, 12, 12, seed=1), half_mask(2, 12, 12)
    values = image_metrics(a, b, l1, mask, denominator="mask")
    assert list(values) == ["l1", "lpips", "ssim", "psnr"]
    assert all(value.shape == (2,) and not value.requires_grad for value in values.values())
    torch.testing.assert_close(values["psnr"], psnr(a, b, mask, denominator="mask").detach())


GOOD = torch.zeros(2, 3, 16, 16)
MASK = torch.ones(2, 1, 16, 16)


@pytest.mark.parametrize("metric", [l1, psnr, ssim], ids=["l1", "psnr", "ssim"])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((GOOD.to(torch.uint8), GOOD), TypeError, "prediction is torch.uint8"),
        ((GOOD, GOOD.half()), TypeError, "target is torch.float16"),
        ((GOOD, GOOD.double()), TypeError, "target is torch.float64, wants torch.float32"),
        ((GOOD[0], GOOD[0]), ValueError, r"prediction has shape \(3, 16, 16\)"),
        ((GOOD, GOOD[:, :1]), ValueError, r"target has shape \(2, 1, 16, 16\)"),
        ((GOOD, GOOD[:1]), ValueError, r"target has shape \(1, 3, 16, 16\), wants \(2, 3, 16, 16\)"),
        ((GOOD[..., :0], GOOD[..., :0]), ValueError, "at least one pixel"),
        ((GOOD, GOOD.to("meta")), ValueError, "target is on meta"),
        ((GOOD, GOOD, MASK.long()), TypeError, "mask is torch.int64"),
        ((GOOD, GOOD, MASK[:, 0]), ValueError, r"mask has shape \(2, 16, 16\), wants \(2, 1, 16, 16\)"),
        ((GOOD, GOOD, MASK.to("meta")), ValueError, "mask is on meta"),
    ],
)
def test_rejects(metric, arguments, error, message):
    with pytest.raises(error, match=message):
        metric(*arguments)


def test_rejects_options():
    with pytest.raises(ValueError, match="denominator is 'area'"):
        l1(GOOD, GOOD, denominator="area")
    empty = MASK.clone()
    empty[1] = 0
    with pytest.raises(ValueError, match="mask is 0 all over in image 1"):
        l1(GOOD, GOOD, empty, denominator="mask")
    with pytest.raises(ValueError, match="at least 11"):
        ssim(GOOD[..., :10], GOOD[..., :10])
    with pytest.raises(ValueError, match="net is 'squeeze'"):
        Lpips("squeeze")


def test_no_cloth_mask_rejects():
    labels = torch.zeros(2, 1, 16, 16, dtype=torch.long)
    with pytest.raises(TypeError, match=r"matte is torch\.uint8"):
        no_cloth_mask(MASK.to(torch.uint8), labels)
    with pytest.raises(TypeError, match=r"labels is torch.float32"):
        no_cloth_mask(MASK, labels.float())
    with pytest.raises(ValueError, match=r"matte has shape \(2, 3, 16, 16\)"):
        no_cloth_mask(GOOD, labels)
    with pytest.raises(ValueError, match=r"labels has shape \(1, 1, 16, 16\)"):
        no_cloth_mask(MASK, labels[:1])


def test_lpips_is_zero_symmetric_and_grows_with_distortion(lpips):
    smooth = torch.nn.functional.interpolate(images(2, 3, 8, 8), size=(64, 64), mode="bicubic").clamp(0, 1)
    noise = images(2, 3, 64, 64, seed=1) - 0.5
    assert lpips(smooth, smooth).tolist() == [0, 0]
    levels = torch.stack([lpips(smooth, (smooth + level * noise).clamp(0, 1)) for level in (0.1, 0.3, 0.9)])
    assert (levels.diff(dim=0) > 0).all()
    assert levels.dtype == torch.float64
    noisy = (smooth + noise).clamp(0, 1)
    torch.testing.assert_close(lpips(smooth, noisy), lpips(noisy, smooth))
    alone = torch.cat([lpips(smooth[i : i + 1], noisy[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(lpips(smooth, noisy), alone, rtol=1e-5, atol=1e-7)


def test_lpips_sees_masked_images_as_black(lpips):
    a, b, mask = images(1, 3, 64, 64), images(1, 3, 64, 64, seed=1), images(1, 1, 64, 64, seed=2)
    torch.testing.assert_close(lpips(a, b, mask), lpips(a * mask, b * mask))


def test_lpips_is_frozen_but_passes_gradients_to_the_image(lpips):
    a = images(1, 3, 64, 64, dtype=torch.float32).requires_grad_()
    lpips(a, images(1, 3, 64, 64, seed=1, dtype=torch.float32)).sum().backward()
    assert a.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in lpips.parameters())
    assert not lpips.training


def test_lpips_rejects(lpips):
    with pytest.raises(ValueError, match="at least 31"):
        lpips(images(1, 3, 30, 64), images(1, 3, 30, 64))
    assert lpips(images(1, 3, 31, 31), images(1, 3, 31, 31, seed=1)).shape == (1,)
    with pytest.raises(TypeError, match=r"prediction is torch\.uint8"):
        lpips(GOOD.to(torch.uint8), GOOD)


def test_lpips_reproduces_a_reported_value():
    """0.3494 is reported for torchmetrics' wrapper of lpips with torchvision's VGG16 on these arrays."""
    try:
        lpips = Lpips("vgg")
    except WeightsUnavailable as error:
        pytest.skip(f"needs VGG16's ImageNet weights: {error}")
    random = np.random.RandomState(123)
    a, b = (torch.from_numpy(random.rand(10, 3, 100, 100)).float() for _ in range(2))
    assert lpips(a, b).mean().item() == pytest.approx(0.3494, abs=5e-5)
