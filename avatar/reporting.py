"""What a run shows while it works: a progress bar, tensorboard scalars and pictures."""

import logging
from io import BytesIO
from pathlib import Path
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.functional import to_pil_image

from avatar.checkpoint import write_bytes

LOSSES_EVERY = 10
# Errors and progress; standard output is for results.
console = Console(stderr=True, highlight=False)


class Reporter:
    """Reports of one stage of a run, into RUN/tensorboard and RUN/images.

    Args:
        stage: prefix of every name.   folder: the run.   step: where the stage goes on from.
    """

    def __init__(self, stage: str, folder: Path, step: int):
        self.stage, self.images = stage, folder / "images"
        logging.getLogger("tensorboard").setLevel(logging.ERROR)
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step or None)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
            console=console,
        )
        self.task = self.bar.add_task(stage, completed=step, total=None, losses="")

    def __enter__(self) -> "Reporter":
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()
        self.writer.close()

    def progress(self, step: int, total: int, terms: dict[str, Tensor], counts: dict[str, int]) -> None:
        self.bar.update(self.task, completed=step, total=total)
        if step % LOSSES_EVERY == 0:
            shown = [f"{name} {value.item():.4f}" for name, value in terms.items()]
            shown += [f"{name} {value}" for name, value in counts.items()]
            self.bar.update(self.task, losses="  ".join(shown))

    def scalars(self, step: int, terms: dict[str, Tensor]) -> None:
        for name, value in terms.items():
            self.writer.add_scalar(f"{self.stage}/{name}", value.item(), step)

    def image(self, step: int, *columns: Tensor) -> None:
        """Save (1, 3, H, W) pictures side by side."""
        picture = torch.cat([column[0].cpu() for column in columns], -1)
        write_png(self.images / f"{self.stage}-{step:07d}.png", picture)
        self.writer.add_image(f"{self.stage}/truth and rendering", picture.clamp(0, 1), step)


def write_png(path: Path, image: Tensor) -> None:
    """Save (3, H, W) in [0, 1]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    content = BytesIO()
    to_pil_image(pixels).save(content, format="PNG")
    write_bytes(path, content.getvalue())
