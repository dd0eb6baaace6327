import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_head import flame_like

from avatar.config import PointAvatarConfig, PointFeaturesConfig, StudentConfig, TeacherConfig
from avatar.head import HeadModel
from avatar.models.image_features import ImageFeatures
from avatar.models.mlp import parameter_count
from avatar.models.point_avatar import PointAvatar
from avatar.models.point_features import build_pyramid
from avatar.models.refined import Fusion, Latent, PointHead, pool_features
from avatar.models.student import Student
from avatar.models.teacher import Teacher

PAPER_POINTS = 400_000
PAPER_SIZE = 512
STUDENT_A = StudentConfig()
STUDENT_B = replace(
    STUDENT_A,
    avatar=replace(STUDENT_A.avatar, sdf_width=80),
    features=replace(STUDENT_A.features, randla_widths=(8, 32, 96, 224)),
)
SMALL_FEATURES = PointFeaturesConfig(
    randla_widths=(4, 6), randla_neighbors=5, gcn_widths=(6,), gcn_neighbors=4, gcn_output=None, gcn_level=1
)
SMALL_TEACHER = TeacherConfig(
    features=SMALL_FEATURES,
    resnet="resnet18",
    image_widths=(16, 12),
    fusion_widths=(16, 10),
    head_widths=(8,),
    latent_width=16,
)
SMALL_STUDENT = StudentConfig(
    avatar=PointAvatarConfig(
        sdf_width=48, sdf_layers=4, sdf_skip=2, deformer_width=8, deformer_layers=2, texture_widths=(8,)
    ),
    features=SMALL_FEATURES,
    fusion_widths=(12, 10),
    latent_width=16,
)


@pytest.fixture(scope="module")
def flame():
    return HeadModel(flame_like(np.random.default_rng(0)))


def scene(frames=2, points=60):
    """Canonical points, posed points, colours, images."""
    generator = torch.Generator().manual_seed(1)
    canonical = 0.3 * torch.randn(points, 3, generator=generator)
    posed = canonical + 0.1 * torch.randn(frames, points, 3, generator=generator)
    colors = torch.rand(frames, points, 3, generator=generator)
    return canonical, posed, colors, torch.rand(frames, 3, 32, 32, generator=generator)


def make_student(head, config=SMALL_STUDENT, points=60, seed=0):
    torch.manual_seed(seed)
    canonical = scene(points=points)[0]
    return Student(config, copy.deepcopy(head), torch.full((50,), 0.1), torch.ones(50), canonical, 0.05, 24)


def make_teacher(seed=0):
    torch.manual_seed(seed)
    return Teacher(SMALL_TEACHER, 24)


def drive(frames=2):
    generator = torch.Generator().manual_seed(2)
    return torch.rand(frames, 50, generator=generator), 0.1 * torch.randn(frames, 15, generator=generator)


def move_off_zero(model):
    """Random values in the layers that start at zero, so that something flows through them."""
    for value in model.parameters():
        if not value.any():
            torch.nn.init.normal_(value, 0, 0.05)
    return model


def everything(refined, latent):
    outputs = [refined.posed, refined.colors, refined.features, latent(pool_features(refined.features))]
    return sum((output * torch.randn_like(output)).sum() for output in outputs)


def assert_all_have_gradients(model):
    for name, value in model.named_parameters():
        assert value.grad is not None, name
        assert value.grad.isfinite().all(), name
        assert value.grad.any(), name


def totals(counts):
    """Sums for one pass per network (C1), and with the passes of the published forward (C2)."""
    once = sum(counts.values())
    return once, once + 2 * counts["sdf"] + counts["deformer"]


def sizes(parts):
    return {name: parameter_count(part) for name, part in parts.items()}


@pytest.fixture(scope="module")
def paper_teacher(flame):
    """Parameters and multiply-accumulates of point avatar and teacher at the paper's scale."""
    avatar = PointAvatar(PointAvatarConfig(), flame, torch.zeros(50), torch.ones(50))
    with torch.device("meta"):
        teacher = Teacher(TeacherConfig())
    parameters = sizes(avatar.parts()) | sizes(teacher.parts())
    return parameters, avatar.macs(PAPER_POINTS) | teacher.macs(PAPER_POINTS, PAPER_SIZE)


def test_point_avatar_multiply_accumulates(flame):
    avatar = PointAvatar(PointAvatarConfig(), flame, torch.zeros(50), torch.ones(50))
    assert avatar.macs(1) == {"sdf": 525_312, "deformer": 100_096, "texture": 4_480}


def test_teacher_sizes(paper_teacher):
    parameters, macs = paper_teacher
    assert parameters == {
        "sdf": 527_581,
        "deformer": 101_003,
        "texture": 4_611,
        "randla": 1_236_392,
        "gcn": 92_160,
        "image": 23_508_032 + 2_622_976,
        "fusion": 541_440,
        "head": 67_334,
        "latent": 525_312,
    }
    assert sum(parameters.values()) == 29_226_841
    assert sum(parameters.values()) - 633_195 == 28_593_646
    assert [round(total / 1e12, 3) for total in totals(macs)] == [0.701, 1.162]


@pytest.mark.parametrize(
    ("config", "expected", "macs"),
    [(STUDENT_A, 1_062_457, [0.050, 0.075]), (STUDENT_B, 1_223_081, [0.052, 0.085])],
    ids=["A", "B"],
)
def test_student_sizes(flame, paper_teacher, config, expected, macs):
    """At most 5 % of the teacher's parameters and 10 % of its multiply-accumulates, in both accountings."""
    student = Student(config, flame, torch.zeros(50), torch.ones(50), torch.rand(30, 3), 0.05)
    parameters = sum(sizes(student.parts()).values())
    assert parameters == expected
    assert parameters == parameter_count(student) - student.avatar.points.numel()
    counts = student.macs(PAPER_POINTS)
    assert [round(total / 1e12, 3) for total in totals(counts)] == macs
    assert parameters <= 0.05 * sum(paper_teacher[0].values())
    for own, teachers in zip(totals(counts), totals(paper_teacher[1]), strict=True):
        assert own <= 0.10 * teachers


def test_parts_cover_the_teacher():
    teacher = make_teacher()
    assert sum(sizes(teacher.parts()).values()) == parameter_count(teacher)
    assert teacher.parts().keys() == teacher.macs(60, 32).keys()


def test_parts_cover_the_student(flame):
    student = make_student(flame)
    assert student.parts().keys() == student.macs(60).keys()


@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [("resnet18", 11_176_512, 9.5), ("resnet34", 21_284_672, 19.1), ("resnet50", 23_508_032, 21.4)],
)
def test_resnets_have_the_sizes_of_those_with_batch_normalisation(name, parameters, macs):
    with torch.device("meta"):
        features = ImageFeatures(name)
    assert parameter_count(features.resnet) == parameters
    counts = features.macs(PAPER_SIZE)
    assert round(counts["resnet"] / 1e9, 1) == macs
    pooled = 2048 if name == "resnet50" else 512
    assert counts["layers"] == pooled * 1024 + 1024 * 512


def test_image_features_see_each_frame_alone():
    torch.manual_seed(0)
    features = ImageFeatures("resnet18", (16, 12))
    images = torch.rand(3, 3, 40, 32)
    together = features(images)
    assert together.shape == (3, 12)
    for row in range(3):
        torch.testing.assert_close(features(images[row : row + 1])[0], together[row], rtol=1e-4, atol=1e-5)
    assert torch.equal(features.eval()(images), together)
    assert features.macs(32) == ImageFeatures("resnet18", (16, 12)).macs(32)


def test_image_features_normalise_by_imagenet():
    torch.manual_seed(0)
    features = ImageFeatures("resnet18", (16, 12))
    image = torch.rand(1, 3, 32, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = features.resnet((image - mean[:, None, None]) / std[:, None, None])
    for layer in features.layers:
        x = F.leaky_relu(layer(x), 0.2)
    torch.testing.assert_close(features(image), x)


def test_applying_the_image_part_once_equals_concatenation():
    torch.manual_seed(0)
    fusion = Fusion(6, (8, 5), frame_channels=4).double()
    points, frame = torch.randn(2, 7, 6).double(), torch.randn(2, 4).double()
    x = torch.cat([points, frame[:, None].expand(-1, 7, -1)], -1)
    for layer in fusion.layers:
        x = F.leaky_relu(layer(x), 0.2)
    torch.testing.assert_close(fusion(points, frame), x)
    assert fusion.macs(100) == 100 * (6 * 8 + 8 * 5) + 4 * 8


@pytest.mark.parametrize("widths", [(), (8, 4)])
def test_point_head_is_zero_at_first(widths):
    torch.manual_seed(0)
    head = PointHead(5, widths)
    features = torch.randn(2, 7, 5)
    moves, tints = head(features)
    assert moves.shape == tints.shape == (2, 7, 3)
    assert not moves.any()
    assert not tints.any()
    head.output.bias.data = torch.arange(6.0)
    moves, tints = head(features)
    assert torch.equal(moves[1, 3], torch.tensor([0.0, 1.0, 2.0]))
    assert torch.equal(tints[1, 3], torch.tensor([3.0, 4.0, 5.0]))


def test_latent_code_has_unit_mean_square():
    torch.manual_seed(0)
    latent = Latent(10, 16, 24)
    features = torch.randn(3, 7, 5)
    pooled = pool_features(features)
    assert torch.equal(pooled, torch.cat([features.mean(1), features.max(1).values], -1))
    z = latent(pooled)
    assert z.shape == (3, 24)
    torch.testing.assert_close(z.square().mean(-1), torch.ones(3))
    torch.testing.assert_close(latent(pool_features(features.flip(1))), z)


def test_teacher_starts_as_the_point_avatar():
    canonical, posed, colors, image = scene()
    refined = make_teacher()(posed, colors, image, build_pyramid(canonical, SMALL_FEATURES, 0))
    assert torch.equal(refined.posed, posed)
    assert torch.equal(refined.colors, colors)
    assert refined.features.shape == (2, 60, 10)
    assert refined.point_features.shape == (2, 60, 14)
    assert refined.points is None


def test_student_starts_as_its_point_avatar(flame):
    student = make_student(flame)
    canonical = scene()[0]
    assert torch.equal(student.avatar.points, canonical)
    assert student.avatar.radius == 0.05
    expression, pose = drive()
    refined = student(expression, pose, build_pyramid(canonical, SMALL_FEATURES, 0))
    points = student.avatar.pose_points(expression, pose)
    torch.testing.assert_close(refined.posed, points.posed)
    torch.testing.assert_close(refined.colors, points.colors)
    assert refined.features.shape == (2, 60, 10)
    assert torch.equal(refined.points.posed, refined.posed)


def test_refined_colors_stay_in_range():
    canonical, posed, colors, image = scene()
    teacher = make_teacher()
    teacher.head.output.bias.data = torch.tensor([0.1, 0.2, 0.3, 2.0, -2.0, 0.0])
    refined = teacher(posed, colors, image, build_pyramid(canonical, SMALL_FEATURES, 0))
    torch.testing.assert_close(refined.posed - posed, torch.tensor([0.1, 0.2, 0.3]).expand_as(posed))
    assert (refined.colors[..., 0] == 1).all()
    assert (refined.colors[..., 1] == 0).all()
    assert torch.equal(refined.colors[..., 2], colors[..., 2])


def test_every_parameter_of_the_teacher_gets_a_gradient():
    canonical, posed, colors, image = scene()
    teacher = move_off_zero(make_teacher()).eval()
    refined = teacher(posed, colors, image, build_pyramid(canonical, SMALL_FEATURES, 0))
    everything(refined, teacher.latent).backward()
    assert_all_have_gradients(teacher)


def test_every_parameter_of_the_student_gets_a_gradient(flame):
    student = move_off_zero(make_student(flame)).eval()
    refined = student(*drive(), build_pyramid(scene()[0], SMALL_FEATURES, 0))
    everything(refined, student.latent).backward()
    assert_all_have_gradients(student)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_teacher_takes_frames_in_any_order(training):
    canonical, posed, colors, image = scene(frames=3)
    pyramid = build_pyramid(canonical, SMALL_FEATURES, 0)
    teacher = move_off_zero(make_teacher()).train(training)
    together = teacher(posed, colors, image, pyramid)
    order = torch.tensor([2, 0, 1])
    shuffled = teacher(posed[order], colors[order], image[order], pyramid)
    for name in ("posed", "colors", "features"):
        wanted = getattr(together, name)[order]
        torch.testing.assert_close(getattr(shuffled, name), wanted, rtol=1e-3, atol=1e-4)


def test_teacher_is_restored_from_its_state():
    canonical, posed, colors, image = scene()
    pyramid = build_pyramid(canonical, SMALL_FEATURES, 0)
    teacher, other = move_off_zero(make_teacher()), make_teacher(seed=1)
    teacher(posed, colors, image, pyramid)
    other.load_state_dict(teacher.state_dict())
    first, second = (model.eval()(posed, colors, image, pyramid) for model in (teacher, other))
    assert torch.equal(first.posed, second.posed)
    assert torch.equal(first.features, second.features)


def test_student_is_restored_from_its_state(flame):
    pyramid = build_pyramid(scene()[0], SMALL_FEATURES, 0)
    student, other = move_off_zero(make_student(flame)), make_student(flame, seed=1)
    student(*drive(), pyramid)
    other.load_state_dict(student.state_dict())
    first, second = (model.eval()(*drive(), pyramid) for model in (student, other))
    assert torch.equal(first.posed, second.posed)
    assert torch.equal(first.features, second.features)
