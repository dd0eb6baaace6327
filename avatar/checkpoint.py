"""Checkpoints: one safetensors file each, tensors plus a JSON header, never a pickle.

A file is written under a temporary name, flushed to the disk and renamed, so that one that bears its final
name is whole whatever happened to the process.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from avatar.errors import AvatarError

KEPT = 3
HEADER = "avatar"


@dataclass
class Checkpoint:
    stage: str
    step: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]  # anything JSON holds


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file in one step."""
    with replace_file(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Gives a temporary name to write to; what is written there takes the place of `path`, unless it fails."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_json(path: Path, content: Any) -> None:
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write STAGE-STEP.safetensors into `folder` and drop all but the stage's last few."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    header = {"stage": checkpoint.stage, "step": checkpoint.step, "values": checkpoint.values}
    path = folder / f"{checkpoint.stage}-{checkpoint.step:07d}.safetensors"
    write_bytes(path, save(tensors, metadata={HEADER: json.dumps(header)}))
    for old in list_checkpoints(folder, checkpoint.stage)[:-KEPT]:
        old.unlink(missing_ok=True)
    return path


def list_checkpoints(folder: Path, stage: str) -> list[Path]:
    """The stage's checkpoints, oldest first."""
    pattern = re.compile(rf"{re.escape(stage)}-\d+\.safetensors")
    return sorted(path for path in folder.glob(f"{stage}-*") if pattern.fullmatch(path.name))


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> Checkpoint:
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            header = json.loads((file.metadata() or {})[HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise AvatarError(
            f"{path}: not a readable checkpoint ({error}); delete it to use the one before"
        ) from error
    return Checkpoint(header["stage"], header["step"], tensors, header["values"])


def latest_checkpoint(folder: Path, stage: str, device: torch.device | str = "cpu") -> Checkpoint | None:
    paths = list_checkpoints(folder, stage)
    return load_checkpoint(paths[-1], device) if paths else None


def pack_optimizer(
    name: str, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    """An optimiser's state as named tensors, and its plain numbers (JSON)."""
    tensors, numbers = {}, {}
    for index, parameter in enumerate(_parameters(optimizer)):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}.{index}.{key}"] = value
            else:
                numbers.setdefault(str(index), {})[key] = value
    return tensors, numbers


def unpack_optimizer(
    name: str,
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, Tensor],
    numbers: dict[str, dict[str, float]],
) -> None:
    """Restore what `pack_optimizer` took, into an optimiser over the same parameters in the same order."""
    optimizer.state.clear()
    parameters = list(_parameters(optimizer))
    for full, value in tensors.items():
        if full.startswith(f"{name}."):
            index, key = full[len(name) + 1 :].split(".", 1)
            optimizer.state[parameters[int(index)]][key] = value.clone()
    for index, values in numbers.items():
        optimizer.state[parameters[int(index)]].update(values)


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
