"""A run folder: its configuration, its stages in order and its trained models."""

import functools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from avatar.checkpoint import latest_checkpoint, list_checkpoints, write_json
from avatar.config import STAGES, RunConfig
from avatar.data import Frames, load_frames
from avatar.errors import AvatarError
from avatar.evaluate import Draw, Evaluation, evaluate_model, write_metrics
from avatar.head import HeadModel, embedded_head, load_head
from avatar.models.discriminator import discriminator_resolutions
from avatar.models.generator import generator_resolutions
from avatar.models.pyramid import channels
from avatar.models.renderer import Renderer
from avatar.presets import differences, from_json, to_json
from avatar.stages.adversarial import draw_full, load_renderer, train_adversarial
from avatar.stages.distill import StudentModel, distill, draw_student, load_student
from avatar.stages.fit import correct_tracking, draw_avatar, fit, load_avatar
from avatar.stages.teacher import NearestFrames, branch_images, draw_teacher, load_teacher, train_teacher

EMBEDDED = "embedded"
EMBEDDED_SUBJECT = Path(__file__).parent / "assets" / "subject"
CONFIG = "config.json"
TRAINERS = dict(zip(STAGES, (fit, train_teacher, distill, train_adversarial), strict=True))


@dataclass
class Run:
    """A run folder and what it was, or is to be, trained with."""

    folder: Path
    config: RunConfig
    device: torch.device

    def head(self) -> HeadModel:
        return configured_head(self.config)

    def frames(self, split: str) -> Frames:
        config = self.config
        return load_frames(
            data_root(config.data),
            split,
            config.size,
            enhanced=split == "train" and config.teacher.image == "enhanced",
        )

    def stages_done(self) -> list[str]:
        """Stages that have left a checkpoint, in order."""
        return [stage for stage in STAGES if list_checkpoints(self.folder / "checkpoints", stage)]


def data_root(data: str) -> Path:
    """The folder of a data set that is named by its path or as the one that comes with the package."""
    return EMBEDDED_SUBJECT if data == EMBEDDED else Path(data)


def configured_head(config: RunConfig) -> HeadModel:
    return embedded_head() if config.head == EMBEDDED else load_head(Path(config.head))


def read_config(folder: Path) -> RunConfig:
    path = folder / CONFIG
    try:
        return from_json(json.loads(path.read_text()), str(path))
    except (OSError, ValueError) as error:
        raise AvatarError(
            f"{path}: {getattr(error, 'strerror', None) or error} (is {folder} a run folder?)"
        ) from error


def claim_folder(folder: Path, config: RunConfig) -> None:
    """Write the run's config.json, or make sure that the one there says the same."""
    path, content = folder / CONFIG, to_json(config)
    if path.exists():
        found = differences(to_json(read_config(folder)), content)
        if found:
            raise AvatarError(f"{folder}: was trained with another configuration: {'; '.join(found)}")
        return
    if any((folder / "checkpoints").glob("*")):
        raise AvatarError(f"{folder}: holds checkpoints but no {CONFIG} that says what they are of")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, content)
    except OSError as error:
        raise AvatarError(f"--out {folder}: {error.strerror}") from error


def train(run: Run, stages: tuple[str, ...], should_stop: Callable[[], bool] = lambda: False) -> None:
    """Train the stages in order, each going on from its last checkpoint.

    Raises:
        Stopped: `should_stop` said so; the state is saved.
    """
    if "adversarial" in stages:
        check_renderer(run.config)
    frames = run.frames("train")
    claim_folder(run.folder, run.config)
    with reproducible():
        for stage in stages:
            check_stage_before(run.folder, stage)
            TRAINERS[stage](run.config, run.head(), frames, run.folder, run.device, should_stop)


def check_renderer(config: RunConfig) -> None:
    """Find out before all other training that the image networks do not fit the size."""
    try:
        for resolution in generator_resolutions(config.generator, config.size):
            channels(config.generator, resolution)
        for resolution in discriminator_resolutions(config.size):
            channels(config.discriminator, resolution)
    except ValueError as error:
        raise AvatarError(f"size={config.size}: {error}") from error


def check_stage_before(folder: Path, stage: str) -> None:
    """A stage builds on the one before, which must have come to its end."""
    for before in STAGES[: STAGES.index(stage)][-1:]:
        found = latest_checkpoint(folder / "checkpoints", before)
        if found and not found.values["finished"]:
            raise AvatarError(
                f"{folder}: the stage '{before}' ended at step {found.step}, before its end; go on with it first"
            )


def model_loaders(run: Run) -> dict[str, Callable[[], Draw]]:
    """What loads every trained model of a run to draw frames with, by its name in metrics.json."""
    config, folder, device = run.config, run.folder, run.device
    head = run.head()
    done = run.stages_done()
    if "fit" not in done:
        raise AvatarError(f"{folder}: holds no checkpoint of the stage 'fit'; train it first")

    def teacher() -> Draw:
        frames = correct_tracking(folder, run.frames("train")).to(device)
        nearest = NearestFrames(frames, branch_images(frames))
        return draw_teacher(load_teacher(folder, config, head, device), nearest)

    @functools.cache
    def renderer() -> tuple[StudentModel, Renderer]:
        return load_renderer(folder, config, head, device)

    loaders = {"point_avatar": lambda: draw_avatar(load_avatar(folder, config, head).to(device))}
    if "teacher" in done:
        loaders["teacher"] = teacher
    if "adversarial" in done:
        loaders["student"] = lambda: draw_student(renderer()[0])
        loaders["full"] = lambda: draw_full(*renderer())
    elif "distill" in done:
        loaders["student"] = lambda: draw_student(load_student(folder, config, head, device))
    return loaders


def evaluate(run: Run, split: str) -> tuple[dict[str, Evaluation], torch.Tensor]:
    """Evaluate every trained model and write metrics.json; returns the evaluations and the true frames."""
    models = {name: load() for name, load in model_loaders(run).items()}
    frames = run.frames(split).to(run.device)
    options = run.config.evaluate
    evaluations = {name: evaluate_model(draw, frames, options, name) for name, draw in models.items()}
    write_metrics(run.folder, split, len(frames), evaluations)
    return evaluations, frames.image(torch.arange(len(frames), device=run.device)).cpu()


@contextmanager
def reproducible() -> Iterator[None]:
    """Deterministic kernels while training: a resumed run then equals an undisturbed one bit for bit."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
