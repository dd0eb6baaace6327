import torch

from avatar.camera import ndc_to_pixels, project


def test_projection_agrees_with_the_preprocessing_formula():
    """The published preprocessing projects with -z and a negative focal length into [-1, 1]."""
    points = torch.randn(2, 50, 3, dtype=torch.float64) * 0.3
    translation = torch.tensor([[0.1, -0.2, -4.0], [0.0, 0.05, -5.0]], dtype=torch.float64)
    intrinsics = torch.tensor([-4.2, 4.0, 0.48, 0.53], dtype=torch.float64)
    pixels = project(points, intrinsics, translation, (512, 256))
    moved = points + translation[:, None]
    fx, fy, cx, cy = intrinsics
    camera = torch.stack([fx * moved[..., 0], fy * moved[..., 1], moved[..., 2]], -1)
    relative = camera[..., :2] / camera[..., 2:] + torch.stack([cx, cy])
    assert torch.allclose(pixels[..., 0] / 256, relative[..., 0])
    assert torch.allclose(pixels[..., 1] / 512, relative[..., 1])
    assert torch.allclose(pixels[..., 2], -moved[..., 2])


def test_projection_keeps_right_right_and_up_up():
    points = torch.tensor([[[0.0, 0.0, 0.0], [0.1, 0.0, 0.0], [0.0, 0.1, 0.0], [0.0, 0.0, 0.5]]])
    pixels = project(points, torch.tensor([-4.0, 4.0, 0.5, 0.5]), torch.tensor([[0.0, 0.0, -4.0]]), (64, 64))[
        0
    ]
    assert pixels[0].tolist() == [32, 32, 4]
    assert pixels[1, 0] > 32
    assert pixels[2, 1] < 32
    assert pixels[3, 2] < pixels[0, 2]


def test_projection_is_differentiable():
    points = torch.randn(1, 5, 3, dtype=torch.float64) * 0.3
    intrinsics = torch.tensor([-4.0, 4.0, 0.5, 0.5], dtype=torch.float64)
    translation = torch.tensor([[0.0, 0.0, -4.0]], dtype=torch.float64)
    inputs = (points.requires_grad_(), translation.requires_grad_())
    assert torch.autograd.gradcheck(lambda p, t: project(p, intrinsics, t, (32, 32)), inputs)


def test_radius_is_measured_on_the_shorter_side():
    assert ndc_to_pixels(0.5, (512, 256)) == 64
