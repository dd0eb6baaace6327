import dataclasses

import pytest
import torch

import avatar_ops
from avatar import distillation
from avatar.config import DistillConfig
from avatar.distillation import density_kl, feature_cosine, field_consistency, graph_kl, matched_points
from avatar.models.point_avatar import Fields, sample_surface

ALL = {"anchors": 512, "points": 1_000_000}


def generator(seed):
    return torch.Generator().manual_seed(seed)


def paint(points):
    """Colours that vary smoothly over space."""
    turn = torch.tensor([[2.0, 1.0, 0.0], [0.0, 2.0, 3.0], [1.0, -2.0, 2.0]]).to(points)
    return 0.5 + 0.3 * torch.sin(points @ turn + torch.arange(3).to(points))


@pytest.fixture(scope="module")
def clouds(head):
    """Two draws (1, 6000, 3) from the head's surface."""
    vertices = head.template
    return [sample_surface(head, vertices, 6000, 1.0, generator(seed))[None] for seed in (0, 1)]


def kl(teacher, student, teacher_colors=None, student_colors=None, seed=2, **options):
    teacher_colors = paint(teacher) if teacher_colors is None else teacher_colors
    student_colors = paint(student) if student_colors is None else student_colors
    options = {"matched": False} | ALL | options
    return density_kl(teacher, teacher_colors, student, student_colors, generator=generator(seed), **options)


def test_density_kl_is_zero_for_a_permuted_cloud(clouds):
    cloud = clouds[0]
    assert kl(cloud, cloud[:, torch.randperm(6000, generator=generator(3))]).abs() < 1e-6


def test_density_kl_ranks_what_happened_to_a_cloud(clouds):
    cloud, other = clouds
    colors = paint(cloud)
    half = kl(cloud, cloud[:, ::2])
    fresh = kl(cloud, other)
    nudged, moved = (kl(cloud, cloud + torch.tensor([s, 0.0, 0.0]), colors, colors) for s in (0.05, 0.1))
    shrunk = kl(cloud, 0.9 * cloud, colors, colors)
    darkened = kl(cloud, cloud, colors, 0.8 * colors)
    assert 1e-3 < half < fresh < 0.06
    assert 5e-3 < nudged < 0.5 * moved
    assert shrunk > 0.02
    assert darkened > shrunk


def test_density_kl_is_the_divergence_of_kernel_densities():
    teacher, student = torch.rand(2, 2, 30, 3, generator=generator(0), dtype=torch.float64)
    colors = torch.rand(2, 30, 3, generator=generator(1), dtype=torch.float64)
    scales = torch.tensor([0.3] * 3 + [0.2] * 3)
    expected = []
    for b in range(2):
        densities = []
        for points in (teacher[b], student[b]):
            x = torch.cat([points, colors[b]], 1) / scales
            anchors = torch.cat([teacher[b], colors[b]], 1) / scales
            density = torch.exp(-0.5 * ((x[None] - anchors[:, None]) ** 2).sum(-1)).mean(1)
            density = density + 1e-6 * density.max()
            densities.append(density / density.sum())
        p, q = densities
        expected.append((p * (p / q).log()).sum())
    found = kl(teacher, student, colors, colors, width=0.3, color_width=0.2)
    torch.testing.assert_close(found, torch.stack(expected).mean())


@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_density_kl_in_float32_agrees_with_float64(clouds, offset):
    cloud = clouds[0] + offset
    student = 0.95 * (cloud - offset) + offset
    colors = paint(clouds[0])
    found, exact = [], []
    for store, dtype in ((found, torch.float32), (exact, torch.float64)):
        leaf = student.to(dtype, copy=True).requires_grad_()
        value = kl(cloud.to(dtype), leaf, colors.to(dtype), colors.to(dtype))
        value.backward()
        store += [value.detach().double(), leaf.grad.double()]
    torch.testing.assert_close(found[0], exact[0], rtol=1e-4, atol=0)
    assert (found[1] - exact[1]).norm() < 1e-3 * exact[1].norm()


def test_density_kl_gradcheck():
    teacher, student = torch.rand(2, 2, 12, 3, generator=generator(0), dtype=torch.float64)
    colors = torch.rand(2, 12, 3, generator=generator(1), dtype=torch.float64)

    def loss(points, student_colors):
        return kl(teacher, points, colors, student_colors, width=0.5, color_width=0.5)

    assert torch.autograd.gradcheck(loss, (student.requires_grad_(), colors.clone().requires_grad_()))


def test_density_kl_of_a_part_of_a_matched_cloud_has_no_sampling_noise(clouds):
    cloud = clouds[0]
    part = {"points": 1000, "anchors": 200}
    assert kl(cloud, cloud, matched=True, **part).abs() < 1e-6
    assert kl(cloud, cloud, matched=False, **part) > 0.01


def test_density_kl_draws_from_the_generator_alone(clouds):
    cloud, other = clouds
    part = {"points": 500, "anchors": 100}
    first = kl(cloud, other, seed=4, **part)
    torch.rand(3)
    assert torch.equal(first, kl(cloud, other, seed=4, **part))
    assert not torch.equal(first, kl(cloud, other, seed=5, **part))


def test_density_kl_takes_clouds_of_unequal_sizes(clouds):
    cloud, other = (torch.cat([cloud, 1.1 * cloud]) for cloud in clouds)
    value = kl(cloud, other[:, :900], points=2000, anchors=100)
    assert value.shape == ()
    assert value > 0
    with pytest.raises(ValueError, match="student_points has 900 points"):
        kl(cloud, other[:, :900], matched=True)


def test_density_kl_of_a_cloud_out_of_reach_is_finite(clouds):
    student = (clouds[0] + 100).requires_grad_()
    value = kl(clouds[0], student)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


def test_density_kl_draws_a_shifted_cloud_back(clouds):
    student = (clouds[0] + torch.tensor([0.05, 0.0, 0.0])).requires_grad_()
    kl(clouds[0], student, paint(clouds[0]), paint(clouds[0])).backward()
    assert student.grad[..., 0].sum() > 0


def graph(cloud, k=6):
    return avatar_ops.knn(cloud[0], k, exclude_self=True).indices


def test_graph_kl_is_zero_for_the_same_shape_and_grows_with_noise(clouds):
    cloud = clouds[0][:, :500]
    neighbors = graph(cloud)
    noise = torch.randn(cloud.shape, generator=generator(0))
    assert graph_kl(cloud, cloud, neighbors).abs() < 1e-6
    assert graph_kl(cloud, cloud + 0.3, neighbors).abs() < 1e-6
    little, much = (graph_kl(cloud, cloud + s * noise, neighbors) for s in (0.01, 0.03))
    assert 1e-4 < little < 0.5 * much
    enlarged = graph_kl(4 * cloud, 4 * (cloud + 0.01 * noise), neighbors)
    torch.testing.assert_close(enlarged, little, rtol=1e-4, atol=0)


def test_graph_kl_is_the_divergence_of_softmaxes():
    teacher, student = torch.rand(2, 2, 9, 3, generator=generator(0), dtype=torch.float64)
    neighbors = torch.tensor([[(i + step) % 9 for step in (1, 2, 4)] for i in range(9)])
    neighbors[3, 1:] = -1
    neighbors[5] = -1
    expected = 0
    for b in range(2):
        for i, row in enumerate(neighbors):
            row = row[row >= 0]
            logits = [-((x[b, i] - x[b, row]) ** 2).sum(-1) / 0.1 for x in (teacher, student)]
            p, q = (torch.softmax(value, 0) for value in logits)
            expected += (p * (p / q).log()).sum() / 18
    torch.testing.assert_close(graph_kl(teacher, student, neighbors, temperature=0.1), expected)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: graph_kl(teacher, x, neighbors), student)


def test_graph_kl_sees_colours_if_told_to(clouds):
    cloud = clouds[0][:, :300]
    neighbors = graph(cloud)
    colors = paint(cloud)
    changed = torch.rand(colors.shape, generator=generator(0)).requires_grad_()
    value = graph_kl(cloud, cloud, neighbors, teacher_colors=colors, student_colors=changed)
    value.backward()
    assert value > 0.01
    assert changed.grad.any()
    assert graph_kl(cloud, cloud, neighbors, teacher_colors=colors, student_colors=colors).abs() < 1e-6
    with pytest.raises(ValueError, match="both or neither"):
        graph_kl(cloud, cloud, neighbors, teacher_colors=colors)


def test_graph_kl_of_coincident_points_is_finite():
    student = torch.rand(1, 5, 3, generator=generator(0)).requires_grad_()
    value = graph_kl(torch.zeros(1, 5, 3), student, torch.tensor([[1, 2], [0, -1], [3, 4], [2, 4], [-1, -1]]))
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


def test_feature_cosine():
    teacher = torch.randn(2, 40, 16, generator=generator(0))
    assert feature_cosine(teacher, teacher).abs() < 1e-6
    assert feature_cosine(3 * teacher, teacher).abs() < 1e-6
    assert (feature_cosine(-teacher, teacher) - 2).abs() < 1e-6
    across = torch.stack([teacher[..., 1], -teacher[..., 0]], -1)
    assert (feature_cosine(across, teacher[..., :2]) - 1).abs() < 1e-6


def test_feature_cosine_of_vanishing_features_has_a_bounded_gradient():
    student = torch.zeros(1, 2, 4)
    student[0, 1] = 1e-20
    student.requires_grad_()
    teacher = torch.ones(1, 2, 4)
    value = feature_cosine(student, teacher)
    value.backward()
    assert (value - 1).abs() < 1e-6
    assert student.grad.abs().max() <= 1e3
    assert feature_cosine(student, torch.zeros(1, 2, 4)).isfinite()


def random_fields(seed, pose_features=36):
    draws = [
        torch.randn(7, *shape, generator=generator(seed)) for shape in ((3,), (3, 50), (3, pose_features))
    ]
    weights = torch.softmax(torch.randn(7, 6, generator=generator(seed)), -1)
    return Fields(*(0.01 * draw for draw in draws), weights)


@pytest.mark.parametrize("pose_features", [36, 0])
def test_field_consistency_sums_over_a_points_components(pose_features):
    student, teacher = (random_fields(seed, pose_features) for seed in (0, 1))
    gaps = [getattr(student, name) - getattr(teacher, name) for name in ("expression", "pose", "weights")]
    norms = [(gap.double() ** 2).sum(tuple(range(1, gap.ndim))) for gap in gaps]
    weights = (1000, 1000, 0.1)
    squared = sum(weight * norm.mean() for weight, norm in zip(weights, norms, strict=True))
    literal = sum(weight * norm.sqrt().mean() for weight, norm in zip(weights, norms, strict=True))
    torch.testing.assert_close(field_consistency(student, teacher).double(), squared)
    torch.testing.assert_close(field_consistency(student, teacher, squared=False).double(), literal)
    only = field_consistency(student, teacher, expression=0, pose=0, skinning=1).double()
    torch.testing.assert_close(only, norms[2].mean())


@pytest.mark.parametrize("squared", [True, False])
def test_field_consistency_of_equal_fields_is_zero_with_a_finite_gradient(squared):
    student = random_fields(0)
    for name in ("expression", "pose", "weights"):
        getattr(student, name).requires_grad_()
    value = field_consistency(student, random_fields(0), squared=squared)
    value.backward()
    assert value == 0
    assert student.expression.grad.isfinite().all()


def test_mask_consistency_is_the_mean_absolute_difference():
    opacity = torch.rand(2, 1, 4, 4, generator=generator(0))
    value = distillation.mask_consistency(opacity, opacity - 0.25)
    torch.testing.assert_close(value, torch.tensor(0.25))


def test_matched_points_counts_positions_in_widths():
    points, colors = torch.rand(2, 2, 5, 3, generator=generator(0))
    assert matched_points(points, colors, points, colors) == 0
    value = matched_points(points, colors, points + 0.1, colors - 0.25, width=0.2, color_width=1.0)
    torch.testing.assert_close(value, torch.tensor(0.75))


def both(shape, seed=0):
    return (x.requires_grad_() for x in torch.rand(2, *shape, generator=generator(seed)).unbind())


def test_no_gradient_reaches_the_teacher():
    shape = (2, 20, 3)
    teacher_points, student_points = both(shape, 0)
    teacher_colors, student_colors = both(shape, 1)
    clouds = (teacher_points, teacher_colors, student_points, student_colors)
    teacher_features, student_features = both((2, 20, 8), 2)
    teacher_mask, student_mask = both((2, 1, 4, 4), 3)
    teacher_fields, student_fields = (
        Fields(*(x.requires_grad_() for x in vars(random_fields(s)).values())) for s in (0, 1)
    )
    colors = {"teacher_colors": teacher_colors, "student_colors": student_colors}
    total = (
        density_kl(*clouds, matched=False, width=0.3, color_width=0.3)
        + graph_kl(teacher_points, student_points, graph(teacher_points.detach()), **colors)
        + feature_cosine(student_features, teacher_features)
        + field_consistency(student_fields, teacher_fields)
        + distillation.mask_consistency(student_mask, teacher_mask)
        + matched_points(*clouds)
    )
    total.backward()
    fields = ("expression", "pose", "weights")
    teachers = [teacher_points, teacher_colors, teacher_features, teacher_mask]
    students = [student_points, student_colors, student_features, student_mask]
    assert all(x.grad is None for x in teachers + [getattr(teacher_fields, name) for name in fields])
    assert all(x.grad.any() for x in students + [getattr(student_fields, name) for name in fields])


def test_distillation_total_weighs_each_term():
    config = dataclasses.replace(
        DistillConfig(), kl=1.0, ce=2.0, vgg=0.1, vgg_every=4, flame=0.0, mask=3.0, match=0.5
    )
    terms = {name: torch.tensor(float(10**place)) for place, name in enumerate(("kl", "ce", "vgg", "mask"))}
    terms["flame"] = torch.tensor(torch.nan)
    terms["match"] = torch.tensor(1e4)
    found = distillation.distillation_total(terms, config)
    torch.testing.assert_close(found, torch.tensor(1.0 + 20.0 + 40.0 + 3000.0 + 5000.0))
    for term in distillation.TERMS:
        assert isinstance(getattr(config, term), float)


def test_rejects():
    points = torch.zeros(1, 4, 3)
    with pytest.raises(ValueError, match=r"student_features has shape \(1, 4, 3\), the teacher's"):
        feature_cosine(points, torch.zeros(2, 4, 3))
    with pytest.raises(ValueError, match="student_points has shape"):
        matched_points(points, points, points[:, :1], points)
    with pytest.raises(ValueError, match=r"student\.pose has shape"):
        field_consistency(random_fields(0), random_fields(0, pose_features=0))
    with pytest.raises(ValueError, match="terms has 'gan'"):
        distillation.distillation_total({"gan": torch.tensor(1.0)}, DistillConfig())
    with pytest.raises(ValueError, match="terms has match, wants"):
        distillation.distillation_total({"match": torch.tensor(1.0)}, DistillConfig())
