"""Options: of the commands and of a training run, with the two presets."""

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from avatar.errors import AvatarError

Preset = Literal["small", "paper"]
STAGES = ("fit",)


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


@dataclass(frozen=True)
class PointAvatarConfig:
    """Networks and start of the points. Defaults are the paper's."""

    sdf_width: int = 256
    sdf_layers: int = 10
    sdf_skip: int = 4
    sdf_frequencies: int = 6
    """Octaves of the SDF network's positional encoding."""
    deformer_width: int = 128
    texture_widths: tuple[int, ...] = (64, 64)
    deformer: Literal["learned", "head"] = "learned"
    """learned: fields from scratch, held to the head's; head: the head's own plus a learned residual."""
    normals: Literal["jacobian", "skinning"] = "jacobian"
    """How normals follow the warp: by its exact inverse Jacobian, or turned by the skinning."""
    points: int = 400
    start: Literal["sphere", "surface"] = "sphere"
    sphere_radius: float = 0.5
    dense_share: float = 5.0
    """Times as many points on surface that moves much with expressions or eyes (start = surface)."""
    radius: float | None = None
    """Splat radius at the start, in [-1, 1] image coordinates; by default 0.3 * 0.75^log2(points / 100)."""
    points_per_pixel: int = 10
    albedo_gain: float = 10.0
    jaw_opening: float = 0.4
    """Rotation of the jaw in the canonical pose, radians."""

    def start_radius(self) -> float:
        if self.radius is not None:
            return self.radius
        return 0.3 * 0.75 ** math.log2(self.points / 100)


@dataclass(frozen=True)
class FitConfig:
    """Schedule, losses and optimisers of the point avatar. Defaults are the paper's."""

    epochs: int = 63
    steps_per_epoch: int | None = None
    """By default an epoch is one pass over the training frames."""
    batch_pixels: int = 819200
    """Frames in a batch: this over the number of points, at least 1 and at most `batch_max`."""
    batch_max: int = 8
    max_points: int = 409600
    grow_every: int = 5
    grow_epochs: tuple[int, ...] | None = None
    """Epochs that start by doubling the points; by default every `grow_every`."""
    grow_shrink: float = 0.75
    prune_from: int | None = 1
    """First epoch that starts by dropping points no training frame saw; none = never."""
    prune_until: int | None = None
    prune_radius: float = 0.006
    rebuild_optimizer: bool = True
    """As published: forget Adam's moments whenever points are pruned, and never decay the rate."""
    rate: float = 1e-4
    point_rate: float = 1e-4
    deformer_rate: float = 1e-4
    decay: Literal["milestones", "linear", "none"] = "milestones"
    """milestones: halve at epochs 40 and 60; linear: to a tenth over the second half."""
    tracking_rate: float = 5e-4
    tracking_from: int | None = 11
    """First epoch that corrects each frame's expression, pose and translation; none = trust the tracking."""
    rgb: float = 1.0
    mask: float = 1.0
    vgg: float = 0.1
    vgg_every: int = 1
    """Perceptual loss at every n-th step only, n times as strong."""
    vgg_size: int | None = 224
    """Side the images are resized to for the perceptual loss; none = as they are."""
    vgg_from: int = 0
    """First epoch with the perceptual loss."""
    surface: float = 1.0
    eikonal: float = 0.1
    eikonal_samples: int | None = None
    """Samples of the eikonal term; by default the points and as many beside them."""
    flame: float = 10.0
    flame_halvings: tuple[int, ...] = (10, 20, 30, 40)
    checkpoint_every: int = 500
    image_every: int = 500
    log_every: int = 20


@dataclass(frozen=True)
class EvaluateConfig:
    """How held-out frames are rendered and scored."""

    refine_steps: int = 20
    """Adam steps that fit expression, pose and translation to each test frame first; 0 = none."""
    refine_rate: float = 5e-4
    open_image: bool = True
    """Erode then dilate the prediction by 3 x 3 pixels, as the published evaluation does."""


@dataclass(frozen=True)
class RunConfig:
    """What a run folder was trained with; written to its config.json."""

    data: str
    preset: Preset = "small"
    head: str = "embedded"
    """Either the head that comes with the package, or an npz file in the FLAME layout."""
    size: int = 512
    seed: int = 0
    point_avatar: PointAvatarConfig = field(default_factory=PointAvatarConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


SMALL_POINT_AVATAR = PointAvatarConfig(
    sdf_width=64,
    sdf_layers=6,
    sdf_skip=3,
    deformer_width=64,
    texture_widths=(32, 32),
    deformer="head",
    normals="skinning",
    points=9000,
    start="surface",
    dense_share=4.0,
    radius=0.04,
    jaw_opening=0.12,
)
SMALL_FIT = FitConfig(
    epochs=8,
    steps_per_epoch=100,
    batch_max=1,
    grow_epochs=(2,),
    prune_from=1,
    prune_until=1,
    rebuild_optimizer=False,
    rate=2e-3,
    point_rate=5e-4,
    deformer_rate=2e-4,
    decay="linear",
    tracking_from=None,
    vgg_every=2,
    vgg_size=None,
    vgg_from=2,
    eikonal_samples=2000,
    flame=1.0,
    flame_halvings=(),
    checkpoint_every=50,
    image_every=200,
    log_every=10,
)


def make_config(data: str, preset: Preset, seed: int = 0, overrides: tuple[str, ...] = ()) -> RunConfig:
    """A preset's configuration with `NAME=VALUE` overrides, names dotted as in `fit.epochs`."""
    if preset == "small":
        config = RunConfig(
            data=data,
            size=128,
            point_avatar=SMALL_POINT_AVATAR,
            fit=SMALL_FIT,
            evaluate=EvaluateConfig(refine_steps=0, open_image=False),
        )
    else:
        config = RunConfig(data=data, preset=preset)
    config = dataclasses.replace(config, seed=seed)
    for override in overrides:
        name, separator, text = override.partition("=")
        if not separator:
            raise AvatarError(f"--set {override}: wants NAME=VALUE")
        config = _override(config, name.split("."), text, override)
    return config


def _override(config: Any, path: list[str], text: str, override: str) -> Any:
    fields = typing.get_type_hints(type(config))
    if path[0] not in fields:
        raise AvatarError(f"--set {override}: no option '{path[0]}' (options: {', '.join(sorted(fields))})")
    current = getattr(config, path[0])
    if len(path) > 1:
        if not dataclasses.is_dataclass(current):
            raise AvatarError(f"--set {override}: '{path[0]}' has no options of its own")
        value = _override(current, path[1:], text, override)
    else:
        if dataclasses.is_dataclass(current):
            raise AvatarError(f"--set {override}: '{path[0]}' is a group; name one of its options")
        try:
            raw = json.loads(text.lower() if text.lower() in ("none", "true", "false", "null") else text)
        except ValueError:
            raw = None if text.lower() == "none" else text
        try:
            value = _typed(raw, fields[path[0]])
        except (TypeError, ValueError):
            raise AvatarError(
                f"--set {override}: '{text}' does not fit {_describe(fields[path[0]])}"
            ) from None
    return dataclasses.replace(config, **{path[0]: value})


def _typed(raw: Any, hint: Any) -> Any:
    """`raw`, decoded from JSON, as the annotated type; ValueError or TypeError where it does not fit."""
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        unknown = raw.keys() - hints.keys()
        if unknown:
            raise ValueError(f"unknown option '{sorted(unknown)[0]}'")
        return hint(**{name: _typed(value, hints[name]) for name, value in raw.items()})
    if origin is Literal:
        if raw not in typing.get_args(hint):
            raise ValueError(raw)
        return raw
    if origin in (types.UnionType, typing.Union):
        if raw is None:
            return None
        return _typed(raw, next(option for option in typing.get_args(hint) if option is not type(None)))
    if origin is tuple:
        return tuple(_typed(item, typing.get_args(hint)[0]) for item in raw)
    if hint is float and isinstance(raw, int) and not isinstance(raw, bool):
        return float(raw)
    if type(raw) is not hint:
        raise ValueError(raw)
    return raw


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(typing.get_args(hint))
    return getattr(hint, "__name__", None) if isinstance(hint, type) else str(hint).replace("typing.", "")


def to_json(config: RunConfig) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(content: dict[str, Any], source: str) -> RunConfig:
    """The configuration in a run's config.json.

    Raises:
        AvatarError: an option that does not exist or does not fit.
    """
    try:
        return _typed(content, RunConfig)
    except (AttributeError, TypeError, ValueError) as error:
        raise AvatarError(f"{source}: not a configuration of this version ({error})") from error


def differences(first: dict[str, Any], second: dict[str, Any], prefix: str = "") -> list[str]:
    """Options in which two configurations differ, as 'fit.epochs (8, here 4)'."""
    found = []
    for name in sorted(first.keys() | second.keys()):
        a, b = first.get(name), second.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append(f"{prefix}{name} ({a}, here {b})")
    return found
