"""Options of the sub-commands."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from avatar.config import STAGES, Preset


@dataclass
class Common:
    seed: int = 0
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU where there is one."""
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """Change options of the preset, for example --set fit.epochs=4 fit.vgg=0."""
    debug: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show the traceback of an error."""


@dataclass
class TrainCommand(Common):
    """Train on a data set in the PointAvatar layout; the same command goes on after a stop."""

    data: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DATA")] = field(kw_only=True)
    """Folder that holds SUBJECT/SUBJECT/VIDEO/flame_params.json."""
    out: Path = field(kw_only=True)
    """Run folder."""
    stages: str = ",".join(STAGES)
    """Stages to run, separated by commas."""
    preset: Preset = "small"
    """small fits two CPU cores in minutes; paper has the published sizes and schedule."""


@dataclass
class EvaluateCommand:
    """L1, LPIPS, SSIM and PSNR of every trained model on held-out frames; writes metrics.json."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    split: Literal["test", "train"] = "test"
    data: Path | None = None
    """Where the data set is now, if it has moved since training."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU where there is one."""
    debug: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show the traceback of an error."""


@dataclass
class RenderCommand:
    """Animate the avatar of a run: --drive DATA, --turntable, --expression NAME=VALUE ..., or the last two.

    With --drive and --turntable the result is a film, with --expression alone a picture.
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    drive: Annotated[Path | None, tyro.conf.arg(metavar="DATA")] = None
    """Let the frames of a data set in the PointAvatar layout drive expression, pose and camera; "embedded" is
    the one that comes with the package."""
    split: Literal["test", "train"] = "test"
    """Which frames drive."""
    compare: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show the true frame to the left of each driven one."""
    turntable: tyro.conf.FlagCreatePairsOff[bool] = False
    """Turn the avatar once round its vertical axis."""
    degrees: float | None = None
    """Let the turntable swing to this angle on either side instead."""
    frames: int = 100
    """Of the turntable."""
    fps: int = 25
    """Frames per second of a film."""
    expression: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """Coefficients of the head's expressions (expression_0, ... where it has no names), the others as in the mean
    training frame; and, in degrees, jaw (open), yaw, gaze_x (to the right of the picture), pitch, gaze_y (up),
    roll (clockwise)."""
    model: Literal["full", "student", "teacher", "point_avatar"] | None = None
    """Which model draws; otherwise the first of these that is trained."""
    size: int | None = None
    """Pixels of the picture's sides; the full method has only the size that it was trained at."""
    out: Path | None = None
    """The .mp4 or .png file; otherwise RUN/renders/ and drive.mp4, turntable.mp4 or expression.png."""
    data: Path | None = None
    """Where the run's training data is now, if it has moved."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU where there is one."""
    debug: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show the traceback of an error."""


@dataclass
class EfficiencyCommand:
    """Parameters, MACs, FLOPs, peak memory and milliseconds of every network; writes efficiency.json."""

    run: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="RUN")] = None
    """Run folder; without one, the networks of a preset with a head of FLAME's sizes."""
    points: int | None = None
    """By default the run's own, or 400000 for the preset paper."""
    size: int | None = None
    """Side of the image in pixels; by default the run's or the preset's own."""
    measure: bool = True
    """Measure memory and time; else only count."""
    preset: Preset | None = None
    """Without a run: whose networks; by default paper."""
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """Without a run: change options of the preset."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU where there is one."""
    debug: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show the traceback of an error."""


@dataclass
class DemoCommand(Common):
    """The whole method, small, on the subject that comes with the package."""

    out: Path = Path("runs/demo")
    """Run folder."""
