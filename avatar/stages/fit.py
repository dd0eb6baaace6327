"""Stage "fit": a point avatar from tracked frames."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from avatar import losses
from avatar.camera import Camera
from avatar.checkpoint import Checkpoint, pack_optimizer, unpack_optimizer
from avatar.config import FitConfig, RunConfig
from avatar.data import Frames
from avatar.errors import AvatarError
from avatar.head import HeadModel
from avatar.models.point_avatar import PointAvatar
from avatar.random import keyed_generator
from avatar.stages.loop import (
    Stage,
    batch_size,
    below_prefix,
    draw_batch,
    linear_decay,
    parameter_group,
    perceptual_to_frames,
    run_stage,
    set_rates,
    trained_checkpoint,
    with_prefix,
)

STAGE = "fit"
MILESTONES = (40, 60)
TRACKED = ("expression", "pose", "translation")


@dataclass
class Position:
    """Where training stands. Everything drawn or scheduled follows from it and the seed."""

    step: int = 0
    epoch: int = 0
    drawn: int = 0  # frames drawn so far
    epoch_steps: int = 0  # steps done in this epoch
    epoch_drawn: int = 0
    fraction: float = 0.0  # of the whole schedule
    batch_points: int = 0  # points when they were last doubled, which set the batch


class Tracking(nn.Module):
    """Corrections of each training frame's expression, pose and translation."""

    def __init__(self, frames: Frames):
        super().__init__()
        for name in TRACKED:
            start = getattr(frames, name).clone()
            setattr(self, name, nn.Embedding.from_pretrained(start, freeze=False, sparse=True))

    def forward(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.expression(index), self.pose(index), self.translation(index)


def create_avatar(config: RunConfig, head: HeadModel, frames: Frames) -> PointAvatar:
    """An untrained avatar; its weights depend on the seed alone."""
    if frames.expression.shape[1] != head.num_expressions:
        raise AvatarError(
            f"{config.data}: frames have {frames.expression.shape[1]} expression coefficients, "
            f"the head model {head.num_expressions}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return PointAvatar(
            config.point_avatar,
            head.with_shape(frames.shape),
            frames.expression.mean(0),
            frames.expression.var(0, correction=0),
            keyed_generator(config.seed, "points"),
        )


def load_avatar(folder: Path, config: RunConfig, head: HeadModel) -> PointAvatar:
    """The trained avatar of a run."""
    checkpoint = trained_checkpoint(folder, STAGE)
    avatar = PointAvatar(
        config.point_avatar,
        head.with_shape(torch.tensor(checkpoint.values["shape"])),
        checkpoint.tensors["avatar.canonical_expression"],
        checkpoint.tensors["avatar.expression_variance"],
    )
    _restore_avatar(avatar, checkpoint)
    return avatar


def correct_tracking(folder: Path, frames: Frames) -> Frames:
    """The training frames with the tracking that a run's fit has corrected, which its points go with."""
    tensors = below_prefix("tracking", trained_checkpoint(folder, STAGE).tensors)
    return replace(frames, **{name: tensors[f"{name}.weight"].to(frames.images.device) for name in TRACKED})


def learning_rate_factor(config: FitConfig, position: Position) -> float:
    """Decay at a position of the schedule, relative to the base rate."""
    if config.decay == "linear":
        return linear_decay(position.fraction)
    if config.decay == "milestones" and not config.rebuild_optimizer:
        return 0.5 ** sum(position.epoch >= milestone for milestone in MILESTONES)
    return 1.0


def flame_weight(config: FitConfig, epoch: int) -> float:
    return config.flame * 0.5 ** sum(epoch >= halving for halving in config.flame_halvings)


def grow(avatar: PointAvatar, generator: torch.Generator, shrink: float) -> Tensor:
    """Double the points with uniform noise of half a radius either way; returns each point's origin."""
    points = avatar.points.detach()
    noise = (torch.rand(points.shape, generator=generator) - 0.5) * avatar.radius
    avatar.set_points(torch.cat([points, points + noise.to(points.device)]))
    avatar.radius *= shrink
    origin = torch.arange(len(points), device=points.device)
    return torch.cat([origin, origin])


def prune(avatar: PointAvatar) -> Tensor:
    """Drop the points that no frame of the last epoch saw; returns each remaining point's origin."""
    kept = avatar.visible.nonzero()[:, 0]
    if not len(kept):
        raise AvatarError("no frame shows any of the points: check the data set's world_mat and intrinsics")
    avatar.set_points(avatar.points.detach()[kept])
    return kept


class Fit(Stage):
    """Model, optimisers and position of one fitting run."""

    name = STAGE

    def __init__(self, config: RunConfig, avatar: PointAvatar, frames: Frames, device: torch.device):
        self.config, self.frames = config, frames
        self.avatar = avatar.to(device)
        self.tracking = Tracking(frames).to(device)
        self.device = device
        self.position = Position(batch_points=avatar.num_points)
        self.optimizer = self._build_optimizer()
        self.tracking_optimizer = torch.optim.SparseAdam(
            list(self.tracking.parameters()), lr=config.fit.tracking_rate
        )
        self.perceptual = perceptual_to_frames("fit.vgg", config.fit.vgg, config.fit.vgg_size, config, frames)

    def _build_optimizer(self) -> torch.optim.Adam:
        fit, avatar = self.config.fit, self.avatar
        networks = [*avatar.sdf.parameters(), *avatar.texture.parameters()]
        groups = [
            parameter_group([avatar.points], fit.point_rate),
            parameter_group(networks, fit.rate),
            parameter_group(list(avatar.deformer.parameters()), fit.deformer_rate),
        ]
        return torch.optim.Adam(groups, fused=True)

    def _points_replaced(self, origin: Tensor, rebuild: bool) -> None:
        """Point the optimiser at the new points, with the moments of the points they come from."""
        if rebuild:
            self.optimizer = self._build_optimizer()
            return
        group = self.optimizer.param_groups[0]
        state = self.optimizer.state.pop(group["params"][0], {})
        group["params"][0] = self.avatar.points
        if state:
            moved = {key: value[origin] for key, value in state.items() if value.dim()}
            self.optimizer.state[self.avatar.points] = state | moved

    def start_epoch(self) -> None:
        """Prune and grow as the schedule says."""
        fit, epoch, avatar = self.config.fit, self.position.epoch, self.avatar
        may_prune = fit.prune_from is not None and epoch >= fit.prune_from
        if (
            may_prune
            and (fit.prune_until is None or epoch <= fit.prune_until)
            and avatar.radius >= fit.prune_radius
        ):
            self._points_replaced(prune(avatar), fit.rebuild_optimizer)
        if fit.grow_epochs is None:
            due = epoch > 0 and epoch % fit.grow_every == 0
        else:
            due = epoch in fit.grow_epochs
        if due and avatar.num_points <= fit.max_points // 2:
            origin = grow(avatar, keyed_generator(self.config.seed, "grow", epoch), fit.grow_shrink)
            self._points_replaced(origin, fit.rebuild_optimizer)
            self.position.batch_points = avatar.num_points
        avatar.visible.zero_()

    def finished(self) -> bool:
        return self.position.epoch >= self.config.fit.epochs

    @property
    def steps_done(self) -> int:
        return self.position.step

    def counts(self) -> dict[str, int]:
        return {"points": self.avatar.num_points}

    def preview(self) -> Tensor:
        index = torch.zeros(1, dtype=torch.int64, device=self.device)
        expression, pose, translation = self.tracking(index)
        return self.avatar(expression, pose, self.frames.camera(index, translation))[1].image

    def total_steps(self) -> int:
        """Steps of the whole run if the batch stayed as it is."""
        fit, position = self.config.fit, self.position
        per_epoch = fit.steps_per_epoch
        if per_epoch is None:
            per_epoch = math.ceil(len(self.frames) / batch_size(fit, position.batch_points))
        return position.step - position.epoch_steps + (fit.epochs - position.epoch) * per_epoch

    def step(self) -> dict[str, Tensor]:
        """One optimisation step; returns the losses."""
        fit, position = self.config.fit, self.position
        if position.epoch_steps == 0:
            self.start_epoch()
        count = batch_size(fit, position.batch_points)
        if fit.steps_per_epoch is None:
            count = min(count, len(self.frames) - position.epoch_drawn)
        index = draw_batch(self.config.seed, position.drawn, count, len(self.frames)).to(self.device)
        terms = self._losses(index)
        self.optimizer.zero_grad(set_to_none=True)
        self.tracking_optimizer.zero_grad(set_to_none=True)
        terms["total"].backward()
        set_rates(self.optimizer, learning_rate_factor(fit, position))
        self.optimizer.step()
        if fit.tracking_from is not None and position.epoch >= fit.tracking_from:
            self.tracking_optimizer.step()
        self._advance(count)
        return {name: value.detach() for name, value in terms.items()}

    def _losses(self, index: Tensor) -> dict[str, Tensor]:
        fit, position, avatar = self.config.fit, self.position, self.avatar
        frames = self.frames
        expression, pose, translation = self.tracking(index)
        points, splats = avatar(expression, pose, frames.camera(index, translation))
        avatar.note_visible(splats)
        target = frames.image(index)
        near = losses.eikonal_samples(
            avatar,
            points.sdf_gradient,
            fit.eikonal_samples,
            keyed_generator(self.config.seed, "eikonal", position.step),
        )
        terms = {
            "rgb": fit.rgb * losses.rgb(splats.image, target),
            "mask": fit.mask * losses.mask(splats.mask, frames.matte(index)),
            "surface": fit.surface * losses.surface(points.sdf),
            "eikonal": fit.eikonal * losses.eikonal(near),
            "flame": flame_weight(fit, position.epoch) * losses.flame(avatar, points.fields),
        }
        if self.perceptual and position.epoch >= fit.vgg_from and position.step % fit.vgg_every == 0:
            terms["vgg"] = fit.vgg * fit.vgg_every * self.perceptual(splats.image, index)
        terms["total"] = torch.stack(list(terms.values())).sum()
        return terms

    def _advance(self, count: int) -> None:
        fit, position = self.config.fit, self.position
        position.step += 1
        position.drawn += count
        position.epoch_steps += 1
        position.epoch_drawn += count
        if fit.steps_per_epoch is None:
            within = position.epoch_drawn / len(self.frames)
        else:
            within = position.epoch_steps / fit.steps_per_epoch
        if within >= 1:
            position.epoch, position.epoch_steps, position.epoch_drawn, within = position.epoch + 1, 0, 0, 0.0
        position.fraction = (position.epoch + within) / fit.epochs

    def checkpoint(self) -> Checkpoint:
        tensors = with_prefix("avatar", self.avatar.state_dict())
        tensors |= with_prefix("tracking", self.tracking.state_dict())
        moments, numbers = pack_optimizer("optimizer", self.optimizer)
        sparse_moments, sparse_numbers = pack_optimizer("tracking_optimizer", self.tracking_optimizer)
        values = {
            "position": vars(self.position),
            "radius": self.avatar.radius,
            "shape": self.frames.shape.tolist(),
            "optimizer": numbers,
            "tracking_optimizer": sparse_numbers,
        }
        return Checkpoint(STAGE, self.position.step, tensors | moments | sparse_moments, values)

    def restore(self, checkpoint: Checkpoint) -> None:
        _restore_avatar(self.avatar, checkpoint)
        self.avatar.to(self.device)
        self.tracking.load_state_dict(below_prefix("tracking", checkpoint.tensors))
        self.optimizer = self._build_optimizer()
        tensors = {name: value.to(self.device) for name, value in checkpoint.tensors.items()}
        unpack_optimizer("optimizer", self.optimizer, tensors, checkpoint.values["optimizer"])
        sparse = checkpoint.values["tracking_optimizer"]
        unpack_optimizer("tracking_optimizer", self.tracking_optimizer, tensors, sparse)
        self.position = Position(**checkpoint.values["position"])


def _restore_avatar(avatar: PointAvatar, checkpoint: Checkpoint) -> None:
    state = below_prefix("avatar", checkpoint.tensors)
    avatar.set_points(state["points"])
    avatar.load_state_dict(state)
    avatar.radius = checkpoint.values["radius"]


def fit(
    config: RunConfig,
    head: HeadModel,
    frames: Frames,
    folder: Path,
    device: torch.device,
    should_stop: Callable[[], bool] = lambda: False,
) -> PointAvatar:
    """Fit a point avatar, going on from the run folder's last checkpoint.

    Raises:
        Stopped: `should_stop` said so; the state is saved.
    """
    frames = frames.to(device)
    run = Fit(config, create_avatar(config, head, frames.to(torch.device("cpu"))), frames, device)
    run_stage(run, config.fit, folder, should_stop)
    return run.avatar


def draw_avatar(avatar: PointAvatar) -> Callable[[Tensor, Tensor, Camera], Tensor]:
    def draw(expression: Tensor, pose: Tensor, camera: Camera) -> Tensor:
        return avatar(expression, pose, camera)[1].image

    return draw
