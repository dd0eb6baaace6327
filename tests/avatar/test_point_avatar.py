import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_head import flame_like

import avatar_ops
from avatar import losses
from avatar.camera import Camera
from avatar.config import PointAvatarConfig
from avatar.head import HeadModel
from avatar.models.mlp import SdfNetwork, parameter_count
from avatar.models.point_avatar import PointAvatar, inverse_3x3
from avatar.presets import SMALL_POINT_AVATAR
from avatar.splatting import splat

CAMERA = {
    "translation": torch.tensor([[0.0, 0.06, -6.4]]),
    "intrinsics": torch.tensor([[-4.2, 4.2, 0.5, 0.5]]),
}


def make_avatar(head, config=SMALL_POINT_AVATAR, **changes):
    config = PointAvatarConfig(**(vars(config) | {"points": 200} | changes))
    mean = torch.full((50,), 0.1)
    return PointAvatar(
        config, copy.deepcopy(head), mean, torch.full((50,), 0.04), torch.Generator().manual_seed(0)
    )


def learned_avatar(head, **changes):
    """The learned deformer at small sizes, with random instead of zero fields."""
    avatar = make_avatar(head, deformer="learned", normals="jacobian", start="sphere", **changes)
    for layer in (avatar.deformer.network.blend, avatar.deformer.network.skinning):
        torch.nn.init.normal_(layer.weight, 0, 0.01)
    return avatar


def render(avatar, expression=None, pose=None, size=32):
    expression = torch.rand(1, 50) if expression is None else expression
    pose = torch.randn(1, 15) * 0.1 if pose is None else pose
    frames = len(expression)
    camera = {name: value.expand(frames, -1) for name, value in CAMERA.items()}
    points, splats = avatar(
        expression, pose, Camera(camera["intrinsics"], camera["translation"], (size, size))
    )
    return SimpleNamespace(**vars(points), **vars(splats))


@pytest.fixture(scope="module")
def flame():
    return HeadModel(flame_like(np.random.default_rng(0)))


def test_paper_sizes(flame):
    avatar = PointAvatar(PointAvatarConfig(), flame, torch.zeros(50), torch.ones(50))
    parts = [parameter_count(part) for part in (avatar.sdf, avatar.deformer, avatar.texture)]
    assert parts == [527_581, 101_003, 4_611]
    assert sum(parts) == 633_195
    modules = torch.nn.ModuleList([avatar.sdf, avatar.deformer, avatar.texture])
    assert parameter_count(modules, gains=True) == 636_235
    assert avatar.num_points == 400
    assert torch.allclose(avatar.points.norm(dim=1), torch.tensor(0.5))


def test_paper_radius():
    assert PointAvatarConfig().start_radius() == pytest.approx(0.16875)
    assert PointAvatarConfig(points=100).start_radius() == pytest.approx(0.3)


def test_sdf_starts_as_a_sphere():
    network = SdfNetwork()
    directions = torch.nn.functional.normalize(torch.randn(100, 3), dim=1)
    inside, outside = network(0.2 * directions)[:, 0], network(1.2 * directions)[:, 0]
    assert inside.max() < 0
    assert outside.min() > 0
    assert network(0.6 * directions)[:, 0].mean().abs() < 0.15


@pytest.mark.parametrize("points", [0, 5, 20])
def test_sdf_in_chunks_equals_the_whole(head, monkeypatch, points):
    avatar = make_avatar(head)
    cloud = torch.rand(points, 3) - 0.5
    whole = avatar.sdf_and_gradient(cloud)
    assert whole[0].requires_grad
    monkeypatch.setattr("avatar.models.point_avatar.CHUNK", 7)
    with torch.no_grad():
        chunked = avatar.sdf_and_gradient(cloud)
    for part, expected in zip(chunked, whole, strict=True):
        assert not part.requires_grad
        torch.testing.assert_close(part, expected.detach(), rtol=1e-5, atol=1e-6)


def test_an_avatar_is_made_where_its_head_is(head):
    on_device = copy.deepcopy(head).to("meta")
    expression = torch.zeros(50, device="meta")
    avatar = PointAvatar(PointAvatarConfig(points=10), on_device, expression, expression)
    assert avatar.canonical_vertices.device == expression.device


def test_warp_is_the_identity_at_the_canonical_parameters(flame):
    """Equal weights and zero fields at first: the canonical frame leaves every point where it is."""
    avatar = PointAvatar(PointAvatarConfig(), flame, torch.rand(50), torch.ones(50))
    fields = avatar.deformer(avatar.points)
    assert torch.allclose(fields.weights, torch.full_like(fields.weights, 1 / 6))
    posed, turn = avatar.warp(
        avatar.points, fields, avatar.canonical_expression[None], avatar.canonical_pose[None]
    )
    assert torch.allclose(posed[0], avatar.points, atol=1e-6)
    assert torch.allclose(turn[0], torch.eye(3).expand_as(turn[0]), atol=1e-5)


def test_head_deformer_moves_vertices_as_the_head_does(head):
    avatar = make_avatar(head)
    avatar.set_points(avatar.canonical_vertices[::50].clone())
    expression, pose = torch.rand(2, 50), torch.randn(2, 15) * 0.1
    posed, _ = avatar.warp(avatar.points, avatar.deformer(avatar.points), expression, pose)
    assert torch.allclose(posed, head(expression, pose)[:, ::50], atol=2e-3 * head.scale)
    assert (posed - head(expression, pose)[:, ::50]).abs().mean() < 2e-4 * head.scale


def test_jacobian_agrees_with_finite_differences(head):
    avatar = learned_avatar(head, points=12).double()
    expression, pose = torch.rand(2, 50).double(), torch.randn(2, 15).double() * 0.1
    points = avatar.points.detach()
    jacobian = avatar.warp_jacobian(points, expression, pose)

    def posed(x):
        return avatar.warp(x, avatar.deformer(x), expression, pose)[0]

    for axis in range(3):
        step = torch.zeros(3, dtype=torch.float64)
        step[axis] = 1e-6
        difference = (posed(points + step) - posed(points - step)) / 2e-6
        assert torch.allclose(jacobian[..., axis], difference, atol=1e-6)


@pytest.mark.parametrize("deformer", ["learned", "head"])
def test_jacobian_normals_equal_turned_normals_under_a_rigid_motion(head, deformer):
    """With every point on the neck bone both kinds of normals are the canonical ones, rotated."""
    avatar = make_avatar(head, deformer=deformer, normals="jacobian", start="sphere", points=50)
    weights = torch.zeros(50, 6)
    weights[:, 2] = 1

    class Rigid(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def locate(self, points):
            return self.inner.locate(points)

        def forward(self, points, place=None):
            fields = self.inner(points, place)
            fields.weights = weights
            fields.expression = torch.zeros_like(fields.expression)
            return fields

    avatar.deformer = Rigid(avatar.deformer)
    pose = torch.zeros(1, 15)
    pose[0, 4] = 0.7
    exact = render(avatar, pose=pose).normals
    avatar.config = PointAvatarConfig(**(vars(avatar.config) | {"normals": "skinning"}))
    assert torch.allclose(exact, render(avatar, pose=pose).normals, atol=1e-4)


def test_inverse_3x3():
    matrices = torch.randn(4, 7, 3, 3, dtype=torch.float64)
    assert torch.allclose(inverse_3x3(matrices), torch.linalg.inv(matrices), atol=1e-8)


def test_splat_is_opaque_at_the_centre_and_nothing_at_the_radius():
    radius = 2.0
    for distance, alpha in ((0.0, 1.0), (1.0, 0.75), (1.999999, 0.0)):
        pixels = torch.tensor([[[8.5 + distance, 4.5, 1.0]]])
        _, alphas = splat(pixels, (16, 16), radius, 4)
        assert alphas[0, 4, 8, 0].item() == pytest.approx(alpha, abs=1e-5)
        assert not alphas[0, 4, 8, 1:].any()
    fragments, _ = splat(torch.tensor([[[10.5, 4.5, 1.0]]]), (16, 16), radius, 4)
    assert fragments.indices[0, 4, 8, 0] == -1


def test_opaque_point_hides_what_is_behind(head):
    pixels = torch.tensor([[[4.5, 4.5, 2.0], [4.5, 4.5, 1.0]]])
    fragments, alphas = splat(pixels, (8, 8), 1.5, 4)
    colors = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    image, opacity = avatar_ops.composite_points(fragments, colors, alphas)
    assert image[0, :, 4, 4].tolist() == [0, 1, 0]
    assert opacity[0, 0, 4, 4] == 1
    assert opacity[0, 0, 0, 0] == 0


def test_points_learn_through_the_splat_only(head):
    """Neither the SDF nor the colour pulls at a point's place."""
    avatar = make_avatar(head)
    rendering = render(avatar)
    (rendering.sdf.sum() + rendering.sdf_gradient.sum() + rendering.colors.sum()).backward()
    assert avatar.points.grad is None or not avatar.points.grad.any()
    render(avatar).image.sum().backward()
    assert avatar.points.grad.any()


def test_every_network_learns_from_the_image(head):
    for avatar in (make_avatar(head), learned_avatar(head)):
        rendering = render(avatar)
        loss = losses.rgb(rendering.image, torch.rand_like(rendering.image))
        (loss + losses.eikonal(rendering.sdf_gradient)).backward()
        for part in (avatar.sdf, avatar.deformer, avatar.texture):
            assert any(parameter.grad is not None and parameter.grad.any() for parameter in part.parameters())
        assert all(p.grad is None or p.grad.isfinite().all() for p in avatar.parameters())


def test_frames_of_a_batch_are_independent(head):
    avatar = make_avatar(head)
    expression, pose = torch.rand(2, 50), torch.randn(2, 15) * 0.1
    together = render(avatar, expression, pose).image
    for row in range(2):
        alone = render(avatar, expression[row : row + 1], pose[row : row + 1]).image
        assert torch.allclose(together[row], alone[0], atol=1e-4)


def test_background_is_white(head):
    rendering = render(make_avatar(head))
    assert torch.equal(rendering.image[0, :, 0, 0], torch.ones(3))
    assert rendering.mask[0, 0, 0, 0] == 0
    assert rendering.mask.max() <= 1 + 1e-6


def test_visible_points_are_those_in_front(head):
    avatar = make_avatar(head, points=2, radius=0.2)
    avatar.set_points(torch.tensor([[0.0, -0.06, 0.5], [0.0, -0.06, 0.2]]))
    avatar.note_visible(render(avatar, avatar.canonical_expression[None], avatar.canonical_pose[None]))
    assert avatar.visible.tolist() == [True, False]


def test_surface_sampling_is_denser_where_expressions_move(head):
    def moving_share(dense):
        avatar = make_avatar(head, points=4000, dense_share=dense)
        nearest = torch.cdist(avatar.points, avatar.canonical_vertices).argmin(1)
        return (head.expression_basis.norm(dim=1).amax(-1)[nearest] > 0.004 * head.scale).float().mean()

    assert moving_share(5.0) > 1.5 * moving_share(1.0)


def test_flame_loss_is_zero_for_the_heads_own_fields(head):
    avatar = make_avatar(head)
    nearest = torch.arange(0, len(head.template), 40)
    avatar.set_points(avatar.canonical_vertices[nearest].clone())
    fields = avatar.deformer(avatar.points)
    fields.offset = torch.zeros_like(fields.offset)
    fields.expression = head.expression_basis[nearest]
    fields.weights = head.weights_with_ghost()[nearest]
    coincident = losses.flame(avatar, fields)
    assert coincident < 1e-4
    fields.expression = fields.expression + 0.01
    expected = 1000 * 0.01**2 / (50 * 0.04)
    assert (losses.flame(avatar, fields) - coincident).item() == pytest.approx(expected, rel=0.05)


def test_pointwise_losses():
    assert losses.rgb(torch.full((1, 3, 4, 4), 0.6), torch.full((1, 3, 4, 4), 0.5)).item() == pytest.approx(
        0.1
    )
    assert losses.surface(torch.tensor([0.1, -0.1])).item() == pytest.approx(0.01)
    assert losses.eikonal(torch.tensor([[0.0, 2.0, 0.0]])).item() == pytest.approx(1.0)
    assert losses.eikonal(torch.full((5, 3), 1 / math.sqrt(3))).item() == pytest.approx(0.0, abs=1e-6)
