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
class DemoCommand(Common):
    """The whole method, small, on the subject that comes with the package."""

    out: Path = Path("runs/demo")
    """Run folder."""
