"""Stage "teacher": point and image features that refine the fitted point avatar, which stays as it is."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from avatar import losses
from avatar.camera import Camera
from avatar.checkpoint import Checkpoint, pack_optimizer, unpack_optimizer
from avatar.config import RunConfig
from avatar.data import Frames
from avatar.head import HeadModel
from avatar.models.point_avatar import PointAvatar
from avatar.models.point_features import Pyramid, build_pyramid
from avatar.models.refined import Refined
from avatar.models.teacher import Teacher
from avatar.random import keyed_generator
from avatar.stages.fit import correct_tracking, load_avatar
from avatar.stages.loop import (
    Stage,
    batch_size,
    below_prefix,
    draw_batch,
    linear_decay,
    parameter_group,
    perceptual_to_frames,
    run_stage,
    schedule_steps,
    set_rates,
    set_training,
    trained_checkpoint,
    with_prefix,
)

STAGE = "teacher"


class TeacherModel:
    """A point avatar, the teacher on top and the neighbourhoods of its points.

    Args:
        avatar: fitted.   teacher: the network on top.   seed: of the neighbourhoods' random sampling.
    """

    def __init__(self, config: RunConfig, avatar: PointAvatar, teacher: Teacher):
        self.avatar = avatar.requires_grad_(False)
        self.teacher = teacher
        self.pyramid: Pyramid = build_pyramid(avatar.points.detach(), config.teacher.features, config.seed)

    def refine(self, expression: Tensor, pose: Tensor, image: Tensor) -> Refined:
        """Refined points of frames, with the image branch shown `image` (B, 3, H, W)."""
        # Evaluation refines expression and pose through the frozen avatar.
        wanted = torch.is_grad_enabled() and (expression.requires_grad or pose.requires_grad)
        with torch.set_grad_enabled(wanted):
            points = self.avatar.pose_points(expression, pose)
        return self.teacher(points.posed, points.colors, image, self.pyramid)


class NearestFrames:
    """The training frame nearest in pose and expression, for frames whose own image nobody has."""

    def __init__(self, frames: Frames, images: Tensor):
        coordinates = torch.cat([frames.pose, frames.expression], 1)
        # Every coordinate counts by how much it varies; those that never do say nothing.
        spread = coordinates.std(0, correction=0)
        self.scale = torch.where(spread > 1e-4, 1 / spread.clamp_min(1e-4), 0.0)
        self.coordinates, self.images = coordinates * self.scale, images

    def __call__(self, expression: Tensor, pose: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1]."""
        wanted = torch.cat([pose, expression], 1).detach() * self.scale
        return self.images[torch.cdist(wanted, self.coordinates).argmin(1)].float() / 255


def branch_images(frames: Frames) -> Tensor:
    """What the image branch sees of each frame: (F, 3, H, W) uint8."""
    return frames.images if frames.enhanced is None else frames.enhanced


class TeacherTraining(Stage):
    name = STAGE

    def __init__(self, config: RunConfig, model: TeacherModel, frames: Frames, device: torch.device):
        self.config, self.model, self.frames, self.device = config, model, frames, device
        self.images = branch_images(frames)
        options = config.teacher_training
        self.optimizer = torch.optim.Adam([parameter_group(list(model.teacher.parameters()), options.rate)])
        self.perceptual = perceptual_to_frames(
            "teacher_training.vgg", options.vgg, options.vgg_size, config, frames
        )
        self.done = 0

    @property
    def steps_done(self) -> int:
        return self.done

    def total_steps(self) -> int:
        points = self.model.avatar.num_points
        return schedule_steps(self.config.teacher_training, points, len(self.frames))

    def step(self) -> dict[str, Tensor]:
        options, seed, frames = self.config.teacher_training, self.config.seed, self.frames
        count = batch_size(options, self.model.avatar.num_points)
        fraction = self.done / self.total_steps()
        set_training(self.model.teacher, fraction < options.norm_frozen_from)
        index = draw_batch(seed, self.done * count, count, len(frames)).to(self.device)
        generator = keyed_generator(seed, "teacher image", self.done)
        other = torch.randint(len(frames), (count,), generator=generator).to(self.device)
        own = torch.rand(count, generator=generator).to(self.device) < options.own_frame_share
        image = self.images[torch.where(own, index, other)].float() / 255

        refined = self.model.refine(frames.expression[index], frames.pose[index], image)
        splats = self.model.avatar.draw(refined.posed, refined.colors, frames.camera(index))
        target = frames.image(index)
        terms = {
            "rgb": options.rgb * losses.rgb(splats.image, target),
            "mask": options.mask * losses.mask(splats.mask, frames.matte(index)),
        }
        if self.perceptual and self.done % options.vgg_every == 0:
            terms["vgg"] = options.vgg * options.vgg_every * self.perceptual(splats.image, index)
        terms["total"] = torch.stack(list(terms.values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        terms["total"].backward()
        if options.decay == "linear":
            set_rates(self.optimizer, linear_decay(fraction))
        self.optimizer.step()
        self.done += 1
        return {name: value.detach() for name, value in terms.items()}

    def preview(self) -> Tensor:
        frames, index = self.frames, torch.zeros(1, dtype=torch.int64, device=self.device)
        self.model.teacher.eval()
        refined = self.model.refine(
            frames.expression[index], frames.pose[index], self.images[index].float() / 255
        )
        return self.model.avatar.draw(refined.posed, refined.colors, frames.camera(index)).image

    def checkpoint(self) -> Checkpoint:
        moments, numbers = pack_optimizer("optimizer", self.optimizer)
        tensors = with_prefix("teacher", self.model.teacher.state_dict())
        return Checkpoint(STAGE, self.done, tensors | moments, {"optimizer": numbers})

    def restore(self, checkpoint: Checkpoint) -> None:
        self.model.teacher.load_state_dict(below_prefix("teacher", checkpoint.tensors))
        tensors = {name: value.to(self.device) for name, value in checkpoint.tensors.items()}
        unpack_optimizer("optimizer", self.optimizer, tensors, checkpoint.values["optimizer"])
        self.done = checkpoint.step


def create_teacher(config: RunConfig) -> Teacher:
    """An untrained teacher; its weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + 1)
        return Teacher(config.teacher, config.generator.latent_size)


def train_teacher(
    config: RunConfig,
    head: HeadModel,
    frames: Frames,
    folder: Path,
    device: torch.device,
    should_stop: Callable[[], bool] = lambda: False,
) -> TeacherModel:
    """Train the teacher on the run's fitted point avatar, going on from the run's last checkpoint.

    Raises:
        Stopped: `should_stop` said so; the state is saved.
    """
    avatar = load_avatar(folder, config, head).to(device)
    model = TeacherModel(config, avatar, create_teacher(config).to(device))
    run = TeacherTraining(config, model, correct_tracking(folder, frames).to(device), device)
    run_stage(run, config.teacher_training, folder, should_stop)
    model.teacher.eval()
    return model


def load_teacher(folder: Path, config: RunConfig, head: HeadModel, device: torch.device) -> TeacherModel:
    """The trained teacher of a run, in evaluation mode."""
    checkpoint = trained_checkpoint(folder, STAGE)
    teacher = create_teacher(config)
    teacher.load_state_dict(below_prefix("teacher", checkpoint.tensors))
    avatar = load_avatar(folder, config, head).to(device)
    return TeacherModel(config, avatar, teacher.to(device).eval().requires_grad_(False))


def draw_teacher(model: TeacherModel, nearest: NearestFrames) -> Callable[[Tensor, Tensor, Camera], Tensor]:
    """Draws frames with the image branch shown the nearest training frame."""

    def draw(expression: Tensor, pose: Tensor, camera: Camera) -> Tensor:
        refined = model.refine(expression, pose, nearest(expression, pose))
        return model.avatar.draw(refined.posed, refined.colors, camera).image

    return draw
