"""The command line; config.py holds the sub-commands' options."""

import os
import signal
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from avatar.animate import render
from avatar.checkpoint import write_json
from avatar.commands import DemoCommand, EfficiencyCommand, EvaluateCommand, RenderCommand, TrainCommand
from avatar.config import STAGES
from avatar.efficiency import (
    EFFICIENCY,
    Subject,
    efficiency_table,
    parts_table,
    report,
    subject_of_preset,
    subject_of_run,
)
from avatar.errors import AvatarError, Stopped
from avatar.evaluate import METRICS, Evaluation, write_comparison
from avatar.measurement import measure_all
from avatar.presets import make_config
from avatar.reporting import console
from avatar.run import EMBEDDED, Run, evaluate, read_config, train

PICTURE = "demo.png"
MODEL_LABELS = {
    "point_avatar": "point avatar",
    "teacher": "teacher",
    "student": "student",
    "full": "full method",
}
SHOWN = ("point_avatar", "student", "full")


def run_train(command: TrainCommand) -> None:
    wanted = parse_stages(command.stages)
    config = make_config(str(command.data.resolve()), command.preset, command.seed, command.set)
    with stop_on_signal() as should_stop:
        train(Run(command.out, config, choose_device(command.device)), wanted, should_stop)
    print(f"trained {', '.join(wanted)}: {command.out}")


def run_evaluate(command: EvaluateCommand) -> None:
    config = read_config(command.run)
    if command.data is not None:
        config = replace(config, data=str(command.data))
    evaluations, _ = evaluate(Run(command.run, config, choose_device(command.device)), command.split)
    print_table(evaluations, command.split)
    print(f"wrote {command.run / METRICS}")


def run_render(command: RenderCommand) -> None:
    config = read_config(command.run)
    if command.data is not None:
        config = replace(config, data=str(command.data))
    with stop_on_signal() as should_stop:
        path = render(Run(command.run, config, choose_device(command.device)), command, should_stop)
    print(f"wrote {path}")


def run_efficiency(command: EfficiencyCommand) -> None:
    device = choose_device(command.device)
    if command.run is None:
        config = make_config(EMBEDDED, command.preset or "paper", 0, command.set)
        subject = subject_of_preset(config, command.points, command.size)
        folder = Path()
    elif command.preset or command.set:
        raise AvatarError("--preset and --set: a run has a configuration of its own")
    else:
        run = Run(command.run, read_config(command.run), device)
        subject = subject_of_run(run, command.points, command.size)
        folder = command.run
    report_efficiency(subject, folder, device, measure=command.measure)


def report_efficiency(subject: Subject, folder: Path, device: torch.device, *, measure: bool = True) -> None:
    """Write efficiency.json into `folder` and print its tables."""
    path = folder / EFFICIENCY
    if not os.access(folder, os.W_OK):
        raise AvatarError(f"{path}: the folder cannot be written to")
    content = report(subject, measure_all(subject, device) if measure else {})
    write_json(path, content)
    tables = Console(highlight=False)
    tables.print(parts_table(content), efficiency_table(content))
    if subject.is_stand_in:
        print("head: the embedded one with FLAME's 36 pose correctives, all zero")
    print(f"wrote {path}")


def run_demo(command: DemoCommand) -> None:
    config = make_config(EMBEDDED, "small", command.seed, command.set)
    run = Run(command.out, config, choose_device(command.device))
    with stop_on_signal() as should_stop:
        train(run, STAGES, should_stop)
    evaluations, truth = evaluate(run, "test")
    rows = {"truth": truth}
    rows |= {MODEL_LABELS[name]: evaluations[name].images for name in SHOWN if name in evaluations}
    write_comparison(command.out / PICTURE, rows)
    print_table(evaluations, "test")
    report_efficiency(subject_of_run(run), command.out, run.device)
    print(f"wrote {command.out / METRICS} and {command.out / PICTURE}")


COMMANDS = {
    "demo": (DemoCommand, run_demo),
    "train": (TrainCommand, run_train),
    "evaluate": (EvaluateCommand, run_evaluate),
    "render": (RenderCommand, run_render),
    "efficiency": (EfficiencyCommand, run_efficiency),
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
    except (Stopped, KeyboardInterrupt) as stop:
        console.print(str(stop) or "stopped; the same command goes on from here")
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
