"""Reader of the PointAvatar dataset layout.

ROOT/SUBJECT/SUBJECT/VIDEO/{image,mask,semantic,enhanced}/K.png    (K from 1; the last two are optional)
ROOT/SUBJECT/SUBJECT/VIDEO/flame_params.json
    frames: [{file_path "./image/K", world_mat 3 x 4, expression, pose 15, bbox 4, flame_keypoints}]
    intrinsics [-f_x, f_y, c_x, c_y] relative to the image, shape_params
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from avatar.camera import Camera
from avatar.errors import AvatarError

PARAMETERS = "flame_params.json"
PUBLISHED_SPLITS = {
    "subject1": {"train": ("MVI_1810", "MVI_1814"), "test": ("MVI_1812",)},
    "subject2": {"train": ("MVI_1797", "MVI_1801"), "test": ("MVI_1802",)},
}
POSE_SIZE = 15


@dataclass
class Tracking:
    """What drives the head and the camera in the frames of one split."""

    names: list[str]
    expression: Tensor  # (F, E)
    pose: Tensor  # (F, 15)
    translation: Tensor  # (F, 3)
    intrinsics: Tensor  # (F, 4)
    shape: Tensor  # (S,)

    def __len__(self) -> int:
        return len(self.names)


@dataclass
class Frames(Tracking):
    """The frames of one split at the working size, composited on white with the soft matte."""

    images: Tensor  # (F, 3, H, W) uint8
    mattes: Tensor  # (F, 1, H, W) uint8
    labels: Tensor | None  # (F, 1, H, W) uint8, BiSeNet's 19 classes
    enhanced: Tensor | None = None  # (F, 3, H', W') uint8, super-resolved frames on white

    @property
    def image_size(self) -> tuple[int, int]:
        return tuple(self.images.shape[-2:])

    def image(self, index: Tensor) -> Tensor:
        """Frames as (B, 3, H, W) in [0, 1]."""
        return self.images[index].float() / 255

    def matte(self, index: Tensor) -> Tensor:
        return self.mattes[index].float() / 255

    def camera(self, index: Tensor, translation: Tensor | None = None) -> Camera:
        """Cameras of frames, with the tracked translations (B, 3) unless others are given."""
        translation = self.translation[index] if translation is None else translation
        return Camera(self.intrinsics[index], translation, self.image_size)

    def to(self, device: torch.device) -> "Frames":
        moved = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        return Frames(**moved)


def find_videos(root: Path) -> list[Path]:
    """Folders that hold a flame_params.json, up to three levels below `root`, in order of their names."""
    if not root.is_dir():
        raise AvatarError(f"{root}: no such folder")
    patterns = ("*", "*/*", "*/*/*")
    videos = [path.parent for pattern in patterns for path in root.glob(f"{pattern}/{PARAMETERS}")]
    if not videos:
        raise AvatarError(f"{root}: no SUBJECT/SUBJECT/VIDEO/{PARAMETERS} below it")
    subjects = {video.parent for video in videos}
    if len(subjects) > 1:
        names = ", ".join(sorted(str(subject.relative_to(root)) for subject in subjects))
        raise AvatarError(f"{root}: holds several subjects ({names}); name one of them")
    return sorted(videos)


def split_videos(root: Path, split: str) -> list[Path]:
    """The videos of a split.

    Published subjects are split as published. Elsewhere videos are taken by names that begin with "train" or
    "test"; where none does, the last by name is the test video.
    """
    videos = find_videos(root)
    published = PUBLISHED_SPLITS.get(videos[0].parent.name)
    if published:
        chosen = [video for video in videos if video.name in published.get(split, ())]
    elif len(videos) == 1 or any(video.name.startswith(("train", "test")) for video in videos):
        chosen = [video for video in videos if video.name.startswith(split)]
    else:
        chosen = {"train": videos[:-1], "test": videos[-1:]}.get(split, [])
    if not chosen and len(videos) == 1 and split == "train":
        chosen = videos
    if not chosen:
        names = ", ".join(video.name for video in videos)
        raise AvatarError(f"{root}: no video for the split '{split}' (videos here: {names})")
    return chosen


def load_frames(root: Path, split: str, size: int, *, enhanced: bool = False) -> Frames:
    """Read a split at `size` x `size`; the super-resolved frames, if asked for, at the size they have.

    Raises:
        AvatarError: naming the file, the frame and the field that is missing or wrong.
    """
    parts = [_load_video(video, size, enhanced) for video in split_videos(Path(root), split)]
    labels = [part.labels for part in parts]
    return Frames(
        images=torch.cat([part.images for part in parts]),
        mattes=torch.cat([part.mattes for part in parts]),
        labels=None if any(label is None for label in labels) else torch.cat(labels),
        enhanced=torch.cat([part.enhanced for part in parts]) if enhanced else None,
        **vars(_join(parts)),
    )


def load_tracking(root: Path, split: str) -> Tracking:
    """Read what drives a split's frames; their images are not looked at.

    Raises:
        AvatarError: naming the file, the frame and the field that is missing or wrong.
    """
    return _join([_read_tracking(video) for video in split_videos(Path(root), split)])


def _join(parts: Sequence[Tracking]) -> Tracking:
    tensors = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in ("expression", "pose", "translation", "intrinsics")
    }
    names = [name for part in parts for name in part.names]
    return Tracking(names=names, shape=parts[0].shape, **tensors)


def _read_tracking(video: Path) -> Tracking:
    path = video / PARAMETERS
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise AvatarError(f"{path}: {error}") from error
    for field in ("frames", "intrinsics", "shape_params"):
        if not isinstance(content, dict) or field not in content:
            raise AvatarError(f"{path}: lacks '{field}'")
    intrinsics = _numbers(content["intrinsics"], (4,), path, "intrinsics")
    shape = _numbers(content["shape_params"], (None,), path, "shape_params")
    if not content["frames"]:
        raise AvatarError(f"{path}: 'frames' is empty")
    if not isinstance(content["frames"], list) or not all(isinstance(x, dict) for x in content["frames"]):
        raise AvatarError(f"{path}: 'frames' is not a list of objects")

    names = []
    rows: dict[str, list[Tensor]] = {"expression": [], "pose": [], "translation": []}
    expected = len(content["frames"][0].get("expression", [])) or None
    for index, frame in enumerate(content["frames"]):
        where = f"frames[{index}]"
        for field in ("file_path", "world_mat", "expression", "pose"):
            if field not in frame:
                raise AvatarError(f"{path}: {where} lacks '{field}'")
        rows["expression"].append(_numbers(frame["expression"], (expected,), path, f"{where}.expression"))
        rows["pose"].append(_numbers(frame["pose"], (POSE_SIZE,), path, f"{where}.pose"))
        world = _numbers(frame["world_mat"], (3, 4), path, f"{where}.world_mat")
        rows["translation"].append(world[:, 3])
        names.append(f"{video.name}/{Path(frame['file_path']).name}")
    return Tracking(
        names=names,
        intrinsics=intrinsics.expand(len(names), 4),
        shape=shape,
        **{field: torch.stack(values) for field, values in rows.items()},
    )


def _load_video(video: Path, size: int, enhanced: bool) -> Frames:
    tracking = _read_tracking(video)
    images, mattes, labels, large = [], [], [], []
    with_labels = (video / "semantic").is_dir()
    for name in (Path(name).name for name in tracking.names):
        image = _read_image(video / "image" / f"{name}.png", "RGB")
        matte = _read_image(video / "mask" / f"{name}.png", "L")
        if image.shape[1:] != matte.shape[1:]:
            raise AvatarError(f"{video}/mask/{name}.png: {_extent(matte)}, but its image is {_extent(image)}")
        opacity = matte / 255
        images.append(_to_bytes(resize(image * opacity + 255 * (1 - opacity), size)))
        mattes.append(_to_bytes(resize(matte, size)))
        if enhanced:
            large.append(_enhanced_image(video / "enhanced" / f"{name}.png", opacity))
        if with_labels:
            label = _read_image(video / "semantic" / f"{name}.png", "L")
            labels.append(F.interpolate(label[None], (size, size), mode="nearest-exact")[0].to(torch.uint8))
    return Frames(
        images=torch.stack(images),
        mattes=torch.stack(mattes),
        labels=torch.stack(labels) if with_labels else None,
        enhanced=torch.stack(large) if enhanced else None,
        **vars(tracking),
    )


def _enhanced_image(path: Path, opacity: Tensor) -> Tensor:
    """A super-resolved frame on white, with the matte of the frame itself enlarged."""
    image = _read_image(path, "RGB")
    opacity = F.interpolate(opacity[None], image.shape[1:], mode="bilinear", align_corners=False)[0]
    return _to_bytes(image * opacity + 255 * (1 - opacity))


def resize(image: Tensor, size: int) -> Tensor:
    """(C, H, W) to (C, size, size): the mean over each new pixel's area, bilinear where it enlarges."""
    if image.shape[-1] >= size and image.shape[-2] >= size:
        return F.interpolate(image[None], (size, size), mode="area")[0]
    return F.interpolate(image[None], (size, size), mode="bilinear", align_corners=False)[0]


def _to_bytes(image: Tensor) -> Tensor:
    return image.round().clamp(0, 255).to(torch.uint8)


def _extent(image: Tensor) -> str:
    return f"{image.shape[-1]} x {image.shape[-2]}"


def _numbers(value: object, shape: tuple[int | None, ...], path: Path, field: str) -> Tensor:
    try:
        numbers = torch.tensor(value, dtype=torch.float32)
    except (TypeError, ValueError) as error:
        raise AvatarError(f"{path}: '{field}' is not an array of numbers ({error})") from error
    wanted = tuple(
        numbers.shape[i] if size is None else size for i, size in enumerate(shape[: numbers.dim()])
    )
    if tuple(numbers.shape) != wanted or numbers.dim() != len(shape):
        text = " x ".join("any" if size is None else str(size) for size in shape)
        got = " x ".join(str(size) for size in numbers.shape)
        raise AvatarError(f"{path}: '{field}' has {got} numbers, wants {text}")
    if not numbers.isfinite().all():
        raise AvatarError(f"{path}: '{field}' holds a value that is not finite")
    return numbers


def _read_image(path: Path, mode: str) -> Tensor:
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert(mode))
    except OSError as error:
        raise AvatarError(f"{path}: {error}") from error
    return torch.from_numpy(np.atleast_3d(pixels).copy()).permute(2, 0, 1).float()
