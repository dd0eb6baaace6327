"""Stage "distill": the teacher's points and features, taught to the compressed student."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from avatar import distillation, losses
from avatar.camera import Camera
from avatar.checkpoint import Checkpoint, pack_optimizer, unpack_optimizer
from avatar.config import RunConfig
from avatar.data import Frames
from avatar.head import HeadModel
from avatar.models.point_avatar import PointAvatar, PosedPoints
from avatar.models.point_features import Pyramid, build_pyramid
from avatar.models.refined import Refined
from avatar.models.student import Student
from avatar.random import keyed_generator
from avatar.splatting import Splats
from avatar.stages.fit import correct_tracking
from avatar.stages.loop import (
    FrameCache,
    Stage,
    batch_size,
    below_prefix,
    draw_batch,
    linear_decay,
    numbered,
    parameter_group,
    perceptual_loss,
    run_stage,
    schedule_steps,
    set_rates,
    set_training,
    trained_checkpoint,
    with_prefix,
)
from avatar.stages.teacher import TeacherModel, branch_images, load_teacher

STAGE = "distill"


@dataclass
class StudentModel:
    """A student and the neighbourhoods of its points."""

    student: Student
    pyramid: Pyramid

    def refine(self, expression: Tensor, pose: Tensor) -> Refined:
        return self.student(expression, pose, self.pyramid)

    def draw(self, refined: Refined, camera: Camera) -> Splats:
        return self.student.avatar.draw(refined.posed, refined.colors, camera)

    def tensors(self) -> dict[str, Tensor]:
        state = with_prefix("student", self.student.state_dict())
        return state | with_prefix("pyramid", self.pyramid.tensors())


class Distillation(Stage):
    name = STAGE

    def __init__(
        self,
        config: RunConfig,
        teacher: TeacherModel,
        model: StudentModel,
        frames: Frames,
        device: torch.device,
    ):
        self.config, self.teacher, self.model, self.frames = config, teacher, model, frames
        self.device = device
        self.images = branch_images(frames)
        self.cache = FrameCache(config.cache_gigabytes)
        options, student = config.distill, model.student
        fused = options.ce_features == "fused"
        network = teacher.teacher
        features = network.fusion.out_channels if fused else network.features.out_channels
        width = student.fusion.out_channels
        generator = keyed_generator(config.seed, "projection")
        # Brings the student's features to the teacher's width; used in training only.
        self.projection = nn.Linear(width, features).to(device)
        with torch.no_grad():
            bound = width**-0.5
            for value in self.projection.parameters():
                value.copy_((torch.rand(value.shape, generator=generator) * 2 - 1) * bound)
        self.optimizer = self._build_optimizer()
        self.perceptual = perceptual_loss("distill.vgg", options.vgg, options.vgg_size, device)
        self.done = 0

    def _build_optimizer(self) -> torch.optim.Adam:
        options, student = self.config.distill, self.model.student
        networks = [
            parameter
            for name, parameter in student.named_parameters()
            if name != "avatar.points" and not name.startswith("latent.")
        ]
        groups = [
            parameter_group([student.avatar.points], options.point_rate),
            parameter_group([*networks, *self.projection.parameters()], options.rate),
        ]
        return torch.optim.Adam(groups, fused=True)

    @property
    def steps_done(self) -> int:
        return self.done

    def total_steps(self) -> int:
        points = self.model.student.avatar.num_points
        options = self.config.distill
        return options.warmup_steps + schedule_steps(options, points, len(self.frames))

    @torch.no_grad()
    def _teach(self, index: Tensor) -> dict[str, Tensor]:
        """What the student is to match in one frame."""
        frames = self.frames
        image = self.images[index].float() / 255
        refined = self.teacher.refine(frames.expression[index], frames.pose[index], image)
        splats = self.teacher.avatar.draw(refined.posed, refined.colors, frames.camera(index))
        fused = self.config.distill.ce_features == "fused"
        taught = {
            "posed": refined.posed,
            "colors": refined.colors,
            "features": refined.features if fused else refined.point_features,
            "mask": splats.mask,
        }
        if self.perceptual:
            taught |= numbered("tap", self.perceptual.target_features(splats.image))
        return taught

    def step(self) -> dict[str, Tensor]:
        options, seed = self.config.distill, self.config.seed
        count = batch_size(options, self.model.student.avatar.num_points)
        warmup = options.warmup_steps
        fraction = max(0, self.done - warmup) / max(1, self.total_steps() - warmup)
        set_training(self.model.student, fraction < options.norm_frozen_from)
        index = draw_batch(seed, self.done * count, count, len(self.frames)).to(self.device)
        taught = self.cache.batch(index, self._teach)
        expression, pose = self.frames.expression[index], self.frames.pose[index]
        if self.done < warmup:
            points = self.model.student.avatar.pose_points(expression, pose)
            terms = self._point_losses(taught, points.posed, points.colors, points)
        else:
            refined = self.model.refine(expression, pose)
            splats = self.model.draw(refined, self.frames.camera(index))
            terms = self._point_losses(taught, refined.posed, refined.colors, refined.points)
            terms |= self._refined_losses(index, taught, refined, splats)
        terms["total"] = distillation.distillation_total(terms, options)
        self.optimizer.zero_grad(set_to_none=True)
        terms["total"].backward()
        if options.decay == "linear":
            set_rates(self.optimizer, linear_decay(fraction))
        self.optimizer.step()
        self.done += 1
        return {name: value.detach() for name, value in terms.items()}

    def _point_losses(
        self, taught: dict[str, Tensor], posed: Tensor, colors: Tensor, points: PosedPoints
    ) -> dict[str, Tensor]:
        """What the cloud (B, N, 3) with its colours and the networks that posed it cost."""
        options, avatar = self.config.distill, self.model.student.avatar
        clouds = taught["posed"], taught["colors"], posed, colors
        terms = {}
        if options.kl:
            terms["kl"] = self._cloud_divergence(*clouds)
        if options.match:
            terms["match"] = distillation.matched_points(
                *clouds, width=options.kl_width, color_width=options.kl_color_width
            )
        if options.flame:
            with torch.no_grad():
                fields = self.teacher.avatar.deformer(avatar.points)
            terms["flame"] = distillation.field_consistency(
                points.fields,
                fields,
                expression=options.flame_expression,
                pose=options.flame_pose,
                skinning=options.flame_skinning,
                squared=options.flame_squared,
            )
        if options.surface:
            terms["surface"] = losses.surface(points.sdf)
        if options.eikonal:
            generator = keyed_generator(self.config.seed, "distill eikonal", self.done)
            gradient = losses.eikonal_samples(avatar, points.sdf_gradient, options.eikonal_samples, generator)
            terms["eikonal"] = losses.eikonal(gradient)
        return terms

    def _refined_losses(
        self, index: Tensor, taught: dict[str, Tensor], refined: Refined, splats: Splats
    ) -> dict[str, Tensor]:
        """What features and picture cost."""
        options = self.config.distill
        terms = {}
        if options.ce:
            projected = self.projection(refined.features)
            terms["ce"] = distillation.feature_cosine(projected, taught["features"])
        if self.perceptual and self.done % options.vgg_every == 0:
            terms["vgg"] = self.perceptual(splats.image, list(below_prefix("tap", taught).values()))
        if options.mask:
            terms["mask"] = distillation.mask_consistency(splats.mask, taught["mask"])
        if options.rgb:
            terms["rgb"] = losses.rgb(splats.image, self.frames.image(index))
        return terms

    def _cloud_divergence(self, *clouds: Tensor) -> Tensor:
        options = self.config.distill
        if options.kl_form == "graph":
            pyramid = self.model.pyramid
            teacher, student = (pyramid.arrange(cloud) for cloud in (clouds[0], clouds[2]))
            return distillation.graph_kl(teacher, student, pyramid.neighbors[0])
        return distillation.density_kl(
            *clouds,
            matched=True,
            anchors=options.kl_anchors,
            points=options.kl_points,
            width=options.kl_width,
            color_width=options.kl_color_width,
            generator=keyed_generator(self.config.seed, "kl", self.done),
        )

    def preview(self) -> Tensor:
        frames, index = self.frames, torch.zeros(1, dtype=torch.int64, device=self.device)
        self.model.student.eval()
        refined = self.model.refine(frames.expression[index], frames.pose[index])
        return self.model.draw(refined, frames.camera(index)).image

    def checkpoint(self) -> Checkpoint:
        moments, numbers = pack_optimizer("optimizer", self.optimizer)
        tensors = self.model.tensors() | with_prefix("projection", self.projection.state_dict())
        values = {"optimizer": numbers} | student_values(self.model, self.frames)
        return Checkpoint(STAGE, self.done, tensors | moments, values)

    def restore(self, checkpoint: Checkpoint) -> None:
        self.model.student.load_state_dict(below_prefix("student", checkpoint.tensors))
        self.projection.load_state_dict(below_prefix("projection", checkpoint.tensors))
        tensors = {name: value.to(self.device) for name, value in checkpoint.tensors.items()}
        unpack_optimizer("optimizer", self.optimizer, tensors, checkpoint.values["optimizer"])
        self.done = checkpoint.step


def student_values(model: StudentModel, frames: Frames) -> dict:
    """What a checkpoint must hold beside the tensors to rebuild the student."""
    return {"radius": model.student.avatar.radius, "shape": frames.shape.tolist()}


def create_student(config: RunConfig, avatar: PointAvatar) -> StudentModel:
    """An untrained student on an avatar's points; its weights depend on the seed alone."""
    points = avatar.points.detach().clone()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + 2)
        student = Student(
            config.student,
            avatar.head,
            avatar.canonical_expression,
            avatar.expression_variance,
            points,
            avatar.radius,
            config.generator.latent_size,
        )
    return StudentModel(student, build_pyramid(points, config.student.features, config.seed))


def distill(
    config: RunConfig,
    head: HeadModel,
    frames: Frames,
    folder: Path,
    device: torch.device,
    should_stop: Callable[[], bool] = lambda: False,
) -> StudentModel:
    """Train the student on the run's teacher, going on from the run's last checkpoint.

    Raises:
        Stopped: `should_stop` said so; the state is saved.
    """
    teacher = load_teacher(folder, config, head, device)
    model = create_student(config, teacher.avatar)
    model.student.to(device)
    run = Distillation(config, teacher, model, correct_tracking(folder, frames).to(device), device)
    run_stage(run, config.distill, folder, should_stop)
    model.student.eval()
    return model


def load_student(
    folder: Path, config: RunConfig, head: HeadModel, device: torch.device, stage: str = STAGE
) -> StudentModel:
    """The student as a stage left it, in evaluation mode."""
    checkpoint = trained_checkpoint(folder, stage)
    state = below_prefix("student", checkpoint.tensors)
    student = Student(
        config.student,
        head.with_shape(torch.tensor(checkpoint.values["shape"])),
        state["avatar.canonical_expression"],
        state["avatar.expression_variance"],
        state["avatar.points"],
        checkpoint.values["radius"],
        config.generator.latent_size,
    )
    student.load_state_dict(state)
    pyramid = Pyramid.from_tensors(below_prefix("pyramid", checkpoint.tensors))
    return StudentModel(student.to(device).eval(), pyramid.to(device))


def draw_student(model: StudentModel) -> Callable[[Tensor, Tensor, Camera], Tensor]:
    def draw(expression: Tensor, pose: Tensor, camera: Camera) -> Tensor:
        return model.draw(model.refine(expression, pose), camera).image

    return draw
