"""The command line; config.py holds the sub-commands' options."""

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from avatar.camera import Camera
from avatar.checkpoint import write_json
from avatar.commands import DemoCommand, EvaluateCommand, TrainCommand
from avatar.config import STAGES, RunConfig
from avatar.data import load_frames
from avatar.errors import AvatarError, Stopped
from avatar.evaluate import METRICS, Evaluation, evaluate_model, write_comparison, write_metrics
from avatar.head import HeadModel, embedded_head, load_head
from avatar.presets import differences, from_json, make_config, to_json
from avatar.reporting import console
from avatar.stages import fit as fit_stage

EMBEDDED = "embedded"
EMBEDDED_SUBJECT = Path(__file__).parent / "assets" / "subject"
CONFIG = "config.json"
PICTURE = "demo.png"
MODEL_LABELS = {"point_avatar": "point avatar"}


def run_train(command: TrainCommand) -> None:
    wanted = parse_stages(command.stages)
    config = make_config(str(command.data.resolve()), command.preset, command.seed, command.set)
    train(config, command.out, wanted, choose_device(command.device))
    print(f"trained {', '.join(wanted)}: {command.out}")


def run_evaluate(command: EvaluateCommand) -> None:
    config = read_config(command.run)
    if command.data is not None:
        config = replace(config, data=str(command.data))
    evaluations, _ = evaluate(config, command.run, command.split, choose_device(command.device))
    print_table(evaluations, command.split)
    print(f"wrote {command.run / METRICS}")


def run_demo(command: DemoCommand) -> None:
    device = choose_device(command.device)
    config = make_config(EMBEDDED, "small", command.seed, command.set)
    train(config, command.out, STAGES, device)
    evaluations, truth = evaluate(config, command.out, "test", device)
    rows = {"truth": truth}
    rows |= {MODEL_LABELS[name]: evaluation.images for name, evaluation in evaluations.items()}
    write_comparison(command.out / PICTURE, rows)
    print_table(evaluations, "test")
    print(f"wrote {command.out / METRICS} and {command.out / PICTURE}")


COMMANDS = {
    "demo": (DemoCommand, run_demo),
    "train": (TrainCommand, run_train),
    "evaluate": (EvaluateCommand, run_evaluate),
}


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
    return EMBEDDED_SUBJECT if config.data == EMBEDDED else Path(config.data)


def head_of(config: RunConfig) -> HeadModel:
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
    avatar = fit_stage.load_avatar(folder, config, head_of(config)).to(device)
    frames = load_frames(data_folder(config), split, config.size).to(device)

    def draw(expression: torch.Tensor, pose: torch.Tensor, camera: Camera) -> torch.Tensor:
        return avatar(expression, pose, camera)[1].image

    evaluations = {"point_avatar": evaluate_model(draw, frames, config.evaluate)}
    write_metrics(folder, split, len(frames), evaluations)
    return evaluations, frames.image(torch.arange(len(frames), device=device)).cpu()


def print_table(evaluations: dict[str, Evaluation], split: str) -> None:
    table = Table(title=f"held-out frames ({split})" if split == "test" else f"{split} frames")
    table.add_column("model")
    for name in ("L1", "LPIPS", "SSIM", "PSNR"):
        table.add_column(name, justify="right")
    for name, evaluation in evaluations.items():
        for label, values in (
            (MODEL_LABELS[name], evaluation.values),
            ("  no cloth", evaluation.values["no_cloth"]),
        ):
            if values is not None:
                cells = [(values["l1"], 4), (values["lpips"], 4), (values["ssim"], 4), (values["psnr"], 2)]
                table.add_row(
                    label, *("-" if value is None else f"{value:.{digits}f}" for value, digits in cells)
                )
    Console(highlight=False).print(table)


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
    command = tyro.extras.subcommand_cli_from_dict(
        {name: kind for name, (kind, _) in COMMANDS.items()},
        prog="avatar",
        description="Head avatars from monocular video.",
        args=arguments,
    )
    run = next(run for kind, run in COMMANDS.values() if isinstance(command, kind))
    try:
        run(command)
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
