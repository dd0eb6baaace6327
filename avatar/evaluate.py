"""Render held-out frames and score them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from rich.progress import track
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from avatar import losses, metrics
from avatar.camera import Camera
from avatar.checkpoint import write_bytes, write_json
from avatar.config import EvaluateConfig
from avatar.data import Frames
from avatar.imagenet_weights import WeightsUnavailable
from avatar.reporting import console

METRICS = "metrics.json"
# Draws frames of expression (B, E) and pose (B, 15) as a camera sees them: (B, 3, H, W).
Draw = Callable[[Tensor, Tensor, Camera], Tensor]


@dataclass
class Evaluation:
    """Scores of one model over a split, and its pictures."""

    values: dict[str, Any]  # l1, lpips, ssim, psnr, no_cloth
    images: Tensor  # (F, 3, H, W)


def open_image(images: Tensor) -> Tensor:
    """Erosion, then dilation, by 3 x 3 pixels (B, C, H, W)."""
    return F.max_pool2d(-F.max_pool2d(-images, 3, 1, 1), 3, 1, 1)


def render_frame(draw: Draw, frames: Frames, index: Tensor, config: EvaluateConfig) -> Tensor:
    """One held-out frame as published evaluations see it: refined, in whole 8-bit steps: (1, 3, H, W)."""
    tracked = [getattr(frames, name)[index].clone() for name in ("expression", "pose", "translation")]

    def picture() -> Tensor:
        expression, pose, translation = tracked
        return draw(expression, pose, frames.camera(index, translation))

    if config.refine_steps:
        target = frames.image(index)
        for value in tracked:
            value.requires_grad_(True)
        optimizer = torch.optim.Adam(tracked, lr=config.refine_rate)
        for _ in range(config.refine_steps):
            # A picture by the latent code alone does not depend on the translation.
            gradients = torch.autograd.grad(losses.rgb(picture(), target), tracked, materialize_grads=True)
            for value, gradient in zip(tracked, gradients, strict=True):
                value.grad = gradient
            optimizer.step()
    with torch.no_grad():
        image = picture()
    image = torch.floor(image.clamp(0, 1) * 255) / 255
    return open_image(image) if config.open_image else image


def perceptual_metric(device: torch.device) -> metrics.Lpips | None:
    """LPIPS, or None with a warning where its weights cannot be had."""
    try:
        return metrics.Lpips().to(device)
    except WeightsUnavailable as error:
        console.print(f"[yellow]warning:[/] no LPIPS ({error})")
        return None


def evaluate_model(draw: Draw, frames: Frames, config: EvaluateConfig, label: str = "") -> Evaluation:
    """Mean scores of a model over all frames of a split, whole image and without clothes.

    `no_cloth` is null where the data set has no semantic labels, `lpips` where its weights cannot be had.
    """
    lpips = perceptual_metric(frames.images.device)
    whole: list[dict[str, Tensor]] = []
    no_cloth: list[dict[str, Tensor]] = []
    images = []
    for number in track(range(len(frames)), f"evaluate {label}".strip(), console=console):
        index = torch.tensor([number], device=frames.images.device)
        image, target = render_frame(draw, frames, index, config), frames.image(index)
        images.append(image[0].cpu())
        whole.append(_score(image, target, lpips, None))
        if frames.labels is not None:
            mask = metrics.no_cloth_mask(frames.matte(index), frames.labels[index])
            scores = _score(image, target, lpips, mask)
            # As other scripts have it: errors over the mask's area instead of all pixels.
            for name, metric in (("l1", metrics.l1), ("psnr", metrics.psnr)):
                empty = image.new_full((1,), math.nan)
                score = metric(image, target, mask, denominator="mask") if mask.any() else empty
                scores[f"{name}_by_area"] = score
            no_cloth.append(scores)
    values: dict[str, Any] = _means(whole)
    values["no_cloth"] = _means(no_cloth) if no_cloth else None
    return Evaluation(values, torch.stack(images))


@torch.no_grad()
def _score(
    image: Tensor, target: Tensor, lpips: metrics.Lpips | None, mask: Tensor | None
) -> dict[str, Tensor | None]:
    return {
        "l1": metrics.l1(image, target, mask),
        "lpips": None if lpips is None else lpips(image, target, mask),
        "ssim": metrics.ssim(image, target, mask),
        "psnr": metrics.psnr(image, target, mask),
    }


def _means(rows: list[dict[str, Tensor | None]]) -> dict[str, float | None]:
    means = {}
    for name in rows[0]:
        column = [row[name] for row in rows]
        mean = None if column[0] is None else torch.cat(column).nanmean().item()
        # JSON knows no infinity, which is the PSNR of frames without an error.
        means[name] = mean if mean is not None and math.isfinite(mean) else None
    return means


def write_metrics(folder: Path, split: str, frames: int, models: dict[str, Evaluation]) -> dict[str, Any]:
    """Write metrics.json and return its content."""
    content = {
        "split": split,
        "frames": frames,
        "models": {name: evaluation.values for name, evaluation in models.items()},
    }
    write_json(folder / METRICS, content)
    return content


def write_comparison(path: Path, rows: dict[str, Tensor], columns: int = 8) -> None:
    """A labelled sheet: one row per model (F, 3, H, W), evenly chosen frames beside each other."""
    count, _, height, width = next(iter(rows.values())).shape
    chosen = torch.linspace(0, count - 1, min(columns, count)).round().long()
    font = ImageFont.load_default(max(10, height // 11))
    margin = max(int(font.getlength(name)) for name in rows) + 12
    sheet = Image.new("RGB", (margin + len(chosen) * width, len(rows) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (name, images) in enumerate(rows.items()):
        draw.text((6, (row + 0.5) * height), name, fill="black", font=font, anchor="lm")
        for column, frame in enumerate(chosen.tolist()):
            picture = to_pil_image(images[frame].cpu().clamp(0, 1))
            sheet.paste(picture, (margin + column * width, row * height))
    content = BytesIO()
    sheet.save(content, format="PNG")
    write_bytes(path, content.getvalue())
