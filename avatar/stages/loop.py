"""What every training stage shares: the loop with its checkpoints and reports, batches, decay."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from avatar.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from avatar.config import ReportConfig, RunConfig, ScheduleConfig
from avatar.data import Frames
from avatar.errors import AvatarError, Stopped
from avatar.imagenet_weights import WeightsUnavailable
from avatar.perceptual import VggLoss
from avatar.random import keyed_generator
from avatar.reporting import Reporter


class Stage(ABC):
    """A stage in training. All it draws and schedules follows from the seed and its step."""

    name: str
    frames: Frames

    @property
    @abstractmethod
    def steps_done(self) -> int: ...

    @abstractmethod
    def total_steps(self) -> int: ...

    @abstractmethod
    def step(self) -> dict[str, Tensor]:
        """One optimisation step; returns the losses."""

    @abstractmethod
    def preview(self) -> Tensor:
        """The first training frame as it is drawn now: (1, 3, H, W)."""

    @abstractmethod
    def checkpoint(self) -> Checkpoint: ...

    @abstractmethod
    def restore(self, checkpoint: Checkpoint) -> None: ...

    def finished(self) -> bool:
        return self.steps_done >= self.total_steps()

    def counts(self) -> dict[str, int]:
        """Numbers to show beside the losses."""
        return {}


def run_stage(stage: Stage, reports: ReportConfig, folder: Path, should_stop: Callable[[], bool]) -> None:
    """Train to the end, going on from the run folder's last checkpoint of the stage.

    Raises:
        Stopped: `should_stop` said so; the state is saved.
    """
    checkpoints = folder / "checkpoints"
    found = latest_checkpoint(checkpoints, stage.name)
    if found:
        stage.restore(found)
    elif stage.finished():
        save(stage, checkpoints)  # a stage of no steps is what it starts from
    with Reporter(stage.name, folder, stage.steps_done) as report:
        while not stage.finished():
            if should_stop():
                save(stage, checkpoints)
                raise Stopped
            terms = stage.step()
            step = stage.steps_done
            report.progress(step, stage.total_steps(), terms, stage.counts())
            if step % reports.log_every == 0:
                report.scalars(step, terms)
            if step % reports.image_every == 0:
                with torch.no_grad():
                    report.image(step, stage.frames.image(torch.tensor([0])), stage.preview())
            if step % reports.checkpoint_every == 0 or stage.finished():
                save(stage, checkpoints)


def save(stage: Stage, checkpoints: Path) -> None:
    checkpoint = stage.checkpoint()
    checkpoint.values["finished"] = stage.finished()
    save_checkpoint(checkpoints, checkpoint)


def trained_checkpoint(folder: Path, stage: str) -> Checkpoint:
    """The last checkpoint a stage has left in a run folder.

    Raises:
        AvatarError: there is none.
    """
    checkpoint = latest_checkpoint(folder / "checkpoints", stage)
    if checkpoint is None:
        raise AvatarError(f"{folder}: holds no checkpoint of the stage '{stage}'; train it first")
    return checkpoint


class FrameCache:
    """Keeps what is computed of each frame by parts that do not change, as far as memory allows.

    Args:
        gigabytes: kept at most; frames beyond are computed again each time.
    """

    def __init__(self, gigabytes: float):
        self.left = gigabytes * 1e9
        self.entries: dict[int, dict[str, Tensor]] = {}

    def batch(self, index: Tensor, make: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Entries of frames (B,), joined; `make` computes that of a frame (1,), tensors of batch size 1."""
        entries = [self._entry(frame, make) for frame in index.split(1)]
        if len(entries) == 1:
            return entries[0]
        return {name: torch.cat([entry[name] for entry in entries]) for name in entries[0]}

    def _entry(self, frame: Tensor, make: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
        found = self.entries.get(int(frame))
        if found is None:
            found = make(frame)
            size = sum(tensor.nbytes for tensor in found.values())
            if size <= self.left:
                self.left -= size
                self.entries[int(frame)] = found
        return found


def draw_batch(seed: int, drawn: int, count: int, frames: int, purpose: str = "frames") -> Tensor:
    """The next `count` frames of an endless row of shuffled passes, of which `drawn` are gone."""
    index = []
    for place in range(drawn, drawn + count):
        turn, within = divmod(place, frames)
        order = torch.randperm(frames, generator=keyed_generator(seed, purpose, turn))
        index.append(order[within])
    return torch.stack(index)


def batch_size(schedule: ScheduleConfig, points: int) -> int:
    return max(1, min(schedule.batch_pixels // points, schedule.batch_max))


def schedule_steps(schedule: ScheduleConfig, points: int, frames: int) -> int:
    per_epoch = schedule.steps_per_epoch
    if per_epoch is None:
        per_epoch = math.ceil(frames / batch_size(schedule, points))
    return schedule.epochs * per_epoch


def linear_decay(fraction: float, start: float = 0.5) -> float:
    """1 up to the fraction `start` of the schedule, then falling to a tenth."""
    return 1 - 0.9 * max(0.0, (fraction - start) / (1 - start))


def set_training(module: nn.Module, batch_statistics: bool) -> None:
    """Training mode; batch normalisation goes by its running statistics unless told otherwise."""
    module.train()
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.train(batch_statistics)


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["base_rate"] * factor


def parameter_group(parameters: list[Tensor], rate: float) -> dict:
    """An optimiser's group that `set_rates` can scale."""
    return {"params": parameters, "lr": rate, "base_rate": rate}


def with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def below_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    start = f"{prefix}."
    return {name[len(start) :]: value for name, value in tensors.items() if name.startswith(start)}


def perceptual_loss(option: str, weight: float, size: int | None, device: torch.device) -> VggLoss | None:
    """The perceptual loss, or None where its weight is 0; `option` names the weight."""
    if weight == 0:
        return None
    try:
        return VggLoss(size=size).to(device)
    except WeightsUnavailable as error:
        raise AvatarError(f"{error}; or train without the perceptual loss: --set {option}=0") from error


class PerceptualToFrames:
    """The perceptual loss to training frames, whose features are kept as far as memory allows."""

    def __init__(self, loss: VggLoss, frames: Frames, gigabytes: float):
        self.loss, self.frames, self.cache = loss, frames, FrameCache(gigabytes)

    def __call__(self, image: Tensor, index: Tensor) -> Tensor:
        """The loss of images (B, 3, H, W) to the frames `index` (B,)."""
        return self.loss(image, list(self.cache.batch(index, self._features).values()))

    def _features(self, frame: Tensor) -> dict[str, Tensor]:
        return numbered("tap", self.loss.target_features(self.frames.image(frame)))


def perceptual_to_frames(
    option: str, weight: float, size: int | None, config: RunConfig, frames: Frames
) -> PerceptualToFrames | None:
    """As perceptual_loss, to the training frames."""
    loss = perceptual_loss(option, weight, size, frames.images.device)
    return None if loss is None else PerceptualToFrames(loss, frames, config.cache_gigabytes)


def numbered(name: str, tensors: list[Tensor]) -> dict[str, Tensor]:
    return {f"{name}.{index}": tensor for index, tensor in enumerate(tensors)}
