"""What all training stages promise: resuming is bitwise, and frozen parts stay as they are."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import TINY

from avatar.checkpoint import latest_checkpoint
from avatar.config import STAGES, AdversarialConfig
from avatar.data import load_frames
from avatar.errors import AvatarError, Stopped
from avatar.head import embedded_head
from avatar.models.renderer import RenderInput
from avatar.presets import make_config
from avatar.run import TRAINERS, Run, model_loaders, reproducible, train
from avatar.stages.adversarial import (
    Adversarial,
    create_networks,
    frozen,
    load_renderer,
    schedule_moment,
)
from avatar.stages.distill import Distillation, create_student, load_student
from avatar.stages.loop import FrameCache, PerceptualToFrames, linear_decay
from avatar.stages.teacher import NearestFrames, TeacherTraining, load_teacher

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(dataset):
    return make_config(str(dataset), "small", 0, TINY)


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    """A run with all stages trained in one go."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train(Run(folder, config, CPU), STAGES)
    return folder


@pytest.fixture(scope="module")
def frames(dataset):
    return load_frames(dataset, "train", 32)


def final(folder, stage):
    return latest_checkpoint(folder / "checkpoints", stage)


def assert_same_state(first, second):
    assert first.step == second.step
    assert first.values == second.values
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, second.tensors[name]), name


def copy_stages(source, target, stages):
    (target / "checkpoints").mkdir(parents=True)
    for stage in stages:
        path = sorted((source / "checkpoints").glob(f"{stage}-*"))[-1]
        (target / "checkpoints" / path.name).write_bytes(path.read_bytes())


def test_a_stage_of_no_steps_leaves_what_it_starts_from(undisturbed, config, frames, tmp_path):
    none = replace(config, teacher_training=replace(config.teacher_training, epochs=0))
    copy_stages(undisturbed, tmp_path, STAGES[:1])
    TRAINERS["teacher"](none, embedded_head(), frames, tmp_path, CPU)
    assert final(tmp_path, "teacher").step == 0


@pytest.mark.parametrize("stage", STAGES[1:])
def test_stopping_after_every_step_changes_nothing(stage, undisturbed, config, frames, tmp_path):
    copy_stages(undisturbed, tmp_path, STAGES[: STAGES.index(stage)])
    for _ in range(100):
        asked = iter((False, True))
        try:
            with reproducible():
                TRAINERS[stage](config, embedded_head(), frames, tmp_path, CPU, lambda: next(asked))  # noqa: B023
        except Stopped:
            continue
        break
    assert_same_state(final(tmp_path, stage), final(undisturbed, stage))


@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_killed_process_resumes_bitwise(stage, undisturbed, config, dataset, tmp_path):
    """SIGKILL as soon as the stage has left a checkpoint, then the same command again."""
    copy_stages(undisturbed, tmp_path, STAGES[: STAGES.index(stage)])
    (tmp_path / "config.json").write_bytes((undisturbed / "config.json").read_bytes())
    command = [sys.executable, "-m", "avatar", "train", str(dataset), "--out", str(tmp_path)]
    command += ["--stages", stage, "--set", *TINY]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and final(tmp_path, stage) is None:
            pass
        process.send_signal(signal.SIGKILL)
    with reproducible():
        frames = load_frames(dataset, "train", 32)
        TRAINERS[stage](config, embedded_head(), frames, tmp_path, CPU)
    assert_same_state(final(tmp_path, stage), final(undisturbed, stage))


def gradients(module):
    return [name for name, value in module.named_parameters() if value.grad is not None]


def changed(before, module):
    return [name for name, value in module.state_dict().items() if not torch.equal(value, before[name])]


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_teacher_training_leaves_the_point_avatar_alone(undisturbed, config, frames):
    model = load_teacher(undisturbed, config, embedded_head(), CPU)
    model.teacher.requires_grad_(True)
    run = TeacherTraining(config, model, frames, CPU)
    avatar, teacher = snapshot(model.avatar), snapshot(model.teacher)
    run.step()
    assert not gradients(model.avatar)
    assert not changed(avatar, model.avatar)
    assert changed(teacher, model.teacher)


def test_distillation_leaves_the_teacher_alone(undisturbed, config, frames):
    teacher = load_teacher(undisturbed, config, embedded_head(), CPU)
    model = create_student(config, teacher.avatar)
    run = Distillation(config, teacher, model, frames, CPU)
    before = snapshot(teacher.avatar), snapshot(teacher.teacher)
    latent, student = snapshot(model.student.latent), snapshot(model.student)
    for _ in range(2):
        run.step()
    for state, module in zip(before, (teacher.avatar, teacher.teacher), strict=True):
        assert not gradients(module)
        assert not changed(state, module)
    # The latent network belongs to the renderer: nothing here would train it.
    assert not changed(latent, model.student.latent)
    for part in ("avatar.points", "avatar.sdf", "avatar.deformer", "features", "fusion", "head"):
        assert any(name.startswith(part) for name in changed(student, model.student)), part


def test_student_starts_from_the_teachers_points(undisturbed, config):
    teacher = load_teacher(undisturbed, config, embedded_head(), CPU)
    model = create_student(config, teacher.avatar)
    assert torch.equal(model.student.avatar.points, teacher.avatar.points)
    assert model.student.avatar.radius == teacher.avatar.radius


@pytest.fixture
def adversarial(undisturbed, config, frames):
    model = load_student(undisturbed, config, embedded_head(), CPU)
    return Adversarial(config, model, create_networks(config, model), frames, CPU)


def test_rendering_steps_leave_the_student_alone(adversarial):
    student, networks = adversarial.model.student, adversarial.networks
    before, trained = snapshot(student), snapshot(networks)
    for _ in range(adversarial.config.adversarial.pretrain_steps):
        adversarial.step()
    assert not gradients(student)
    assert not changed(before, student)
    moved = changed(trained, networks)
    for part in ("renderer.generator", "renderer.latent", "renderer.point_features", "discriminator"):
        assert any(name.startswith(part) for name in moved), part
    assert any(name.startswith("inverter") for name in moved)
    assert any(name.startswith("average.model") for name in moved)


def test_optimisation_steps_leave_the_networks_alone(adversarial):
    student, networks = adversarial.model.student, adversarial.networks
    options = adversarial.config.adversarial
    adversarial.done = options.pretrain_steps
    for optimizer in adversarial.optimizers.values():
        optimizer.zero_grad(set_to_none=True)
    before, points = snapshot(networks), snapshot(student)
    for _ in range(options.optimization_steps):
        terms = adversarial.step()
    assert set(terms) == {"cycle", "target cycle", "optimization rgb", "splat rgb"}
    assert not gradients(networks)
    assert not changed(before, networks)
    assert changed(points, student)
    # The latent network is the renderer's.
    assert not [name for name in changed(points, student) if name.startswith("latent.")]
    assert all(value.requires_grad for value in networks.renderer.parameters())


def test_frozen_modules_pass_gradients_on():
    layer, x = torch.nn.Linear(2, 2), torch.ones(1, 2, requires_grad=True)
    layer.bias.requires_grad_(False)
    with frozen(layer):
        layer(x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None
    assert layer.weight.requires_grad
    assert not layer.bias.requires_grad


def test_rounds_alternate_after_pretraining():
    options = AdversarialConfig(pretrain_steps=2, rounds=2, optimization_steps=1, rendering_steps=3)
    moments = [schedule_moment(options, step) for step in range(10)]
    assert [moment.renders for moment in moments] == [True, True, False, True, True, True] + [False] + [
        True
    ] * 3
    assert [moment.phase for moment in moments] == [0, 0, 1, 2, 2, 2, 3, 4, 4, 4]
    assert [moment.count for moment in moments] == [0, 1, 0, 2, 3, 4, 1, 5, 6, 7]


def test_cached_inputs_are_those_computed_anew(adversarial):
    index = torch.tensor([2, 0])
    fresh = [adversarial._see(index[i : i + 1]) for i in range(2)]
    first = adversarial.cache.batch(index, adversarial._see)
    again = adversarial.cache.batch(index, adversarial._see)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert torch.equal(tensor, torch.cat([entry[name] for entry in fresh]))


def test_frame_cache_keeps_to_its_budget():
    made = []

    def make(frame):
        made.append(int(frame))
        return {"value": torch.full((1, 250), float(frame))}

    cache = FrameCache(1500e-9)
    for _ in range(2):
        assert cache.batch(torch.tensor([0, 1]), make)["value"][:, 0].tolist() == [0, 1]
    assert made == [0, 1, 1]


def test_perceptual_features_of_frames_are_computed_once(frames):
    class Mean(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.asked = 0

        def target_features(self, image):
            self.asked += len(image)
            return [image.mean(1), image.amax(1)]

        def forward(self, image, target):
            assert len(target) == 2
            return (image.mean(1) - target[0]).abs().mean() + (image.amax(1) - target[1]).abs().mean()

    loss = Mean()
    to_frames = PerceptualToFrames(loss, frames, 1.0)
    image, index = torch.rand(2, 3, 32, 32), torch.tensor([4, 1])
    expected = loss(image, loss.target_features(frames.image(index)))
    for _ in range(2):
        assert torch.equal(to_frames(image, index), expected)
    assert loss.asked == 4


def test_full_method_paints_nothing_before_it_is_trained(undisturbed, config, frames):
    model = load_student(undisturbed, config, embedded_head(), CPU)
    renderer = create_networks(config, model).average.model
    index = torch.tensor([1])
    with torch.no_grad():
        refined = model.refine(frames.expression[index], frames.pose[index])
        splats = model.draw(refined, frames.camera(index))
        _, synthesis = renderer(RenderInput.of(refined, splats))
    assert torch.allclose(synthesis.image, splats.image, atol=1e-6)


def test_loaded_renderer_is_the_average(undisturbed, config):
    _, renderer = load_renderer(undisturbed, config, embedded_head(), CPU)
    state = final(undisturbed, "adversarial").tensors
    for name, value in renderer.state_dict().items():
        assert torch.equal(value, state[f"networks.average.model.{name}"])


def test_stages_want_the_one_before(config, frames, tmp_path):
    for stage, before in zip(STAGES[1:], STAGES, strict=False):
        with pytest.raises(AvatarError, match=f"no checkpoint of the stage '(fit|{before})'"):
            TRAINERS[stage](config, embedded_head(), frames, tmp_path, CPU)


def test_corrected_tracking_goes_with_the_points(undisturbed, config, frames, tmp_path, monkeypatch):
    tensors = final(undisturbed, "fit").tensors
    assert not torch.equal(tensors["tracking.pose.weight"], frames.pose)
    copy_stages(undisturbed, tmp_path, STAGES)
    for stage in STAGES[1:]:
        module = sys.modules[TRAINERS[stage].__module__]
        used = []
        monkeypatch.setattr(module, "run_stage", lambda run, *_, used=used: used.append(run.frames))
        TRAINERS[stage](config, embedded_head(), frames, tmp_path, CPU)
        for name in ("expression", "pose", "translation"):
            assert torch.equal(getattr(used[0], name), tensors[f"tracking.{name}.weight"])


@pytest.mark.parametrize("name", ["point_avatar", "teacher", "student", "full"])
def test_every_model_can_be_refined_to_a_frame(name, undisturbed, config, frames):
    draw = model_loaders(Run(undisturbed, config, CPU))[name]()
    index = torch.tensor([2])
    expression, pose, translation = (
        getattr(frames, tracked)[index].clone().requires_grad_(True)
        for tracked in ("expression", "pose", "translation")
    )
    draw(expression, pose, frames.camera(index, translation)).sum().backward()
    assert all(value.grad.any() for value in (expression, pose, translation))


def test_nearest_frame_is_found_by_pose_and_expression(frames):
    nearest = NearestFrames(frames, frames.images)
    image = nearest(frames.expression[3:5] + 1e-3, frames.pose[3:5])
    assert torch.equal(image, frames.image(torch.tensor([3, 4])))


def test_paper_presets_stages_train(dataset, undisturbed, frames, tmp_path):
    """The published networks on few points of small frames, one step each."""
    sizes = ("size=32", "fit.vgg=0", "teacher_training.vgg=0", "distill.vgg=0", "adversarial.vgg=0")
    lengths = ("teacher_training.epochs=1", "distill.epochs=1", "adversarial.rounds=1")
    steps = ("teacher_training.steps_per_epoch=1", "distill.steps_per_epoch=1")
    phases = [
        f"adversarial.{name}=1"
        for name in ("pretrain_steps", "optimization_steps", "rendering_steps", "batch")
    ]
    batches = ("teacher_training.batch_max=1", "distill.batch_max=1", "adversarial.optimization_vgg=0")
    narrow = ("generator.channel_max=16", "discriminator.channel_max=16")
    small = ("distill.kl_anchors=16", "distill.kl_points=32", "distill.eikonal_samples=32")
    overrides = (
        *sizes,
        *lengths,
        *steps,
        *phases,
        *batches,
        *narrow,
        *small,
        "fit.epochs=1",
        "fit.batch_max=6",
    )
    config = make_config(str(dataset), "paper", 0, overrides)
    train(Run(tmp_path, config, CPU), STAGES)
    for stage in STAGES:
        state = final(tmp_path, stage).tensors
        assert all(value.isfinite().all() for value in state.values() if value.is_floating_point()), stage


def test_literal_options_train(dataset, config, undisturbed, frames, tmp_path):
    """The paper's own readings where the defaults differ."""
    copy_stages(undisturbed, tmp_path, ("fit", "teacher"))
    literal = replace(
        config,
        generator=replace(config.generator, condition="none"),
        distill=replace(config.distill, kl_form="graph", ce_features="points", rgb=0.0, match=0.0),
        adversarial=replace(config.adversarial, target_cycle=0.0, optimization_rgb=0.0, splat_rgb=0.0),
    )
    with reproducible():
        for stage in ("distill", "adversarial"):
            TRAINERS[stage](literal, embedded_head(), frames, tmp_path, CPU)
    state = final(tmp_path, "adversarial").tensors
    assert all(value.isfinite().all() for value in state.values() if value.is_floating_point())


def test_decay_falls_to_a_tenth():
    assert [linear_decay(fraction) for fraction in (0.0, 0.5, 0.75, 1.0)] == pytest.approx([1, 1, 0.55, 0.1])
