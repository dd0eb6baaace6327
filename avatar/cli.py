"""The command line: one dataclass per sub-command."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.markup import escape
from rich.table import Table

from avatar.checkpoint import write_json
from avatar.config import Preset, RunConfig, differences, from_json, make_config, to_json
from avatar.data import load_frames
from avatar.errors import AvatarError, Stopped
from avatar.evaluate import METRICS, Evaluation, evaluate_avatar, write_comparison, write_metrics
from avatar.head import HeadModel, embedded_head, load_head
from avatar.reporting import console
from avatar.stages import fit as fit_stage

STAGES = ("fit",)
EMBEDDED_SUBJECT = Path(__file__).parent / "assets" / "subject"
CONFIG = "config.json"
MODEL_LABELS = {"point_avatar": "point avatar"}


@dataclass
class Common:
    seed: int = 0
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU where there is one."""
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE", name="set")] = ()
    """Change options of the preset, for example --set fit.epochs=4 fit.vgg=0."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass
class Train(Common):
    """Train on a data set in the PointAvatar layout; the same command goes on after a stop."""

    data: tyro.conf.Positional[Path] = field(kw_only=True)
    """Folder that holds SUBJECT/SUBJECT/VIDEO/flame_params.json."""
    out: Path = field(kw_only=True)
    """Run folder."""
    stages: str = ",".join(STAGES)
    """Stages to run, separated by commas, in order."""
    preset: Preset = "small"
    """small fits two CPU cores in minutes; paper has the published sizes and schedule."""

    def run(self) -> None:
        wanted = parse_stages(self.stages)
        config = make_config(str(self.data.resolve()), self.preset, self.seed, self.set)
        train(config, self.out, wanted, choose_device(self.device))
        print(f"trained {', '.join(wanted)}: {self.out}")


@dataclass
class Evaluate:
    """L1, LPIPS, SSIM and PSNR of every trained model on held-out frames; writes metrics.json."""

    run_folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    split: Literal["test", "train"] = "test"
    data: Path | None = None
    """Where the data set is now, if it has moved since training."""
    device: str = "auto"
    debug: bool = False
    """Show the traceback of an error."""

    def run(self) -> None:
        config = read_config(self.run_folder)
        if self.data is not None:
            config = replace(config, data=str(self.data))
        evaluations, _ = evaluate(config, self.run_folder, self.split, choose_device(self.device))
        print_table(evaluations, self.split)
        print(f"wrote {self.run_folder / METRICS}")


@dataclass
class Demo(Common):
    """The whole method, small, on the subject that comes with the package."""

    out: Path = Path("runs/demo")
    """Run folder."""

    def run(self) -> None:
        device = choose_device(self.device)
        config = make_config("embedded", "small", self.seed, self.set)
        train(config, self.out, STAGES, device)
        evaluations, truth = evaluate(config, self.out, "test", device)
        rows = {"truth": truth}
        rows |= {MODEL_LABELS[name]: evaluation.images for name, evaluation in evaluations.items()}
        write_comparison(self.out / "demo.png", rows)
        print_table(evaluations, "test")
        print(f"wrote {self.out / METRICS} and {self.out / 'demo.png'}")


def parse_stages(text: str) -> tuple[str, ...]:
    wanted = tuple(name.strip() for name in text.split(","))
    for name in wanted:
        if name not in STAGES:
            raise AvatarError(f"--stages {text}: no stage '{name}' (stages: {', '.join(STAGES)})")
    return tuple(name for name in STAGES if name in wanted)


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise AvatarError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def data_folder(config: RunConfig) -> Path:
    return EMBEDDED_SUBJECT if config.data == "embedded" else Path(config.data)


def head_of(config: RunConfig) -> HeadModel:
    return embedded_head() if config.head == "embedded" else load_head(Path(config.head))


def read_config(folder: Path) -> RunConfig:
    import json

    path = folder / CONFIG
    try:
        return from_json(json.loads(path.read_text()), str(path))
    except (OSError, ValueError) as error:
        raise AvatarError(f"{path}: {getattr(error, 'strerror', None) or error} (is {folder} a run folder?)") from error


def claim_folder(folder: Path, config: RunConfig) -> None:
    """Write the run's config.json, or make sure that the one there says the same."""
    path, content = folder / CONFIG, to_json(config)
    if path.exists():
        found = differences(to_json(read_config(folder)), content)
        if found:
            raise AvatarError(f"{folder}: was trained with another configuration: {'; '.join(found)}")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, content)
    except OSError as error:
        raise AvatarError(f"--out {folder}: {error.strerror}") from error


def train(config: RunConfig, folder: Path, stages: tuple[str, ...], device: torch.device) -> None:
    frames = load_frames(data_folder(config), "train", config.size)
    claim_folder(folder, config)
    with stop_on_signal() as should_stop, reproducible():
        if "fit" in stages:
            fit_stage.fit(config, head_of(config), frames, folder, device, should_stop)


def evaluate(
    config: RunConfig, folder: Path, split: str, device: torch.device
) -> tuple[dict[str, Evaluation], torch.Tensor]:
    """Evaluate every trained model of a run; returns the evaluations and the true frames."""
    training = load_frames(data_folder(config), "train", config.size)
    frames = training if split == "train" else load_frames(data_folder(config), split, config.size)
    avatar = fit_stage.load_avatar(folder, config, head_of(config), training).to(device)
    frames = frames.to(device)
    evaluations = {"point_avatar": evaluate_avatar(avatar, frames, config.evaluate)}
    write_metrics(folder, split, len(frames), evaluations)
    return evaluations, frames.image(torch.arange(len(frames), device=device)).cpu()


def print_table(evaluations: dict[str, Evaluation], split: str) -> None:
    table = Table(title=f"held-out frames ({split})" if split == "test" else f"{split} frames")
    table.add_column("model")
    for name in ("L1", "LPIPS", "SSIM", "PSNR"):
        table.add_column(name, justify="right")
    for name, evaluation in evaluations.items():
        for label, values in ((MODEL_LABELS[name], evaluation.values), ("  no cloth", evaluation.values["no_cloth"])):
            if values is not None:
                cells = [(values["l1"], 4), (values["lpips"], 4), (values["ssim"], 4), (values["psnr"], 2)]
                table.add_row(label, *("-" if value is None else f"{value:.{digits}f}" for value, digits in cells))
    from rich.console import Console

    Console(highlight=False).print(table)


@contextmanager
def reproducible() -> Iterator[None]:
    """Deterministic kernels while training: a resumed run then equals an undisturbed one bit for bit."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def stop_on_signal():
    """Turn the first Ctrl-C or SIGTERM into a request to stop after the step; a second one ends at once."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    commands = {"demo": Demo, "train": Train, "evaluate": Evaluate}
    command = tyro.extras.subcommand_cli_from_dict(
        commands, prog="avatar", description="Head avatars from monocular video.", args=arguments
    )
    try:
        command.run()
    except AvatarError as error:
        return fail(str(error), command.debug)
    except (Stopped, KeyboardInterrupt):
        console.print("stopped; the same command goes on from here")
        return 130
    except Exception as error:
        return fail(f"{type(error).__name__}: {error}", command.debug)
    return 0


def fail(message: str, debug: bool) -> int:
    if debug:
        console.print_exception()
    line = " ".join(message.split())
    console.print(f"[red]error:[/] {escape(line)}", soft_wrap=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
